"""Questions answered by all processes, each in one of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from vlmtune.data.conversation import Box, Conversation
from vlmtune.models.encode import Encoder
from vlmtune.models.generate import Generation, generate, tokens_of
from vlmtune.training.distributed.dealing import deal
from vlmtune.training.distributed.in_step import Company
from vlmtune.training.distributed.ranks import Ranks

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Together:
    """``generate``, by all processes: each question in one of them, every answer in all.

    Attributes:
        ranks: The processes; all of them call, with the same questions.
        in_step: Whether the model's weights are cut among them.
    """

    ranks: Ranks
    in_step: bool = False

    def __call__(
        self,
        model: PreTrainedModel,
        encoder: Encoder,
        questions: Sequence[Conversation],
        *,
        max_new_tokens: int,
        batch_rows: int = 32,
        progress: Callable[[int], None] | None = None,
    ) -> list[Generation]:
        """Answer each conversation's last question; see ``generate``."""
        count = self.ranks.count
        loads = [len(tokens_of(encoder, question, ask=True)) for question in questions]
        own = deal(loads, count)[self.ranks.rank]
        company = Company(model, encoder, questions, self.ranks).kept
        with company() if self.in_step else nullcontext():
            answers = generate(
                model,
                encoder,
                [questions[index] for index in own],
                max_new_tokens=max_new_tokens,
                batch_rows=batch_rows,
                progress=_scaled(progress, count, len(questions)),
                tries_again=not self.in_step,
            )
        found: dict[int, Generation] = {}
        records = [[index, asdict(each)] for index, each in zip(own, answers, strict=True)]
        for hand in self.ranks.gather_json(records):
            found.update((index, _answer(record)) for index, record in hand)
        return [found[index] for index in range(len(questions))]


def _scaled(
    progress: Callable[[int], None] | None, count: int, total: int
) -> Callable[[int], None] | None:
    """The others are about as far as this process."""
    return None if progress is None else lambda done: progress(min(count * done, total))


def _answer(record: dict[str, Any]) -> Generation:
    boxes = tuple(Box(**{**box, "xyxy": tuple(box["xyxy"])}) for box in record["boxes"])
    return Generation(**{**record, "boxes": boxes})
