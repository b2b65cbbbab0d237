"""``prepare`` beside the tutorials' way: rows a second, memory, disk.

    python benchmarks/prepare.py [--rows 1000] [--repeats 3] [--many 100000]

A, ours: a CSV of formula pictures through ``prepare`` (one process, as the other one), then every
row read back and made into model inputs. B, the tutorials' way: ``datasets.Dataset.map`` with a
function that returns the processor's output as Python lists, then every row read back into tensors.
Each runs in a process of its own, A B A B. Then rows of small pictures, for the memory of all of
``prepare``'s processes together, and both kinds of picture in one process, for rows a second.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared/data/latex_ocr"
PROMPT = "你是一个LaText OCR助手,目标是读取用户输入的照片，转换成LaTex公式。"
PIXELS = 56448


def formula_table(folder: Path, rows: int) -> Path:
    """A CSV of formula pictures: the shared ones, or rendered ones where they are absent."""
    if not SHARED.is_dir():
        from vlmtune.formulas import write_formula_table

        return write_formula_table(folder, rows, seed=0)
    with (SHARED / "latex_ocr.csv").open(encoding="utf-8", newline="") as file:
        _header, *lines = csv.reader(file)
    lines = [[str(SHARED / image), text] for image, text in lines]
    return write_table(folder / "formulas.csv", [lines[n % len(lines)] for n in range(rows)])


def write_table(path: Path, lines: list[list[str]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["image_path", "text"], *lines])
    return path


def photo_table(folder: Path, rows: int, size: tuple[int, int], kinds: int, form: str) -> Path:
    """A CSV of smooth colour pictures; ``kinds`` of them, over and over."""
    from PIL import Image

    chance = random.Random(0)
    for number in range(kinds):
        coarse = Image.frombytes("RGB", (40, 30), chance.randbytes(3600))
        path = folder / f"{number}.{form}"
        coarse.resize(size, Image.Resampling.BICUBIC).save(path, quality=90)
    lines = [[str(folder / f"{n % kinds}.{form}"), f"picture {n}"] for n in range(rows)]
    return write_table(folder / "photos.csv", lines)


# What is measured, each in a process of its own


def prepare_only(table: Path, out: Path, workers: int | None) -> dict[str, float]:
    from vlmtune.data.prepare import PrepareOptions, prepare

    started = time.perf_counter()
    options = PrepareOptions(workers=workers, prompt=PROMPT, images_root="/")
    result = prepare(table, out / "prepared", options)
    return {"rows": result.rows.kept, "prepare_s": time.perf_counter() - started}


def ours(table: Path, out: Path) -> dict[str, float]:
    from vlmtune.data.dataset import PreparedDataset
    from vlmtune.data.media import ImagePolicy
    from vlmtune.models.contract import BaseModelIdentity, make_contract
    from vlmtune.models.encode import Encoder
    from vlmtune.models.families import load_family
    from vlmtune.testing import tiny

    base = tiny("qwen2_vl", out / "base")
    measured = prepare_only(table, out, 1)
    started = time.perf_counter()
    for row in PreparedDataset.open(out / "prepared").split("train"):
        assert row.images[0].data
    measured["read_s"] = time.perf_counter() - started
    family = load_family(str(base), "pil")
    identity = BaseModelIdentity(id="tiny", weights_sha256="0" * 64)
    contract = make_contract(family, identity, ImagePolicy(max_pixels=PIXELS))
    encoder = Encoder(family, contract)
    started = time.perf_counter()
    for row in PreparedDataset.open(out / "prepared").split("train"):
        assert encoder.encode(row).tokens
    measured["inputs_s"] = time.perf_counter() - started
    measured["disk_bytes"] = size_of(out / "prepared")
    return measured


def tutorial(table: Path, out: Path) -> dict[str, float]:
    import datasets
    import torch
    from PIL import Image
    from transformers import AutoTokenizer
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from vlmtune.testing import tiny

    base = tiny("qwen2_vl", out / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    images = Qwen2VLImageProcessorPil.from_pretrained(base)
    pad = tokenizer.convert_tokens_to_ids("<|image_pad|>")

    def process(example: dict[str, Any]) -> dict[str, Any]:
        picture = Image.open(example["image_path"]).convert("RGB").resize((504, 112))
        inputs = dict(images(images=[picture], return_tensors="pt"))
        inputs = {key: value.tolist() for key, value in inputs.items()}
        grid = inputs["image_grid_thw"][0]
        asked = [pad] * (grid[0] * grid[1] * grid[2] // 4) + tokenizer(PROMPT)["input_ids"]
        answer = tokenizer(example["text"], add_special_tokens=False)["input_ids"]
        return {
            "input_ids": asked + answer,
            "attention_mask": [1] * len(asked + answer),
            "labels": [-100] * len(asked) + answer,
            "pixel_values": torch.tensor(inputs["pixel_values"]),
            "image_grid_thw": torch.tensor(inputs["image_grid_thw"]).squeeze(0),
        }

    datasets.disable_progress_bars()
    started = time.perf_counter()
    rows = datasets.Dataset.from_csv(str(table), cache_dir=str(out / "cache")).map(process)
    measured = {"rows": len(rows), "prepare_s": time.perf_counter() - started}
    started = time.perf_counter()
    for row in rows:
        assert {name: torch.tensor(row[name]) for name in ("input_ids", "labels", "pixel_values")}
    measured["inputs_s"] = time.perf_counter() - started
    measured["disk_bytes"] = size_of(out / "cache")
    return measured


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def measured(what: str, table: Path) -> dict[str, float]:
    """Run one of the above, and add the most memory that its processes held together."""
    import psutil

    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, __file__, "--run", what, str(table), out]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        process = psutil.Popen(command, stdout=subprocess.PIPE, env=environment)
        peak = 0
        while process.poll() is None:
            together = 0
            for member in [process, *process.children(recursive=True)]:
                try:
                    together += member.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            peak = max(peak, together)
            time.sleep(0.02)
        assert process.returncode == 0
        return {**json.loads(process.stdout.read()), "peak_rss_bytes": peak}


def figures(runs: list[dict[str, float]]) -> dict[str, Any]:
    """Rows a second (median, and of the quickest run), and the largest of memory and disk."""
    said: dict[str, Any] = {"rows": runs[0]["rows"], "runs": runs}
    for name in ("prepare_s", "read_s", "inputs_s"):
        if name in runs[0]:
            seconds = [run[name] for run in runs]
            said[name.replace("_s", "_rows_per_s")] = {
                "median": round(runs[0]["rows"] / statistics.median(seconds), 1),
                "best": round(runs[0]["rows"] / min(seconds), 1),
            }
    for name in ("peak_rss_bytes", "disk_bytes"):
        if name in runs[0]:
            said[name] = max(run[name] for run in runs)
    return said


def told(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def machine() -> dict[str, Any]:
    cpus = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    packages = ("vlmtune", "pyarrow", "pillow", "datasets", "transformers", "torch")
    git = ["git", "-C", str(REPOSITORY)]
    return {
        "cpu": next((line.split(": ")[1] for line in cpus if "model name" in line), "unknown"),
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "commit": told(*git, "rev-parse", "HEAD"),
        "changed_since": told(*git, "status", "--porcelain", "src/vlmtune/data") != "",
        "command": " ".join(["python", "benchmarks/prepare.py", *sys.argv[1:]]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--many", type=int, default=100_000)
    parser.add_argument(
        "--out", type=Path, default=REPOSITORY / "benchmarks/results/prepare-cpu.json"
    )
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.run:
        what, table, out = asked.run
        do = {
            "ours": ours,
            "tutorial": tutorial,
            "alone": lambda table, out: prepare_only(table, out, 1),
            "all": lambda table, out: prepare_only(table, out, None),
        }[what]
        print(json.dumps(do(Path(table), Path(out))))
        return
    result: dict[str, Any] = {"machine": machine()}
    with tempfile.TemporaryDirectory() as folder:
        table = formula_table(Path(folder), asked.rows)
        runs: dict[str, list[dict[str, float]]] = {"ours": [], "tutorial": []}
        for _ in range(asked.repeats):
            for what, taken in runs.items():
                taken.append(measured(what, table))
                print(what, taken[-1], file=sys.stderr)
        result |= {what: figures(taken) for what, taken in runs.items()}
        cases = {
            "formulas_one_process": ("alone", formula_table(Path(folder), 10 * asked.rows)),
            "jpeg_640x480_one_process": (
                "alone",
                photo_table(Path(folder), 2 * asked.rows, (640, 480), 50, "jpg"),
            ),
        }
        for name, (what, table) in cases.items():
            result[name] = figures([measured(what, table)])
            print(name, result[name], file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        table = photo_table(Path(folder), asked.many, (160, 120), 2000, "jpg")
        result["many_small_all_processes"] = figures([measured("all", table)])
        print(result["many_small_all_processes"], file=sys.stderr)
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
