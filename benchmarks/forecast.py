"""Forecasts of real sizes on 8 to 1,024 GPUs: the tables of docs/scale.md. Nothing is trained.

    python benchmarks/forecast.py [--only NAME]

The models have the published dimensions of Qwen2-VL and no weights; the rows are documents of 2,500
visual tokens with an answer, as many as make a million samples. ``vlmtune plan`` does the rest.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

REPOSITORY = Path(__file__).resolve().parents[1]
RESULT = REPOSITORY / "benchmarks/results/forecast.json"
GPUS = (8, 64, 256, 1024)
SAMPLES = 1_000_000
ROWS = 16
# The models' own config.json: text, vision, whether the output layer is the embedding.
VISION = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4}
DIMENSIONS: dict[str, dict[str, Any]] = {
    "2B": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151_936,
        "tie_word_embeddings": True,
    },
    "7B": {
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152_064,
        "tie_word_embeddings": False,
    },
}
LORA = ["tuning.method=lora", "tuning.rank=64", "distributed.strategy=ddp"]
FULL = ["tuning.method=full", "distributed.strategy=fsdp2", "training.gradient_checkpointing=true"]
JOBS: dict[str, tuple[str, list[str]]] = {
    "Qwen2-VL-2B, LoRA r 64, ddp": ("2B", LORA),
    "Qwen2-VL-7B, LoRA r 64, ddp": ("7B", LORA),
    "Qwen2-VL-7B, full, fsdp2, checkpointing": ("7B", FULL),
}


def model(folder: Path, name: str) -> Path:
    """A model folder with real dimensions and no weights."""
    from vlmtune.testing import tiny

    tiny("qwen2_vl", folder)
    for weights in folder.glob("*.safetensors*"):
        weights.unlink()
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    own = DIMENSIONS[name]
    config["text_config"].update(own)
    config["text_config"]["rope_parameters"]["mrope_section"] = [16, 24, 24]
    for stale in ("head_dim", "layer_types", "max_window_layers"):
        config["text_config"].pop(stale, None)
    config["vision_config"].update(VISION, hidden_size=own["hidden_size"])
    config["tie_word_embeddings"] = own["tie_word_embeddings"]
    file.write_text(json.dumps(config), encoding="utf-8")
    return folder


def data(work: Path) -> Path:
    """Square pages of 50 × 50 visual tokens."""
    from PIL import Image

    from vlmtune.data.prepare import PrepareOptions, prepare

    Image.new("RGB", (1400, 1400), "white").save(work / "page.png")
    with (work / "pages.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image_path", "text"])
        # Different, or the rows would be one.
        writer.writerows([str(work / "page.png"), f"page {n:03} " * 20] for n in range(ROWS))
    options = PrepareOptions(images_root="/", validation=0)
    prepare(work / "pages.csv", work / "data", options)
    return work / "data"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only")
    asked = parser.parse_args()
    from vlmtune.recipe import load_recipe

    verb = importlib.import_module("vlmtune.verbs.plan")
    tables = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        rows = data(work)
        for name, (size, own) in JOBS.items():
            if asked.only not in (None, name):
                continue
            base = work / name.replace(" ", "-")
            model(base, size)
            remember(verb)
            tables[name] = []
            for count in GPUS:
                batch = 4 * count
                recipe = load_recipe(
                    "latex-ocr",
                    [
                        f"model.base={base}",
                        f"data.path={rows}",
                        "image.max_pixels=1960000",
                        "training.token_budget=12288",
                        f"training.epochs={SAMPLES / ROWS}",
                        f"training.batch_size={batch}",
                        "training.precision=bf16",
                        *own,
                    ],
                )
                found = verb.plan(recipe, device="h200", devices=count)
                tables[name].append(found)
                print(
                    f"{name}, {count:>5}: {found['peak_memory_bytes'] / 1e9:.1f} GB, "
                    f"{found['seconds'] / 3600:.2f} h, "
                    f"{found['time']['samples_per_second']:.0f} samples/s",
                    flush=True,
                )
    if asked.only is None:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=False,
        )
        result = {
            "what": "forecast, not measured",
            "command": "python benchmarks/forecast.py",
            "commit": commit.stdout.strip(),
            "jobs": tables,
        }
        RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def remember(verb: Any) -> None:
    """A step is traced once, however many devices take their share of such steps."""
    original = vars(verb._Forecast).get("original", verb._Forecast.trace)
    verb._Forecast.original = original
    known: dict[Any, Any] = {}

    def trace(self: Any, recipe: Any, pack: Any, *, several: bool) -> Any:
        key = (recipe.tuning.method, len(pack), several, self.devices > 1)
        if key not in known:
            known[key] = original(self, recipe, pack, several=several)
        return known[key]

    verb._Forecast.trace = trace


if __name__ == "__main__":
    main()
