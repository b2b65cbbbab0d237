"""What a million rows cost before the first step: prepare, measuring, planning.

    python benchmarks/scale.py [--rows 1000 10000 100000 1000000] [--parts prepare measure plan]

Each figure comes from a process of its own: seconds of the processor (of all its processes; they
mean the same on a busy machine), seconds on the clock, and the most memory it held.

prepare   a CSV of 100 small pictures, over and over, through ``prepare``: every picture is decoded
measure   the tokens of every row by a tiny model's encoder, from synthetic headers: the beginnings
          of PNG files of 1,000 sizes from 28 × 28 to 1,400 × 1,400, with no picture behind them
plan      an epoch of lengths as measured: every step packed into forwards of 4,096 tokens
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import json
import os
import platform
import random
import resource
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
RESULT = REPOSITORY / "benchmarks/results/scale-cpu.json"
SIZES = (1_000, 10_000, 100_000, 1_000_000)
PARTS = ("plan", "measure", "prepare")


def header(width: int, height: int) -> bytes:
    """The beginning of a PNG file: all that a row's tokens depend on."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    check = struct.pack(">I", zlib.crc32(body))
    return (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + check + struct.pack(">I", 0) + b"IDAT"
    )


def rows_of(count: int) -> Any:
    from vlmtune.data.conversation import Conversation, EncodedImage, Image, Message, Text
    from vlmtune.data.dataset import Rows

    chance = random.Random(0)
    headers = [header(chance.randint(28, 1400), chance.randint(28, 1400)) for _ in range(1000)]
    ask = Message("user", (Image(0), Text("Write this formula in LaTeX.")))

    class Synthetic(Rows):
        """Rows that are made when they are asked for."""

        def __len__(self) -> int:
            return count

        @property
        def ids(self) -> list[str]:
            return [str(number) for number in range(count)]

        def row(self, position: int) -> Conversation:
            answer = Text("x^2 + " * (1 + position % 40) + str(position))
            image = EncodedImage(headers[position * 7919 % 1000])
            return Conversation(str(position), (ask, Message("assistant", (answer,))), (image,))

    return Synthetic()


def measure(count: int, work: Path) -> dict[str, Any]:
    from vlmtune.data.media import ImagePolicy
    from vlmtune.models.contract import BaseModelIdentity, make_contract
    from vlmtune.models.encode import Encoder
    from vlmtune.models.families import load_family
    from vlmtune.training.prepare_rows import measure as measured

    family = load_family(str(work / "base"))
    base = BaseModelIdentity(id="tiny", weights_sha256="")
    encoder = Encoder(family, make_contract(family, base, ImagePolicy(max_pixels=401_408)))
    rows = rows_of(count)
    measured(rows[:10], encoder, lambda *_: None)  # the libraries' own start
    before = usage()
    found = measured(rows, encoder, lambda *_: None)
    return {**spent(before), "tokens": sum(found.lengths)}


def plan(count: int, work: Path) -> dict[str, Any]:  # noqa: ARG001
    from vlmtune.batching.planner import make_plan

    chance = random.Random(1)
    lengths = [chance.randint(40, 600) for _ in range(count)]
    before = usage()
    made = make_plan(
        lengths,
        batch_size=16,
        epochs=1,
        max_steps=None,
        max_length=8192,
        token_budget=4096,
        seed=0,
    )
    packs = sum(len(step.packs) for step in made)
    fill = sum(lengths) / (packs * 4096)
    return {**spent(before), "steps": made.steps, "forwards": packs, "fill": round(fill, 4)}


def prepare(count: int, work: Path) -> dict[str, Any]:
    from PIL import Image

    from vlmtune.data.prepare import PrepareOptions
    from vlmtune.data.prepare import prepare as prepared

    chance = random.Random(0)
    for number in range(100):
        picture = Image.frombytes("RGB", (24, 16), chance.randbytes(24 * 16 * 3))
        picture.save(work / f"{number}.png")
    table = work / f"{count}.csv"
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image_path", "text"])
        writer.writerows([str(work / f"{n % 100}.png"), f"picture {n}"] for n in range(count))
    before = usage()
    result = prepared(table, work / "out" / str(count), PrepareOptions(images_root="/"))
    found = {**spent(before), "rows_kept": result.rows.kept}
    size = sum(path.stat().st_size for path in (work / "out" / str(count)).rglob("*.parquet"))
    return {**found, "disk_bytes": size}


def usage() -> tuple[float, float, int]:
    own, others = (
        resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    cpu = own.ru_utime + own.ru_stime + others.ru_utime + others.ru_stime
    return time.perf_counter(), cpu, own.ru_maxrss * 1024


def spent(before: tuple[float, float, int]) -> dict[str, Any]:
    wall, cpu, memory = usage()
    workers = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return {
        "cpu_s": round(cpu - before[1], 3),
        "wall_s": round(wall - before[0], 3),
        "peak_rss_bytes": memory,
        "grown_bytes": memory - before[2],
        "largest_worker_bytes": workers,
    }


def machine() -> dict[str, Any]:
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    names = ("torch", "transformers", "pyarrow", "pillow", "numpy")
    return {
        "cores": os.cpu_count(),
        "shared": True,
        "load": round(os.getloadavg()[0], 1),
        "processor": platform.machine(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in names},
        "commit": commit.stdout.strip(),
        "command": "python benchmarks/scale.py",
    }


def keep(part: str, count: int, found: dict[str, Any]) -> None:
    """Put a figure beside those of other parts and sizes, each with its machine."""
    result = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
    result.setdefault(part, {})[str(count)] = {**found, "machine": machine()}
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def child(part: str, count: int, work: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, "--child", part, str(count), str(work)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, nargs="+", default=SIZES)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--child", nargs=3)
    asked = parser.parse_args()
    if asked.child:
        part, count, work = asked.child
        jobs = {"prepare": prepare, "measure": measure, "plan": plan}
        print(json.dumps(jobs[part](int(count), Path(work))))
        return
    for part in asked.parts:
        for count in asked.rows:
            with tempfile.TemporaryDirectory() as folder:
                work = Path(folder)
                if part == "measure":
                    from vlmtune.testing import tiny

                    tiny("qwen2_vl", work / "base")
                found = child(part, count, work)
            each = 1e6 * found["cpu_s"] / count
            print(
                f"{part} {count:>9,}: {found['cpu_s']:.1f} s of CPU ({each:.0f} µs a row), "
                f"{found['wall_s']:.1f} s, {found['peak_rss_bytes'] / 1e6:.0f} MB",
                flush=True,
            )
            keep(part, count, found)


if __name__ == "__main__":
    main()
