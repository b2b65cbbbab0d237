"""``serve`` beside transformers' own server: requests and tokens a second, and how long one waits.

    python benchmarks/serve.py [--repeats 3] [--requests 96] [--at-once 1 8 32]

A, ours: ``vlmtune serve``. B: ``transformers serve``, as it is installed. The same random model,
the same requests (half with a picture, greedy, equally long answers), the same client, each server
in a process of its own, A B A B. Every answer is compared, too.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import http.client
import importlib.metadata
import io
import json
import os
import platform
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
SIZES: dict[str, dict[str, int]] = {
    "small": {"hidden": 64, "layers": 2, "vision_width": 32, "vision_layers": 2},
    "medium": {"hidden": 384, "layers": 8, "vision_width": 128, "vision_layers": 4},
}
TOKENS = 32
FAMILY = "idefics2"  # one that transformers' server can open without torchvision


def questions(count: int) -> list[list[dict[str, Any]]]:
    """Messages of distinct requests, every second one with a picture."""
    from PIL import Image

    chance = random.Random(0)
    asked = []
    for number in range(count):
        text = {
            "type": "text",
            "text": f"Question {number}: " + "what is this? " * (1 + number % 4),
        }
        parts: list[dict[str, Any]] = [text]
        if number % 2:
            coarse = Image.frombytes("RGB", (20, 15), chance.randbytes(900))
            buffer = io.BytesIO()
            coarse.resize((320, 240), Image.Resampling.BICUBIC).save(buffer, "PNG")
            url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
            parts.insert(0, {"type": "image_url", "image_url": {"url": url}})
        asked.append([{"role": "user", "content": parts}])
    return asked


@contextlib.contextmanager
def running(what: str, folder: Path) -> Iterator[int]:
    """A server's port while it runs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = Path(sys.executable).parent
    ours = [here / "vlmtune", "serve", folder, "--name", str(folder)]
    theirs = [here / "transformers", "serve", folder, "--device", "cpu", "--dtype", "float32"]
    command = {"ours": ours, "transformers": theirs}[what]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [*command, "--port", str(port)], stdout=log, stderr=log, env=environment
        )
        try:
            deadline = time.monotonic() + 180
            while not answers(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise SystemExit(log.read().decode()[-3000:])
                time.sleep(0.2)
            yield port
        finally:
            process.terminate()
            process.wait(60)


def answers(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    return False


def ask(port: int, model: str, messages: list[dict[str, Any]]) -> tuple[float, str, dict[str, int]]:
    """Seconds, text and count of tokens."""
    body = {"model": model, "messages": messages, "max_tokens": TOKENS, "temperature": 0}
    started = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    with contextlib.closing(connection):
        connection.request(
            "POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"}
        )
        value = json.loads(connection.getresponse().read())
    if "choices" not in value:
        raise SystemExit(f"no answer: {value}")
    return (
        time.perf_counter() - started,
        value["choices"][0]["message"]["content"],
        value["usage"],
    )


def measured(
    what: str, folder: Path, asked: list[list[dict[str, Any]]], at_once: list[int]
) -> dict[str, Any]:
    """Figures of one run of one server, by the number of requests at once, and its answers."""
    found: dict[str, Any] = {}
    with running(what, folder) as port:
        for messages in asked[:8]:  # warm
            ask(port, str(folder), messages)
        for count in at_once:
            several = asked if count > 1 else asked[: max(len(asked) // 2, 8)]
            with ThreadPoolExecutor(count) as pool:
                started = time.perf_counter()
                results = list(pool.map(lambda each: ask(port, str(folder), each), several))
                seconds = time.perf_counter() - started
            waits = sorted(taken for taken, _, _ in results)
            tokens = sum(usage["completion_tokens"] for _, _, usage in results)
            found[str(count)] = {
                "requests": len(several),
                "requests_per_s": round(len(several) / seconds, 2),
                "tokens_per_s": round(tokens / seconds, 1),
                "p50_s": round(statistics.median(waits), 3),
                "p95_s": round(waits[int(0.95 * (len(waits) - 1))], 3),
            }
            found["texts"] = [(text, usage["prompt_tokens"]) for _, text, usage in results]
    return found


def compared(size: str, options: argparse.Namespace) -> dict[str, Any]:
    """Both servers in turns on one model."""
    from vlmtune.testing import TinySize, tiny

    with tempfile.TemporaryDirectory() as place:
        folder = tiny(FAMILY, Path(place) / "model", size=TinySize(**SIZES[size]))
        weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        asked = questions(options.requests)
        runs: dict[str, list[dict[str, Any]]] = {"ours": [], "transformers": []}
        for _ in range(options.repeats):
            for what, taken in runs.items():
                taken.append(measured(what, folder, asked, options.at_once))
                shown = {key: value for key, value in taken[-1].items() if key != "texts"}
                print(size, what, shown, file=sys.stderr)
    said = [[run.pop("texts") for run in taken] for taken in runs.values()]
    mine, theirs = said[0][-1], said[1][-1]
    same = sum(one[0] == other[0] for one, other in zip(mine, theirs, strict=True))
    prompts = sum(one[1] == other[1] for one, other in zip(mine, theirs, strict=True))
    ratios = {
        str(count): {
            name: round(
                statistics.median(run[str(count)][name] for run in runs["ours"])
                / statistics.median(run[str(count)][name] for run in runs["transformers"]),
                2,
            )
            for name in ("requests_per_s", "tokens_per_s", "p50_s", "p95_s")
        }
        for count in options.at_once
    }
    return {
        "parameters": weights // 4,
        "same_text": f"{same} of {len(mine)}",
        "same_prompt_tokens": f"{prompts} of {len(mine)}",
        "ours_over_transformers": ratios,
        "runs": runs,
    }


def told(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def machine() -> dict[str, Any]:
    cpus = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    packages = ("vlmtune", "torch", "transformers", "fastapi", "uvicorn")
    git = ["git", "-C", str(REPOSITORY)]
    return {
        "cpu": next((line.split(": ")[1] for line in cpus if "model name" in line), "unknown"),
        "cores": os.cpu_count(),
        "torch_threads": 1,
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "commit": told(*git, "rev-parse", "HEAD"),
        "changed_since": told(*git, "status", "--porcelain", "src/vlmtune/serving") != "",
        "command": " ".join(["python", "benchmarks/serve.py", *sys.argv[1:]]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument(
        "--out", type=Path, default=REPOSITORY / "benchmarks/results/serve-cpu.json"
    )
    options = parser.parse_args()
    result: dict[str, Any] = {"machine": machine(), "family": FAMILY, "max_tokens": TOKENS}
    for size in options.sizes:
        result[size] = compared(size, options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
