"""Inference with cut weights: processes that forward differently often keep each other company."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vlmtune.data.conversation import Conversation, Message, Text
from vlmtune.models.decode import pad_left
from vlmtune.models.encode import Encoder
from vlmtune.training.distributed.ranks import Ranks

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Wish(IntEnum):
    """What a process would do next; what is highest is done first."""

    NOTHING = 0
    TEXT = 1
    IMAGES = 2


class Company:
    """Goes along with the forwards that the other processes make and this one does not need.

    Before each forward every process says what it wishes to do. If one has images, all pass through
    the vision tower: those that have none, with a row that nobody asked about.

    Args:
        model: The model, whose weights all processes put together layer by layer.
        encoder: Its encoder.
        rows: What all processes answer together; the images to go along with are taken from here.
        ranks: The processes.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        encoder: Encoder,
        rows: Sequence[Conversation],
        ranks: Ranks,
    ) -> None:
        self._model, self._encoder, self._ranks = model, encoder, ranks
        self._seeing = next((row for row in rows if row.images), None)
        self._along: dict[Wish, dict[str, Any]] = {}
        self._alone = False

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Every forward of the model within is made in company; left when all are done."""
        handle = self._model.register_forward_pre_hook(
            self._before, with_kwargs=True, prepend=True
        )  # before the hook that puts the weights together
        try:
            yield
            self._until(Wish.NOTHING)
        finally:
            handle.remove()

    def _before(self, model: nn.Module, args: Any, inputs: dict[str, Any]) -> None:  # noqa: ARG002
        if not self._alone:
            images = any(name in inputs for name in self._encoder.family.facts.joins)
            self._until(Wish.IMAGES if images else Wish.TEXT)

    def _until(self, wish: Wish) -> None:
        """Go along until it is this process's turn."""
        while (turn := Wish(self._ranks.highest(wish))) is not wish:
            self._alone = True
            try:
                with torch.no_grad():
                    self._model(**self._inputs(turn))
            finally:
                self._alone = False

    def _inputs(self, wish: Wish) -> dict[str, Any]:
        if wish not in self._along:
            row = self._seeing if wish is Wish.IMAGES else None
            row = row or Conversation("text", (Message("user", (Text("."),)),))
            batch = pad_left(self._encoder, [self._encoder.encode(row, ask=True)])
            moved = {name: tensor.to(self._model.device) for name, tensor in batch.items()}
            self._along[wish] = self._encoder.family.generate_inputs(moved)
        return self._along[wish]
