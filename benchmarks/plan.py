"""``plan`` against what a run really takes: the peak of memory of six configurations on a CPU.

    python benchmarks/plan.py [--only NAME]

For each configuration a model is made, ``vlmtune plan`` forecasts, and ``vlmtune train`` runs two
steps in a process of its own under torch's profiler, which reports every allocation and release of
torch's allocator. The measured peak is the highest sum of these, weights included; what Python, the
libraries and the reading of pictures take is no tensor and not in it. By how much the process grew
resident while it trained (the profiler's own records included) is printed beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import resource
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: its threads spin

REPOSITORY = Path(__file__).resolve().parents[1]
RESULT = REPOSITORY / "benchmarks/results/plan-cpu.json"
ROWS = 48

SIZE = {"hidden": 256, "layers": 6, "vision_width": 128, "vision_layers": 6}
COMMON = [
    "training.max_steps=2",
    "training.batch_size=8",
    "training.workers=0",
    "training.token_budget=2048",
    "evaluation.before=false",
    "evaluation.after=false",
    "evaluation.probe=0",
    "tuning.dropout=0.05",
    "image.max_pixels=200704",
]
FP32 = ["training.precision=fp32", "training.gradient_checkpointing=false"]
BF16 = ["training.precision=bf16", "training.gradient_checkpointing=false"]
AGAIN = ["training.precision=fp32", "training.gradient_checkpointing=true"]
BIG = {"vocabulary": 151_936}
# name -> family, size, options
CONFIGURATIONS: dict[str, tuple[str, dict[str, int], list[str]]] = {
    "lora fp32": ("qwen2_vl", {"vocabulary": 2048}, [*FP32, "tuning.rank=64"]),
    "lora fp32, vocabulary 151,936": ("qwen2_vl", BIG, [*FP32, "tuning.rank=64"]),
    "full fp32": ("qwen2_vl", {"vocabulary": 2048}, [*FP32, "tuning.method=full"]),
    "lora fp32, checkpointing": (
        "qwen2_vl",
        {"vocabulary": 2048},
        [*AGAIN, "tuning.rank=64"],
    ),
    "lora bf16": ("qwen2_vl", BIG, [*BF16, "tuning.rank=64"]),
    "lora fp32 on every part, tiles": (
        "idefics3",
        {"vocabulary": 2048},
        [*FP32, "tuning.targets=all-linear", "tuning.train=[vision,projector,language]"],
    ),
}


def options(work: Path, name: str) -> list[str]:
    """Makes the model, and returns the recipe's options."""
    from vlmtune.testing import TinySize, tiny

    family, size, own = CONFIGURATIONS[name]
    base = work / f"{family}-{size['vocabulary']}"
    if not base.exists():
        tiny(family, base, seed=1, size=TinySize(**{**SIZE, **size}))
    common = COMMON if family == "qwen2_vl" else [*COMMON, "image.max_pixels=null"]  # it has tiles
    return [f"model.base={base}", f"data.path={work / 'data'}", *common, *own]


def data(work: Path) -> None:
    """Document-sized pictures of formulas and their text, of many sizes."""
    from PIL import Image

    from vlmtune.data.prepare import PrepareOptions, prepare
    from vlmtune.formulas import write_formula_table

    table = write_formula_table(work, ROWS, seed=3)
    for number, path in enumerate(sorted((work / "images").glob("*.png"))):
        with Image.open(path) as picture:
            scale = 1 + number % 5
            picture.resize((picture.width * scale, picture.height * scale)).save(path)
    prepare(table, work / "data", PrepareOptions(validation=4))


class Enough(Exception):  # noqa: N818
    """The steps are done; the rest of a run is not measured."""


def measure(arguments: list[str]) -> dict[str, Any]:
    """Trains two steps; the highest sum of what torch's allocator gave out."""
    from torch.profiler import ProfilerActivity, profile

    from vlmtune.recipe import load_recipe
    from vlmtune.training.saving import Saver

    verb = importlib.import_module("vlmtune.verbs.train")
    # A checkpoint is a copy in the memory of the CPU, which a GPU's peak does not know.
    Saver.save = lambda *_: None  # type: ignore[method-assign]
    peaks: dict[str, Any] = {}
    loop = verb.run

    def profiled(job: Any) -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        held = {
            each.untyped_storage().data_ptr(): each.untyped_storage().nbytes()
            for each in (*job.model.parameters(), *job.model.buffers())
        }
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            loop(job)
        grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
        events.sort(key=lambda event: event.start_ns())
        live = highest = 0
        for event in events:
            live += event.nbytes()
            highest = max(highest, live)
        weights = sum(held.values())
        peaks.update(
            weights_bytes=weights, peak_bytes=weights + highest, resident_growth_bytes=grown
        )
        raise Enough

    verb.run = profiled
    with contextlib.suppress(Enough), tempfile.TemporaryDirectory() as run:
        verb.train(load_recipe("latex-ocr", arguments), run_dir=run)
    return peaks


def machine() -> dict[str, Any]:
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    names = ("torch", "transformers", "peft")
    return {
        "cores": os.cpu_count(),
        "shared": True,
        "processor": platform.machine(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in names},
        "commit": commit.stdout.strip(),
        "command": "python benchmarks/plan.py",
    }


def forecast(arguments: list[str]) -> dict[str, Any]:
    from vlmtune.recipe import load_recipe

    verb = importlib.import_module("vlmtune.verbs.plan")
    found: dict[str, Any] = verb.plan(load_recipe("latex-ocr", arguments))
    return found


def alone(job: Callable[[list[str]], dict[str, Any]], arguments: list[str]) -> dict[str, Any]:
    """A job in a process of its own, forked from this one, which has imported everything."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=lambda: send.send(job(arguments)))
    process.start()
    send.close()
    found: dict[str, Any] = receive.recv()
    process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only")
    asked = parser.parse_args()
    for name in ("vlmtune.verbs.plan", "vlmtune.verbs.train", "torch.profiler"):
        importlib.import_module(name)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        data(work)
        for name in [asked.only] if asked.only else CONFIGURATIONS:
            arguments = options(work, name)
            foretold, found = alone(forecast, arguments), alone(measure, arguments)
            peak, real = foretold["peak_memory_bytes"], found["peak_bytes"]
            keep(
                name,
                {
                    "parameters": sum(p["parameters"] for p in foretold["parts"].values()),
                    "forecast_bytes": peak,
                    "measured_bytes": real,
                    "ratio": round(peak / real, 4),
                    "resident_growth_bytes": found["resident_growth_bytes"],
                    "forecast_by_part": foretold["memory"],
                    "measured_weights_bytes": found["weights_bytes"],
                    "machine": machine(),
                },
            )
            print(
                f"{name}: {peak / 1e6:.1f} MB forecast, {real / 1e6:.1f} measured, "
                f"{peak / real:.3f}; {found['resident_growth_bytes'] / 1e6:.0f} resident",
                flush=True,
            )


def keep(name: str, found: dict[str, Any]) -> None:
    """Put a configuration's figures beside those of the others."""
    result = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
    RESULT.write_text(json.dumps({**result, name: found}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
