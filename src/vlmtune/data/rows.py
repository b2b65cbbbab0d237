"""A conversation as a row of parquet, and back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

import pyarrow as pa

from vlmtune.data.conversation import (
    Box,
    Conversation,
    EncodedImage,
    Image,
    Message,
    Part,
    Role,
    Text,
)

# What Hugging Face ``datasets`` would write itself for this schema: the only part that it could not
# infer is that ``images`` are pictures.
_FEATURES = {
    "id": {"dtype": "string", "_type": "Value"},
    "messages": {
        "feature": {
            "role": {"dtype": "string", "_type": "Value"},
            "content": {
                "feature": {
                    "type": {"dtype": "string", "_type": "Value"},
                    "text": {"dtype": "string", "_type": "Value"},
                    "index": {"dtype": "int32", "_type": "Value"},
                    "label": {"dtype": "string", "_type": "Value"},
                    "box": {"feature": {"dtype": "float64", "_type": "Value"}, "_type": "List"},
                },
                "_type": "List",
            },
        },
        "_type": "List",
    },
    "images": {"feature": {"_type": "Image"}, "_type": "List"},
    "references": {"feature": {"dtype": "string", "_type": "Value"}, "_type": "List"},
    "meta": {"dtype": "string", "_type": "Value"},
}

# A part's picture is called ``index``, not ``image``: chat templates ask ``'image' in content``,
# which is true for every part of a struct that has such a field, be it null.
_PART = pa.struct(
    [
        ("type", pa.string()),
        ("text", pa.string()),
        ("index", pa.int32()),
        ("label", pa.string()),
        ("box", pa.list_(pa.float64())),
    ]
)

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.list_(_PART))]))),
        ("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
        ("references", pa.list_(pa.string())),
        ("meta", pa.string()),
    ],
    metadata={"huggingface": json.dumps({"info": {"features": _FEATURES}})},
)


def _part_to_struct(part: Part) -> dict[str, Any]:
    match part:
        case Text(text):
            return {"type": "text", "text": text}
        case Image(index):
            return {"type": "image", "index": index}
        case Box(image, label, xyxy):
            return {"type": "box", "index": image, "label": label, "box": list(xyxy)}


def _part_from_struct(struct: Mapping[str, Any]) -> Part:
    if struct["type"] == "text":
        return Text(struct["text"])
    if struct["type"] == "image":
        return Image(struct["index"])
    x1, y1, x2, y2 = struct["box"]
    return Box(struct["index"], struct["label"], (x1, y1, x2, y2))


def conversation_to_row(conversation: Conversation) -> dict[str, Any]:
    """A conversation as a dict that fits ``SCHEMA``."""
    return {
        "id": conversation.id,
        "messages": [
            {"role": message.role, "content": [_part_to_struct(part) for part in message.content]}
            for message in conversation.messages
        ],
        "images": [{"bytes": image.data, "path": image.path} for image in conversation.images],
        "references": list(conversation.references),
        "meta": json.dumps(dict(conversation.meta), ensure_ascii=False, sort_keys=True),
    }


def row_to_conversation(row: Mapping[str, Any]) -> Conversation:
    """The conversation that ``conversation_to_row`` made ``row`` of."""
    return Conversation(
        id=row["id"],
        messages=tuple(
            Message(
                cast(Role, message["role"]),
                tuple(_part_from_struct(part) for part in message["content"]),
            )
            for message in row["messages"]
        ),
        images=tuple(EncodedImage(image["bytes"], image["path"]) for image in row["images"]),
        references=tuple(row["references"]),
        meta=json.loads(row["meta"]),
    )


def image_digests(row: Mapping[str, Any]) -> tuple[bytes, ...]:
    """SHA-256 of each of a row's images."""
    return tuple(hashlib.sha256(image["bytes"]).digest() for image in row["images"])


def row_digest(row: Mapping[str, Any], images: Sequence[bytes]) -> bytes:
    """SHA-256 of what a row means for training and evaluation.

    Id, messages, references and the images' bytes; not their paths and not ``meta``, so that the
    same data moved to another folder has the same fingerprint.

    Args:
        row: As ``conversation_to_row`` makes it.
        images: Its ``image_digests``.
    """
    canonical = json.dumps(
        {
            "id": row["id"],
            "messages": row["messages"],
            "images": [digest.hex() for digest in images],
            "references": row["references"],
        },
        sort_keys=True,
        separators=(",", ":"),
    )
    return hashlib.sha256(canonical.encode()).digest()
