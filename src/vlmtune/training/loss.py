"""The loss: summed cross-entropy of the label positions alone, normalised by the whole step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlmtune.batching.collate import PackedBatch
from vlmtune.models.attention import packed_rows
from vlmtune.models.family import Family
from vlmtune.models.head import LossHead, loss_wanted
from vlmtune.training.distributed.ranks import Ranks
from vlmtune.training.fitting import RandomStates


def label_logits(model: nn.Module, family: Family, batch: PackedBatch) -> Tensor:
    """Logits of the places whose next token is trained, shape ``(labels, vocabulary)``.

    No logits are made for prompts and images: at a vocabulary of 151,936 they would be most of the
    memory of a step.
    """
    inputs: dict[str, Any] = family.forward_inputs(batch.inputs)
    with packed_rows(batch.lengths):
        return model(**inputs, logits_to_keep=batch.predicts).logits


def summed_loss(model: nn.Module, family: Family, batch: PackedBatch) -> Tensor:
    """Sum of the per-token losses of a packed batch, a float32 scalar.

    Divide by the number of labels of the whole optimizer step, not of this batch: the mean of
    means weighs the tokens of short packs more.
    """
    random = RandomStates.now()
    with loss_wanted(batch.targets) as request:
        logits = label_logits(model, family, batch)
    if request.loss is not None:
        if logits is request.loss:
            return request.loss.squeeze(0)
        # The model does something with what its output layer gives; that must be logits, then.
        for module in model.modules():
            if isinstance(module, LossHead):
                module.final = False
        random.restore()  # the same dropout, and a resumed run meets this place again
        return summed_loss(model, family, batch)
    precise = torch.promote_types(logits.dtype, torch.float32)  # float64 stays
    return nn.functional.cross_entropy(logits.to(precise), batch.targets, reduction="sum")


@torch.no_grad()
def mean_loss(
    model: nn.Module, family: Family, batches: list[PackedBatch], ranks: Ranks | None = None
) -> float:
    """Per-token loss over all labels of the batches of all processes."""
    losses = sum(float(summed_loss(model, family, batch)) for batch in batches)
    own = sum(batch.labels for batch in batches)
    total, labels = (ranks or Ranks()).total(losses, own)
    return total / labels
