"""What every system of ``training.py`` is given: a base, fresh adapters, and the same rows.

Pictures are written at the size at which the model takes them, so that nobody resizes: Pillow and
torchvision differ by up to 0.24 in a normalised pixel, which moves a loss by 2e-5. The adapters
that others go on training are those that ours begins with, and their tables hold the rows in the
order of our plan.
"""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROMPT = "你是一个LaText OCR助手,目标是读取用户输入的照片，转换成LaTex公式。"
MAX_PIXELS = 56448
SIZE = {"hidden": 256, "layers": 6, "vision_width": 128, "vision_layers": 6}
RANK, ALPHA, LEARNING_RATE, SEED, BATCH, MICRO_BATCH = 64, 16, 1e-4, 42, 16, 4


@dataclass(frozen=True)
class Row:
    """A formula: its picture's file and its text."""

    picture: Path
    text: str


def formula_rows(data: Path | None, count: int, folder: Path) -> list[Row]:
    """Rows of a folder with a CSV of pictures and texts, or drawn ones without one."""
    if data is None:
        from vlmtune.formulas import write_formula_table

        table = write_formula_table(folder / "drawn", count, seed=0)
    else:
        table = next(data.glob("*.csv"))
    with table.open(encoding="utf-8", newline="") as file:
        _header, *lines = csv.reader(file)
    return [Row(table.parent / image, text) for image, text in lines[:count]]


def make_material(
    folder: Path,
    rows: Sequence[Row],
    *,
    vocabulary: int,
    seed: int = SEED,
    batch: int = BATCH,
    max_pixels: int = MAX_PIXELS,
) -> dict[str, Any]:
    """Write everything into a folder.

    Args:
        folder: The folder.
        rows: What is trained, once each.
        vocabulary: Rows of the base's embedding.
        seed: Of the order, and of the first adapters.
        batch: Rows of an optimizer step.
        max_pixels: Larger pictures are shrunk.

    Returns:
        What a job is told; the driver adds where it writes, and its precision.
    """
    from vlmtune.data.media import ImagePolicy
    from vlmtune.models.contract import BaseModelIdentity, make_contract
    from vlmtune.models.encode import Encoder
    from vlmtune.models.families import load_family
    from vlmtune.testing import TinySize, tiny

    base = tiny("qwen2_vl", folder / "base", size=TinySize(**SIZE, vocabulary=vocabulary))
    family = load_family(str(base), "pil")
    policy = ImagePolicy(max_pixels=max_pixels)
    contract = make_contract(
        family, BaseModelIdentity(id="base", weights_sha256="0" * 64), policy, prompt=PROMPT
    )
    own = _presized(rows, folder / "pictures", family, policy)
    table = write_table(folder / "rows.csv", own)
    order = _order(table, folder, Encoder(family, contract), seed, batch)
    ordered = [own[index] for index in order]
    return {
        "base": str(base),
        "peer_base": str(_without_last_newline(base, folder / "peer_base")),
        "adapter": str(_fresh_adapters(base, folder / "adapter", seed)),
        "table": str(table),
        "ordered_table": str(write_table(folder / "ordered.csv", ordered)),
        "trl_rows": _trl(folder / "trl.jsonl", ordered),
        "llamafactory_rows": _llamafactory(folder / "llamafactory", ordered),
        "swift_rows": _swift(folder / "swift.jsonl", ordered),
        "prompt": PROMPT,
        "max_pixels": max_pixels,
        "rank": RANK,
        "alpha": ALPHA,
        "learning_rate": LEARNING_RATE,
        "batch_size": batch,
        "micro_batch": min(batch, MICRO_BATCH),
        "steps": len(rows) // batch,
        "seed": seed,
    }


def _presized(rows: Sequence[Row], folder: Path, family: Any, policy: Any) -> list[Row]:
    from PIL import Image

    from vlmtune.data.media import Size, open_image

    folder.mkdir()
    written = []
    for number, row in enumerate(rows):
        picture = open_image(row.picture.read_bytes(), policy)
        path = folder / f"{number:06d}.png"
        resized = family.resized(Size(*picture.size), policy)
        picture.resize(tuple(resized), Image.Resampling.BICUBIC).save(path)
        written.append(Row(path, row.text))
    return written


