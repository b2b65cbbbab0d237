"""Answers that are spoken together, one token a step."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from vlmtune.errors import VlmtuneError
from vlmtune.models.decode import Decoding, pad_left
from vlmtune.serving.errors import internal
from vlmtune.serving.rows import Asking, Row
from vlmtune.serving.sampling import Pick, choose
from vlmtune.serving.served import ServedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel


AHEAD = (
    512  # tokens of its answer for which a question must find room; longer ones may have to wait
)


class Batch:
    """Rows of one model on one cache.

    Args:
        model: The weights, answering as ``served``.
        served: What the rows ask.
        askings: Their questions, encoded; read in one forward.

    Attributes:
        rows: The answers.
        parked: Whether they wait because the caches have no room to grow.
    """

    def __init__(
        self, model: PreTrainedModel, served: ServedModel, askings: Sequence[Asking]
    ) -> None:
        encoded = [asking.encoded for asking in askings if asking.encoded is not None]
        self.served = served
        self.parked = False
        self._decoding = Decoding(model, served.encoder, encoded)
        several = [place for place, each in enumerate(askings) for _ in range(each.settings.n)]
        if len(several) > len(askings):  # read once, answered n times
            self._decoding.keep(several)
        self.rows = [row for asking in askings for row in asking.begin()]

    @property
    def tokens(self) -> int:
        """Tokens in the cache, padding included."""
        return len(self.rows) * self._decoding.length

    @property
    def soon(self) -> int:
        """What ``tokens`` may become before others are asked to wait."""
        return len(self.rows) * (self._decoding.length + self._ahead)

    @property
    def _ahead(self) -> int:
        return min(max((row.left for row in self.rows), default=0), AHEAD)

    def joined(self, other: Batch) -> int | None:
        """What ``soon`` would be with another batch; None if they cannot become one."""
        if self.served is not other.served or self.parked or other.parked:
            return None
        if not (self._decoding.joinable and other._decoding.joinable):
            return None
        length = max(self._decoding.length, other._decoding.length)
        ahead = max(self._ahead, other._ahead)
        return (len(self.rows) + len(other.rows)) * (length + ahead)

    def join(self, other: Batch) -> None:
        """Take the rows of another batch in."""
        self._decoding.join(other._decoding)
        self.rows += other.rows

    def park(self) -> Batch:
        """Let the younger half of the rows wait where they are; without them the others go on."""
        order = sorted(range(len(self.rows)), key=lambda place: self.rows[place].asking.asked)
        younger = sorted(order[(len(order) + 1) // 2 :])
        other = copy(self)
        other.parked = True
        other._decoding = self._decoding.split(younger)
        other.rows = [self.rows[place] for place in younger]
        self.rows = [row for row in self.rows if row not in other.rows]
        return other

    def fail(self, error: VlmtuneError) -> None:
        """Tell all who ask that there is no answer, and be empty."""
        for row in self.rows:
            row.asking.fail(error)
        self.rows = []

    def leave(self) -> None:
        """Let go of rows that nobody listens to any more."""
        self._keep([place for place, row in enumerate(self.rows) if not row.asking.over])

    def step(self) -> None:
        """Say one token in every row; those that are answered leave."""
        picks = choose(self._decoding.logits, [row.wish for row in self.rows])
        going = [
            place
            for place, (row, pick) in enumerate(zip(self.rows, picks, strict=True))
            if heard(row, pick)
        ]
        tokens = [pick.token for place in going if (pick := picks[place]) is not None]
        self._keep(going)
        if self.rows:
            self._decoding.step(torch.tensor(tokens))

    def _keep(self, places: list[int]) -> None:
        if len(places) < len(self.rows):
            self.rows = [self.rows[place] for place in places]
            if places:
                self._decoding.keep(places)


def heard(row: Row, pick: Pick | None) -> bool:
    """Let a row take its next token; its own fault ends its own question. True if it goes on."""
    try:
        return row.hear(pick) and not row.asking.over
    except Exception as error:  # noqa: BLE001 - whatever it is, the neighbours go on
        row.asking.fail(internal(error))
        return False


@torch.no_grad()
def answer_alone(model: PreTrainedModel, asking: Asking) -> None:
    """Answer one question by the model's own ``generate``, for families that we cannot decode.

    The tokens are chosen, told and ended as in a batch.
    """
    from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

    encoded, encoder = asking.encoded, asking.served.encoder
    assert encoded is not None
    batch = pad_left(encoder, [encoded])
    inputs = encoder.family.generate_inputs(
        {name: tensor.to(model.device) for name, tensor in batch.items()}
    )

    class Chosen(LogitsProcessor):
        """Leaves ``generate`` nothing to choose."""

        def __init__(self, row: Row) -> None:
            self.row, self.goes_on = row, True

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # noqa: ARG002
            (pick,) = choose(scores, [self.row.wish])
            self.goes_on = heard(self.row, pick)
            only = torch.full_like(scores, -torch.inf)
            only[0, pick.token if pick else encoder.end_id] = 0
            return only

    class Answered(StoppingCriteria):
        """Ends ``generate`` where the row ended."""

        def __init__(self, chosen: Chosen) -> None:
            self.chosen = chosen

        def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:  # noqa: ARG002
            over = not self.chosen.goes_on
            return torch.full((1,), over, dtype=torch.bool, device=input_ids.device)

    for row in asking.begin():
        chosen = Chosen(row)
        # What a call leaves open, ``generate`` takes from the model: a hub's penalties would leak.
        model.generation_config = GenerationConfig(
            do_sample=False, pad_token_id=encoder.pad_id, use_cache=True
        )
        cast(Any, model).generate(
            **inputs,
            max_new_tokens=asking.max_tokens,
            logits_processor=[chosen],
            stopping_criteria=[Answered(chosen)],
        )
