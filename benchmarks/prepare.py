"""Raw files to batches beside the tutorials' way: rows a second, memory, disk.

    python benchmarks/prepare.py [--data DIR] [--rows 1000] [--repeats 3] [--many 100000]

A, ours: a CSV of formula pictures through ``prepare`` (one process, as the other one), then one
epoch of packed batches from ``train``'s loader, measuring and planning included. B, the tutorials'
way: ``datasets.Dataset.map`` with a function that returns the processor's output as Python lists,
then one epoch of batches of the same number of rows, padded. Each runs in a process of its own,
A B A B. DIR holds a CSV of pictures and texts; without it formulas are drawn. Then rows of small
pictures, for the memory of all of ``prepare``'s processes together, and both kinds of picture in
one process, for rows a second (``--many 0`` leaves these out).
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common import RESULTS, machine, pinned, table, write_result

BATCH = 16
PROMPT = "你是一个LaText OCR助手,目标是读取用户输入的照片，转换成LaTex公式。"
PIXELS = 56448
SECONDS = ("prepare_s", "prepare_processor_s", "batches_s", "batches_processor_s")
SIZES = ("peak_rss_bytes", "disk_bytes")


def formula_table(folder: Path, rows: int, data: Path | None) -> Path:
    """A CSV of formula pictures; of a folder that has fewer, over and over."""
    if data is None:
        from vlmtune.formulas import write_formula_table

        return write_formula_table(folder, rows, seed=0)
    with next(data.glob("*.csv")).open(encoding="utf-8", newline="") as file:
        _header, *lines = csv.reader(file)
    lines = [[str(data / image), text] for image, text in lines]
    return write_table(
        folder / f"formulas-{rows}.csv", [lines[n % len(lines)] for n in range(rows)]
    )


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

    with timed() as took:
        options = PrepareOptions(workers=workers, prompt=PROMPT, images_root="/")
        result = prepare(table, out / "prepared", options)
    return {"rows": result.rows.kept, **took("prepare")}


@contextmanager
def timed() -> Iterator[Callable[[str], dict[str, float]]]:
    """Wall and processor seconds of what is inside, under a name."""
    wall, processor = time.perf_counter(), time.process_time()
    spent: list[float] = []
    yield lambda name: {f"{name}_s": spent[0], f"{name}_processor_s": spent[1]}
    spent += [time.perf_counter() - wall, time.process_time() - processor]


def ours(table: Path, out: Path) -> dict[str, float]:
    from vlmtune.data.dataset import PreparedDataset
    from vlmtune.data.media import ImagePolicy
    from vlmtune.models.contract import BaseModelIdentity, make_contract
    from vlmtune.models.encode import Encoder
    from vlmtune.models.families import load_family
    from vlmtune.testing import tiny
    from vlmtune.training.config import TrainingConfig
    from vlmtune.training.loader import Loader
    from vlmtune.training.prepare_rows import measure, plan_rows

    base = tiny("qwen2_vl", out / "base")
    family = load_family(str(base), "pil")
    identity = BaseModelIdentity(id="tiny", weights_sha256="0" * 64)
    encoder = Encoder(family, make_contract(family, identity, ImagePolicy(max_pixels=PIXELS)))
    measured = prepare_only(table, out, 1)
    split = PreparedDataset.open(out / "prepared").split("train")
    with timed() as took:
        lengths = measure(split, encoder, lambda *_: None)
        config = TrainingConfig(batch_size=BATCH, epochs=1, workers=0)
        plan, _ = plan_rows(
            split, lengths, config, max_length=8192, too_long="error", token_budget=1024
        )
        seen = 0
        for _, batches in Loader(split, encoder, plan, workers=0).steps(start=0):
            seen += sum(len(batch.ids) for batch in batches)
    assert seen == measured["rows"]
    return {**measured, **took("batches"), "disk_bytes": size_of(out / "prepared")}


def tutorial(table: Path, out: Path) -> dict[str, float]:
    import datasets
    import torch
    from PIL import Image
    from transformers import AutoTokenizer, DataCollatorForSeq2Seq
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
    with timed() as preparing:
        rows = datasets.Dataset.from_csv(str(table), cache_dir=str(out / "cache")).map(process)
    rows = rows.remove_columns(
        [name for name in ("image_path", "image", "text") if name in rows.column_names]
    )
    collate = DataCollatorForSeq2Seq(tokenizer, padding=True)
    with timed() as batching:
        loader = torch.utils.data.DataLoader(rows, BATCH, shuffle=True, collate_fn=collate)
        seen = sum(len(batch["input_ids"]) for batch in loader)
    assert seen == len(rows)
    measured = {"rows": len(rows), **preparing("prepare"), **batching("batches")}
    return {**measured, "disk_bytes": size_of(out / "cache")}


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def measured(what: str, table: Path, core: int | None = None) -> dict[str, float]:
    """Run one of the above, and add the most memory that its processes held together."""
    import psutil

    with tempfile.TemporaryDirectory() as out:
        command = [*pinned(core), sys.executable, __file__, "--run", what, str(table), out]
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
    for name in SECONDS:
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


def compared(result: dict[str, Any]) -> dict[str, float]:
    """Ours over the tutorials' way, rows a second, medians."""
    return {
        name: round(result["ours"][name]["median"] / result["tutorial"][name]["median"], 1)
        for name in (each.replace("_s", "_rows_per_s") for each in SECONDS)
    }


