"""Whether a loaded model keeps packed rows apart: shown by running it, where it is not known."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vlmtune.batching.collate import PackedBatch, pack
from vlmtune.data.media import Size
from vlmtune.errors import ModelError
from vlmtune.models.encode import Encoded, Encoder
from vlmtune.models.family import Family, Tokens
from vlmtune.models.probes import probe_row

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

# Of the largest logit. Half precision rounds a row and a pack differently; what leaks from row to
# row is found by equality, not by this.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
CONTENTS = ((Size(90, 70), "What is this?"), ("Who are you?",), ("Say it:", Size(60, 110), "Now."))
BEHIND = 4  # tokens that may close a picture
SEEN = 4  # a broken pack must differ by this many tolerances, or the comparison shows nothing


@dataclass(frozen=True)
class PackingProof:
    """What running the model showed.

    Attributes:
        packs: Whether rows may be packed.
        reason: What was seen, in words.
        difference: Largest difference between logits packed and alone, of the largest logit.
    """

    packs: bool
    reason: str
    difference: float


def packing_encoder(model: PreTrainedModel, encoder: Encoder) -> Encoder:
    """The encoder for training this model: its family packs rows if that is known or proven.

    Families that are known keep what they say; nothing is run for them.

    Raises:
        ModelError: If the model cannot make logits for chosen places, as training asks it to.
    """
    packing = encoder.family.packing()
    if packing is None:
        return encoder
    proof = prove_packing(model, encoder, packing)
    said = "rows are packed" if proof.packs else "each row takes a forward of its own"
    logger.info("%s: %s: %s", encoder.family.facts.name, said, proof.reason)
    return Encoder(packing, encoder.contract) if proof.packs else encoder


@torch.no_grad()
def prove_packing(model: PreTrainedModel, encoder: Encoder, packing: Family) -> PackingProof:
    """Compare rows in a pack with the same rows alone, real pixels included.

    Three things must hold: the logits are those of each row alone; what another row holds changes
    them by not one bit; and where the pack is broken on purpose, or a picture is another, they do
    change (else the comparison would show nothing).

    Args:
        model: The model, on its device.
        encoder: Its encoder.
        packing: The encoder's family with rows packed.
    """
    training = model.training
    model.eval()
    try:
        return _prove(model, encoder, packing)
    finally:
        model.train(training)


def _prove(model: PreTrainedModel, encoder: Encoder, packing: Family) -> PackingProof:
    rows, others = _rows(encoder)
    try:
        alone = torch.cat([_logits(model, encoder.family, [row]) for row in rows])
    except (IndexError, TypeError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"{type(model).__name__} cannot be trained here: asked for logits of the answer alone "
            f"(a boolean logits_to_keep), its forward fails with {error}"
        ) from error
    packed = _logits(model, packing, rows)
    largest = float(alone.abs().max())
    tolerance = TOLERANCE.get(alone.dtype, TOLERANCE[torch.bfloat16])
    difference = _apart(packed, alone) / largest if largest else math.inf
    if not difference <= tolerance:
        return PackingProof(False, f"packed logits differ by {difference:.1g}", difference)
    if _leaks(model, packing, rows, others):
        return PackingProof(False, "a row sees its neighbours", difference)
    unseen = [replace(row, vision=other.vision) for row, other in zip(rows, others, strict=True)]
    if torch.equal(_logits(model, packing, unseen), packed):
        return PackingProof(False, "pictures change nothing here", difference)
    if _apart(_logits(model, packing, rows, broken=True), alone) <= SEEN * tolerance * largest:
        return PackingProof(False, "a broken pack would not be noticed", difference)
    return PackingProof(True, f"packed logits differ by {difference:.1g}", difference)


def _leaks(
    model: PreTrainedModel, packing: Family, rows: Sequence[Encoded], others: Sequence[Encoded]
) -> bool:
    """Whether another row in one place changes a bit of the rows in the others."""
    labels = [row.tokens.trained for row in rows]
    packed = _logits(model, packing, rows).split(labels)
    for place, other in enumerate(others):
        mixed = [*rows[:place], other, *rows[place + 1 :]]
        changed = _logits(model, packing, mixed).split(labels)
        if any(
            index != place and not torch.equal(before, after)
            for index, (before, after) in enumerate(zip(packed, changed, strict=True))
        ):
            return True
    return False


def _rows(encoder: Encoder) -> tuple[list[Encoded], list[Encoded]]:
    """Rows, two with a picture and one between them without, and others of the same lengths.

    In packs of equal shapes every number is made in the same way, and equality can be asked for.
    """
    pairs = []
    for content in CONTENTS:
        one, other = (encoder.encode(probe_row(content, "A cat.", seed)) for seed in (0, 1))
        pairs.append((one, replace(other, tokens=_exchanged(other.tokens))))
    return [one for one, _ in pairs], [other for _, other in pairs]


def _exchanged(tokens: Tokens) -> Tokens:
    """The row with other text behind its picture, to its very last token.

    A layer that looks back a few tokens sees only the end of the row before, and real rows all end
    alike.
    """
    images = np.flatnonzero(tokens.image_mask)
    start = int(images[-1]) + BEHIND if len(images) else 0
    ids = tokens.ids.copy()
    ids[start:] = np.roll(ids[start:], 1)
    return replace(tokens, ids=ids)


def _logits(
    model: PreTrainedModel, family: Family, rows: Sequence[Encoded], *, broken: bool = False
) -> Tensor:
    """Logits of the labels of rows in one forward, ``(labels, vocabulary)``."""
    batch: PackedBatch = pack(family, rows).to(model.device)
    if broken:  # positions run on: all rows are one
        batch.inputs["positions"][0] = torch.arange(batch.tokens)
    logits: Tensor = model(
        **family.forward_inputs(batch.inputs), logits_to_keep=batch.predicts
    ).logits
    return logits


def _apart(first: Tensor, second: Tensor) -> float:
    return float((first.float() - second.float()).abs().max())
