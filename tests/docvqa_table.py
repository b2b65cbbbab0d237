"""Rows in the shape of ``nielsr/docvqa_1200_examples``, made here: columns, types and all."""

from __future__ import annotations

import io
import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

LANGUAGES = ("de", "en", "es", "fr", "it")
FEATURES = {
    "id": {"dtype": "string", "_type": "Value"},
    "image": {"_type": "Image"},
    "query": {name: {"dtype": "string", "_type": "Value"} for name in LANGUAGES},
    "answers": {"feature": {"dtype": "string", "_type": "Value"}, "_type": "List"},
    "words": {"feature": {"dtype": "string", "_type": "Value"}, "_type": "List"},
    "bounding_boxes": {
        "feature": {"feature": {"dtype": "float32", "_type": "Value"}, "_type": "List"},
        "_type": "List",
    },
    "answer": {
        "match_score": {"dtype": "float64", "_type": "Value"},
        "matched_text": {"dtype": "string", "_type": "Value"},
        "start": {"dtype": "int64", "_type": "Value"},
        "text": {"dtype": "string", "_type": "Value"},
    },
}
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("query", pa.struct([(name, pa.string()) for name in LANGUAGES])),
        ("answers", pa.list_(pa.string())),
        ("words", pa.list_(pa.string())),
        ("bounding_boxes", pa.list_(pa.list_(pa.float32()))),
        (
            "answer",
            pa.struct(
                [
                    ("match_score", pa.float64()),
                    ("matched_text", pa.string()),
                    ("start", pa.int64()),
                    ("text", pa.string()),
                ]
            ),
        ),
    ],
    metadata={"huggingface": json.dumps({"info": {"features": FEATURES}})},
)


def page(number: int) -> bytes:
    """A picture of its own for every row but each fourth, which shows its neighbour's page."""
    shade = 40 + 7 * (number - (number % 4 == 3))
    buffer = io.BytesIO()
    Image.new("RGB", (60, 80), (shade % 256, 200, shade * 3 % 256)).save(buffer, "PNG")
    return buffer.getvalue()


def rows(count: int) -> list[dict[str, Any]]:
    """Questions in five languages with one to three answers; ``answer`` holds something else."""
    return [
        {
            "id": f"train_{number}",
            "image": {"bytes": page(number), "path": None},
            "query": {name: f"{name}: what is {number}?" for name in LANGUAGES},
            "answers": [f"{number}", f"number {number}", f"No. {number}"][: 1 + number % 3],
            "words": ["what", "is", str(number)],
            "bounding_boxes": [[0.1, 0.2, 0.3, 0.4]],
            "answer": {"match_score": 0.9, "matched_text": "x", "start": 3, "text": "wrong"},
        }
        for number in range(count)
    ]


def parquet(count: int) -> bytes:
    """The rows as the hub holds them."""
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows(count), schema=SCHEMA), buffer)
    return buffer.getvalue()