def told(result: dict[str, Any]) -> str:
    """The table."""
    names = [name.replace("_s", "_rows_per_s") for name in SECONDS]
    rows = []
    for way in ("ours", "tutorial"):
        said = result[way]
        speeds = [f"{said[name]['median']} ({said[name]['best']})" for name in names]
        rows.append([way, *speeds, *(f"{said[name] / 1e6:,.0f} MB" for name in SIZES)])
    ratios = [f"{result['ours_over_tutorial'][name]} ×" for name in names]
    return table(["median (best)", *names, *SIZES], [*rows, ["ratio", *ratios, "", ""]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--core", type=int, help="keep every run to this core")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--many", type=int, default=100_000)
    parser.add_argument("--out", type=Path, default=RESULTS / "prepare-cpu.json")
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
    packages = ("vlmtune", "pyarrow", "pillow", "datasets", "transformers", "torch")
    result: dict[str, Any] = machine(*packages)
    result["data"] = "formulas drawn by vlmtune" if asked.data is None else asked.data.name
    with tempfile.TemporaryDirectory() as folder:
        rows = formula_table(Path(folder), asked.rows, asked.data)
        runs: dict[str, list[dict[str, float]]] = {"ours": [], "tutorial": []}
        for _ in range(asked.repeats):
            for what, taken in runs.items():
                taken.append(measured(what, rows, asked.core))
                print(what, taken[-1], file=sys.stderr)
        result |= {what: figures(taken) for what, taken in runs.items()}
        result["ours_over_tutorial"] = compared(result)
        if asked.many:
            result |= alone(Path(folder), asked.rows, asked.many, asked.data)
    print(told(result))
    write_result(asked.out, result)


def alone(folder: Path, rows: int, many: int, data: Path | None) -> dict[str, Any]:
    """``prepare`` by itself: more formulas, photographs, and very many small pictures."""
    small, photos = folder / "small", folder / "photos"
    small.mkdir()
    photos.mkdir()
    cases = {
        "formulas_one_process": ("alone", formula_table(folder, 10 * rows, data)),
        "jpeg_640x480_one_process": (
            "alone",
            photo_table(photos, 2 * rows, (640, 480), 50, "jpg"),
        ),
        "many_small_all_processes": ("all", photo_table(small, many, (160, 120), 2000, "jpg")),
    }
    found = {}
    for name, (what, made) in cases.items():
        found[name] = figures([measured(what, made)])
        print(name, found[name], file=sys.stderr)
    return found


if __name__ == "__main__":
    main()
