"""That a model's folder, read by another engine's processor, gives the contract's pixels."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as Pictures
from torch import Tensor

from vlmtune.data.conversation import Conversation, EncodedImage, Image, Message, Part, Text
from vlmtune.errors import ContractMismatchError, VlmtuneError
from vlmtune.models.encode import Encoded, Encoder
from vlmtune.models.family import FamilyFacts
from vlmtune.serving.vllm.question import folded, seen

# Wide, tall, tiny, and large enough to be made smaller.
SIZES = ((640, 400), (90, 301), (20, 20), (1000, 700))
# Both sides begin with the same bytes; what differs is the order of two float32 operations.
CLOSE = 1e-4


def probe(*sizes: tuple[int, int]) -> Conversation:
    """A question about pictures of these widths and heights, of noise over a slope."""
    noise = np.random.default_rng(0)
    images = []
    for width, height in sizes:
        slope = np.linspace(0, 200, width)[None, :, None]
        pixels = (slope + noise.integers(0, 56, (height, width, 3))).astype(np.uint8)
        buffer = io.BytesIO()
        Pictures.fromarray(pixels).save(buffer, "PNG")
        images.append(EncodedImage(buffer.getvalue()))
    parts: tuple[Part, ...] = (*(Image(place) for place in range(len(images))), Text("?"))
    return Conversation("probe", (Message("user", parts),), tuple(images))


def check_pictures(folder: Path, encoder: Encoder) -> None:
    """That the folder's own processor takes the pictures that we send as they are.

    Args:
        folder: The model's folder; its ``preprocessor_config.json`` is what engines read.
        encoder: The encoder of its contract.

    Raises:
        ContractMismatchError: If the pixels would not be those of the contract, saying by how much.
    """
    from transformers import AutoImageProcessor

    facts = encoder.family.facts
    try:
        processor = AutoImageProcessor.from_pretrained(folder)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise _refused(facts, f"transformers knows no image processor for it: {error}") from None
    for size in SIZES:
        encoded = _encoded(encoder, size)
        folded(encoder, encoded.tokens)
        theirs = processor(images=seen(encoder, encoded), return_tensors="pt")
        _compare(facts, size, encoded.vision, theirs)


def _encoded(encoder: Encoder, size: tuple[int, int]) -> Encoded:
    try:
        return encoder.encode(probe(size), ask=True)
    except VlmtuneError as error:
        raise _refused(encoder.family.facts, f"a picture cannot be encoded: {error}") from error


def _compare(
    facts: FamilyFacts, size: Sequence[int], ours: Mapping[str, Tensor], theirs: Mapping[str, Any]
) -> None:
    for name, mine in ours.items():
        other = theirs.get(name)
        shape = tuple(other.shape) if isinstance(other, Tensor) else None
        if not isinstance(other, Tensor) or shape != tuple(mine.shape):
            raise _refused(
                facts,
                f"of a picture of {size[0]} x {size[1]} pixels its processor makes {name} of the "
                f"shape {shape}, and the contract {tuple(mine.shape)}",
            )
        distance = float((other.double() - mine.double()).abs().max())
        if distance > CLOSE:
            raise _refused(
                facts,
                f"of a picture of {size[0]} x {size[1]} pixels its processor makes other numbers: "
                f"{name} differs by up to {distance:.3g}",
            )


def _refused(facts: FamilyFacts, reason: str) -> ContractMismatchError:
    return ContractMismatchError(
        f"--engine vllm: vLLM would not see what this model ({facts.name}) was trained to see: "
        f"{reason}. Serve it without --engine"
    )
