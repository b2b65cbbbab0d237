"""The real sizes on one GPU: Qwen2-VL-2B with random weights, the tutorials' job, LoRA r 64, bf16.

    python benchmarks/gpu.py [--data DIR] [--peak-tflops 790] [--tiny]

Speed does not depend on what the weights hold. First 996 formula rows × 2 epochs; then the same
with one measure taken away at a time; then rows of the size of a document, 2,500 visual tokens
each. DIR holds a CSV of formula pictures and texts; without it formulas are drawn. MFU counts the
FLOPs that ``vlmtune plan`` counts: nothing is counted twice, and what the vision cache saves is no
work. ``--tiny`` shows on any machine, with a tiny model and few rows, that all of it runs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import RESULTS, fault_of, machine, run_child, table, write_result
from jobs.ablation import OPTIONS, PATCHES
from material import (
    ALPHA,
    LEARNING_RATE,
    MAX_PIXELS,
    PROMPT,
    RANK,
    SEED,
    Row,
    formula_rows,
    write_table,
)

JOB = Path(__file__).resolve().parent / "jobs/ours.py"
TEXT = {
    "vocab_size": 151_936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e6,
        "mrope_section": [16, 24, 24],
    },
}
VISION = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "hidden_size": 1536, "mlp_ratio": 4}


@dataclass(frozen=True)
class Scale:
    """How much is run.

    Attributes:
        formulas: Rows of the tutorials' job.
        documents: Rows of the size of a document.
        side: Pixels of a side of theirs.
        batch: Rows of a step of theirs.
    """

    formulas: int = 996
    documents: int = 64
    side: int = 1400
    batch: int = 8


TINY = Scale(formulas=16, documents=4, side=112, batch=2)


def base(folder: Path, *, small: bool) -> Path:
    """A model in the real layout; the real sizes are written over the tiny ones."""
    from vlmtune.testing import tiny

    tiny("qwen2_vl", folder)
    if small:
        return folder
    import torch
    from transformers import Qwen2VLForConditionalGeneration

    config = real_config(folder)
    torch.manual_seed(SEED)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen2VLForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    return folder


def real_config(folder: Path) -> Any:
    """Qwen2-VL-2B's numbers, with the control tokens of a tiny model's tokenizer."""
    from transformers import Qwen2VLConfig

    facts = Qwen2VLConfig.from_pretrained(folder).to_dict()
    facts["text_config"] |= {**TEXT, "layer_types": None}
    facts["vision_config"] |= VISION
    return Qwen2VLConfig.from_dict(facts)


def documents(folder: Path, scale: Scale) -> list[Row]:
    """Pages of formulas and a text of about 60 tokens."""
    from PIL import Image

    from vlmtune.formulas import formulas, render

    folder.mkdir()
    rows = []
    for number, formula in enumerate(formulas(scale.documents, SEED)):
        page = Image.new("RGB", (scale.side, scale.side), "white")
        line = render(formula).convert("RGB")
        for top in range(0, scale.side, max(28, line.height)):
            page.paste(line, (0, top))
        path = folder / f"{number}.png"
        page.save(path)
        rows.append(Row(path, formula))
    return rows


def run_once(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One run; ``fault`` says why there are no figures."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    log = folder / "log"
    used = run_child([sys.executable, str(JOB), str(folder / "job.json")], log)
    fault = fault_of(used, log)
    if fault is not None:
        return {"fault": fault}
    measured = json.loads((folder / "measured.json").read_text(encoding="utf-8"))
    steps = measured["step_seconds"]
    return {
        "training_s": round(sum(steps), 3),
        "step_s_median": round(statistics.median(steps), 4),
        "step_s_first": steps[0],
        "peak_memory_bytes": measured["peak_memory_bytes"],
        "first_loss": measured["losses"][0],
        "last_loss": measured["losses"][-1],
        **{name: measured[name] for name in ("flops", "samples", "tokens") if name in measured},
    }


def add_speed(run: dict[str, Any], whole: dict[str, Any], peak: float) -> None:
    """Samples a second and MFU; a run with a measure less does the same work."""
    if "fault" not in run and "flops" in whole:
        run["samples_per_s"] = round(whole["samples"] / run["training_s"], 2)
        run["mfu"] = round(whole["flops"] / run["training_s"] / peak, 4)


def measured(asked: argparse.Namespace, folder: Path, result: dict[str, Any]) -> None:
    """Everything, written after every run."""
    scale = TINY if asked.tiny else Scale()
    rows = formula_rows(asked.data, scale.formulas, folder)
    common = {
        "base": str(base(folder / "base", small=asked.tiny)),
        "prompt": PROMPT,
        "rank": RANK,
        "alpha": ALPHA,
        "dropout": 0.05,
        "learning_rate": LEARNING_RATE,
        "seed": SEED,
        "precision": "bf16",
        "steps": None,
    }
    formula_job = {
        **common,
        "table": str(write_table(folder / "formulas.csv", rows)),
        "max_pixels": MAX_PIXELS,
        "batch_size": 16,
        "training": {"epochs": 2},
    }
    pages = documents(folder / "pages", scale)
    document_job = {
        **common,
        "table": str(write_table(folder / "pages.csv", pages)),
        "max_pixels": scale.side**2,
        "batch_size": scale.batch,
        "forecast": True,
    }
    jobs: dict[str, dict[str, Any]] = {"everything": {**formula_job, "forecast": True}}
    for name in asked.without:
        jobs[f"without {name}"] = {**formula_job, "without": name}
    jobs["documents"] = document_job
    for name, job in jobs.items():
        run = run_once(job, folder / "job")
        whole = run if job.get("forecast") else result["runs"]["everything"]
        add_speed(run, whole, asked.peak_tflops * 1e12)
        result["runs"][name] = run
        print(name, json.dumps(run), file=sys.stderr, flush=True)
        write_result(asked.out, result)


def told(runs: dict[str, dict[str, Any]]) -> str:
    """The table."""
    rows = []
    for name, run in runs.items():
        if "fault" in run:
            rows.append([name, run["fault"], *[""] * 4])
            continue
        rows.append(
            [
                name,
                f"{run['training_s']:.1f}",
                f"{run.get('samples_per_s', 0):.1f}",
                f"{run.get('mfu', 0):.1%}",
                f"{run['peak_memory_bytes'] / 1e9:.2f}",
                f"{run['last_loss']:.4f}",
            ]
        )
    return table(("", "training s", "samples/s", "MFU", "peak GB", "last loss"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--peak-tflops", type=float, default=790, help="of the device, in bf16")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--without", nargs="*", default=[*OPTIONS, *PATCHES])
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    import torch

    if not asked.tiny and not torch.cuda.is_available():
        raise SystemExit("no GPU here; --tiny shows on a CPU that everything runs")
    asked.out = asked.out or RESULTS / ("gpu-tiny.json" if asked.tiny else "gpu.json")
    result = machine("vlmtune", "torch", "transformers", "peft")
    result |= {"tiny": asked.tiny, "peak_tflops": asked.peak_tflops, "runs": {}}
    with tempfile.TemporaryDirectory() as folder:
        measured(asked, Path(folder), result)
    print(told(result["runs"]))


if __name__ == "__main__":
    main()
