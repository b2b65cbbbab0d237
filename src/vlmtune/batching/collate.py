"""Encoded rows into one packed sequence, for training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from vlmtune.errors import ModelError
from vlmtune.models.encode import IGNORED, Encoded
from vlmtune.models.family import Family


@dataclass(frozen=True)
class PackedBatch:
    """Several rows as one sequence that no row looks out of.

    Attributes:
        ids: The rows' ids, in order.
        inputs: ``input_ids (1, tokens)``, ``positions (rows, tokens)``, ``image_mask
            (1, tokens)`` and the family's vision tensors.
        predicts: Where the next token of the same row is trained: ``(1, tokens)``, bool. Logits are
            made for these places alone.
        targets: The ids to predict there, ``(labels,)``.
        lengths: Tokens of each row.
        stands_in: Whether another process trains these rows, and this one only passes through the
            layers with it.
    """

    ids: tuple[str, ...]
    inputs: dict[str, Tensor]
    predicts: Tensor
    targets: Tensor
    lengths: tuple[int, ...]
    stands_in: bool = False

    @property
    def labels(self) -> int:
        """Number of tokens trained on."""
        return int(self.targets.numel())

    @property
    def tokens(self) -> int:
        """Number of tokens, labels or not."""
        return 0 if self.stands_in else sum(self.lengths)

    def to(self, device: torch.device) -> PackedBatch:
        """The batch on a device; from ``pinned`` memory, without waiting until it is there."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> PackedBatch:
        """The batch in memory that a GPU reads by itself."""
        return self._each(lambda tensor: tensor if tensor.is_cuda else tensor.pin_memory())

    def _each(self, moved: Callable[[Tensor], Tensor]) -> PackedBatch:
        return replace(
            self,
            inputs={name: moved(tensor) for name, tensor in self.inputs.items()},
            predicts=moved(self.predicts),
            targets=moved(self.targets),
        )

    def without_labels(self) -> PackedBatch:
        """The same rows, of which nothing is trained: a loss and gradients of zero."""
        nothing, none = torch.zeros_like(self.predicts), self.targets[:0]
        return replace(self, predicts=nothing, targets=none, stands_in=True)


def pack(family: Family, rows: Sequence[Encoded]) -> PackedBatch:
    """Lay rows end to end.

    Labels are shifted inside each row before the rows are joined: the last token of a row never
    predicts the first of its neighbour.

    Raises:
        ModelError: If there are several rows and the family is not known to keep them apart.
    """
    if len(rows) > 1 and not family.facts.packs:
        raise ModelError(
            f"rows of the family {family.facts.name} cannot be packed: its attention is not known "
            "to keep neighbours apart. Each row takes a forward of its own"
        )
    predicts, targets = [], []
    for row in rows:
        following = np.append(row.tokens.labels[1:], IGNORED)
        predicts.append(following != IGNORED)
        targets.append(following[following != IGNORED])
    inputs = {
        "input_ids": _row_tensor([row.tokens.ids for row in rows]),
        "image_mask": _row_tensor([row.tokens.image_mask for row in rows]),
        "positions": torch.cat([row.positions for row in rows], dim=1),
        **family.join_vision([row.vision for row in rows]),
    }
    return PackedBatch(
        ids=tuple(row.id for row in rows),
        inputs=inputs,
        predicts=_row_tensor(predicts),
        targets=torch.from_numpy(np.concatenate(targets)),
        lengths=tuple(len(row.tokens) for row in rows),
    )


def _row_tensor(arrays: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(arrays)).unsqueeze(0)
