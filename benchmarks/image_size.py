"""Memory of training against the size of the pictures, beside the tutorials' way.

    python benchmarks/image_size.py [--sides 224 448 896 1400] [--core 0]

Square pictures of so many pixels a side, two rows a step, two steps, the tiny model of
``training.py``; 1,400 pixels are 2,500 visual tokens. Each run is a process of its own; its highest
resident memory is read by the system. The tutorials' way takes one row a forward; ours packs as its
planner sees fit.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path
from typing import Any

from common import RESULTS, machine, table, write_result
from environments import HERE, make
from material import Row, make_material

from training import apart, run_once

ROWS, BATCH, TOKEN = 4, 2, 28
SYSTEMS = ("vlmtune", "tutorial")


def square_rows(folder: Path, side: int) -> list[Row]:
    """Smooth colour pictures and a short text for each."""
    from PIL import Image

    folder.mkdir()
    chance = random.Random(0)
    rows = []
    for number in range(ROWS):
        coarse = Image.frombytes("RGB", (40, 40), chance.randbytes(4800))
        path = folder / f"{number}.png"
        coarse.resize((side, side), Image.Resampling.BICUBIC).save(path)
        rows.append(Row(path, f"picture number {number} of this size"))
    return rows


def at(side: int, asked: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Both systems at one size; ``fault`` says why one has no figure."""
    folder.mkdir()
    rows = square_rows(folder / "drawn", side)
    material = make_material(
        folder / "material", rows, vocabulary=2048, batch=BATCH, max_pixels=side * side
    )
    material["micro_batch"] = 1
    said: dict[str, Any] = {"side": side, "visual_tokens": (side // TOKEN) ** 2}
    runs = {name: run_once(name, material, asked, folder / "job") for name in SYSTEMS}
    for name, run in runs.items():
        said[name] = {key: run[key] for key in ("fault", "peak_bytes", "processor") if key in run}
    if not any("fault" in run for run in runs.values()):
        losses = (runs[name]["losses"] for name in SYSTEMS)
        said["loss_difference"] = apart(*losses)
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sides", type=int, nargs="+", default=[224, 448, 896, 1400])
    parser.add_argument("--core", type=int, help="keep every run to this core")
    parser.add_argument("--environments", type=Path, default=HERE)
    parser.add_argument("--out", type=Path, default=RESULTS / "image-size-cpu.json")
    asked = parser.parse_args()
    fault = make(asked.environments, "tutorial")
    if fault is not None:
        raise SystemExit(f"the tutorials' environment did not install, because {fault}")
    result = machine("vlmtune", "torch", "transformers", "pillow") | {"sizes": []}
    with tempfile.TemporaryDirectory() as folder:
        for side in asked.sides:
            result["sizes"].append(at(side, asked, Path(folder) / str(side)))
            print(json.dumps(result["sizes"][-1]), flush=True)
            write_result(asked.out, result)
    rows = []
    for said in result["sizes"]:
        memory = [
            said[name].get("fault") or f"{said[name]['peak_bytes'] / 1e6:,.0f}" for name in SYSTEMS
        ]
        rows.append([str(said["side"]), str(said["visual_tokens"]), *memory])
    print(table(("side", "visual tokens", *(f"{name} MB" for name in SYSTEMS)), rows))


if __name__ == "__main__":
    main()