def _order(table: Path, folder: Path, encoder: Any, seed: int, batch: int) -> list[int]:
    """Indices of the rows in the order in which our plan trains them."""
    from vlmtune.batching.planner import make_plan
    from vlmtune.data.dataset import PreparedDataset
    from vlmtune.data.prepare import PrepareOptions, prepare

    prepare(table, folder / "measured", PrepareOptions(images_root="/", workers=1))
    split = PreparedDataset.open(folder / "measured").split("train")
    lengths = [len(encoder.tokens(row)) for row in split]
    plan = make_plan(
        lengths,
        batch_size=batch,
        epochs=1,
        max_steps=None,
        max_length=8192,
        token_budget=1024,
        seed=seed,
    )
    shutil.rmtree(folder / "measured")
    return [row for step in plan for row in step.rows]


def _fresh_adapters(base: Path, out: Path, seed: int) -> Path:
    """The adapters that a run of ours with this seed begins with."""
    import torch

    from vlmtune.models.families import load_family
    from vlmtune.models.load import load_model
    from vlmtune.training.checkpoint import seed_random
    from vlmtune.tuning.apply import apply_tuning
    from vlmtune.tuning.config import TuningConfig

    model = load_model(base, dtype=torch.float32, device=torch.device("cpu"))
    seed_random(seed)
    tuning = TuningConfig(rank=RANK, alpha=ALPHA, dropout=0.0)
    facts = load_family(str(base), "pil").facts
    tuned = apply_tuning(model, tuning, facts, base_id=str(base))
    assert tuned.adapter is not None
    tuned.adapter.save_pretrained(str(out), save_embedding_layers=False)
    return out


def _without_last_newline(base: Path, out: Path) -> Path:
    """The base with a template that ends with the last answer's end token."""
    shutil.copytree(base, out)
    path = out / "chat_template.jinja"
    template = path.read_text(encoding="utf-8")
    close = "<|im_end|>\n{% endfor %}{% if add_generation_prompt"
    assert close in template
    # A newline right behind a tag would be trimmed.
    bare = "<|im_end|>{% if not (loop.last and message['role'] == 'assistant') %}"
    bare += "{{ '\\n' }}{% endif %}"
    path.write_text(
        template.replace(close, bare + "{% endfor %}{% if add_generation_prompt"), encoding="utf-8"
    )
    return out


def write_table(path: Path, rows: Sequence[Row]) -> Path:
    """A CSV of pictures and texts."""
    with path.open("w", encoding="utf-8", newline="") as file:
        lines = [[str(row.picture), row.text] for row in rows]
        csv.writer(file).writerows([["image_path", "text"], *lines])
    return path


def _lines(path: Path, records: Sequence[dict[str, Any]]) -> str:
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_text(text, encoding="utf-8")
    return str(path)


def _trl(path: Path, rows: Sequence[Row]) -> str:
    return _lines(
        path,
        [
            {
                "prompt": [{"role": "user", "content": PROMPT}],
                "completion": [{"role": "assistant", "content": row.text}],
                "images": [str(row.picture)],
            }
            for row in rows
        ],
    )


def _swift(path: Path, rows: Sequence[Row]) -> str:
    return _lines(
        path,
        [
            {
                "messages": [
                    {"role": "user", "content": f"<image>{PROMPT}"},
                    {"role": "assistant", "content": row.text},
                ],
                "images": [str(row.picture)],
            }
            for row in rows
        ],
    )


def _llamafactory(folder: Path, rows: Sequence[Row]) -> str:
    folder.mkdir()
    _swift(folder / "rows.jsonl", rows)
    about = {
        "file_name": "rows.jsonl",
        "formatting": "sharegpt",
        "columns": {"messages": "messages", "images": "images"},
        "tags": {
            "role_tag": "role",
            "content_tag": "content",
            "user_tag": "user",
            "assistant_tag": "assistant",
        },
    }
    (folder / "dataset_info.json").write_text(json.dumps({"rows": about}), encoding="utf-8")
    return str(folder)
