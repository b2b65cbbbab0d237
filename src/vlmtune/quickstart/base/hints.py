"""Losses that tell the base where in a picture its answer stands.

From answers alone it learns the same, only later: it would have to discover first that it can look
there. Without them the base said where *a* shape is, and after some 50,000 rows that asked for one
by its name it still took either of two.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from vlmtune.quickstart.base.model import MASKED, MERGE, Batch, Spots

if TYPE_CHECKING:
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLForConditionalGeneration

# A shape's name looks at it in one layer; in the next, whatever says where it is does so.
NAME_LAYER, PLACE_LAYER = 1, 2
SIDES, NAMES, PLACES = 10.0, 0.5, 0.15  # shares of what is lost; saying what it is counts 1
SPREAD = 8.0  # of a feature along one direction, from the left edge to the right one


def naming_loss(model: Qwen2VLForConditionalGeneration, features: Tensor, batch: Batch) -> Tensor:
    """How badly the visual tokens name what the answer says, ``(labels,)``.

    Each visual token is read by the language model's own head; a label's loss is the negative
    logarithm of the probability that its row's tokens give it together.
    """
    shares = _read(model, features)
    sizes = batch.seen[:, :: MERGE**2].sum(dim=1)
    row_of_token = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    row_of_label = batch.predicts.nonzero()[:, 0]
    elsewhere = row_of_label[:, None] != row_of_token  # (labels, visual tokens)
    return -shares.T[batch.targets].masked_fill(elsewhere, MASKED).logsumexp(dim=-1)


def place_loss(
    model: Qwen2VLForConditionalGeneration,
    features: Tensor,
    batch: Batch,
    spots: Spots,
    scores: dict[int, Tensor],
) -> Tensor:
    """How badly shapes are seen and looked at where they are; a sum over shapes.

    The visual tokens in a shape's box name it and hold its sides, each along a direction of its
    own that never changes. Its name in a question or an answer looks at it, and so does each word
    of an answer that says where it is.

    Args:
        model: The base.
        features: What ``see`` returned.
        batch: The rows.
        spots: The shapes in their pictures.
        scores: What ``batch_logits`` put down for ``NAME_LAYER`` and ``PLACE_LAYER``.
    """
    shares = _read(model, features).T[spots.words]  # (spots, 2, visual tokens)
    named = -shares.masked_fill(~spots.cells[:, None], MASKED).logsumexp(dim=-1).sum()
    hidden = functional.rms_norm(features, features.shape[-1:]).float()
    held = 0.5 + hidden @ _directions(hidden.shape[1]) / SPREAD
    off = (held - spots.sides[:, None]).abs() * spots.cells[..., None]
    off = off.sum(dim=1) / spots.cells.sum(dim=1, keepdim=True)
    names = batch.ids[spots.rows] == spots.words[:, 1:]
    asked = batch.predicts[spots.rows] & spots.asked[:, None]
    return (
        named
        + SIDES * off.sum()
        + NAMES * _looks_away(scores[NAME_LAYER], spots, names)
        + PLACES * _looks_away(scores[PLACE_LAYER], spots, asked)
    )


def _looks_away(scores: Tensor, spots: Spots, where: Tensor) -> Tensor:
    """Minus the logarithm of what falls on its shape, summed over the tokens ``where`` says."""
    spot, token = where.nonzero(as_tuple=True)
    weighed = scores[spots.rows[spot], :, token].float()  # (tokens, heads, keys)
    aside = ~spots.keys[spot, None]
    return (weighed.logsumexp(dim=-1) - weighed.masked_fill(aside, MASKED).logsumexp(dim=-1)).sum()


def _read(model: Any, features: Tensor) -> Tensor:
    """Logarithms of the probabilities of words, ``(visual tokens, vocabulary)``."""
    hidden = functional.rms_norm(features, features.shape[-1:])
    shares: Tensor = model.lm_head(hidden).float().log_softmax(dim=-1)
    return shares


def _directions(width: int) -> Tensor:
    """Four directions at right angles, ``(width, 4)``, the same always."""
    draws = torch.randn(width, 4, generator=torch.Generator().manual_seed(0))
    return torch.linalg.qr(draws)[0]
