"""Stop sequences: ids that end an answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.generation.logits_process import LogitsProcessor


class StopSequences(LogitsProcessor):
    """End an answer as soon as it ends in one of these sequences.

    The sequence stays in the answer and the end of sequence follows it, as in the original. Only
    what was generated counts: a prompt may end in a stop sequence.

    Args:
        sequences: Token ids, one list a sequence.
        end: Id of the end of sequence.
        prompt_length: Tokens before the answer.
    """

    def __init__(self, sequences: Sequence[Sequence[int]], end: int, prompt_length: int) -> None:
        self._sequences = [list(ids) for ids in sequences if ids]
        self._end = end
        self._prompt_length = prompt_length

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> Any:
        """Scores ``(rows, vocabulary)`` in which a finished row can only end."""
        answers = input_ids[:, self._prompt_length :]
        finished = torch.zeros(len(answers), dtype=torch.bool, device=scores.device)
        for ids in self._sequences:
            if answers.shape[1] >= len(ids):
                tail = answers[:, -len(ids) :]
                finished |= (tail == torch.tensor(ids, device=tail.device)).all(dim=1)
        only_end = torch.full_like(scores, -torch.inf)
        only_end[:, self._end] = 0.0
        return torch.where(finished.unsqueeze(1), only_end, scores)


def end_of_sequence(end: int | Sequence[int] | None) -> int:
    """The end of sequence that follows a stop sequence: the first, where there are several.

    Raises:
        ValueError: If there is none; without it a stop sequence cannot stop.
    """
    first = end[0] if isinstance(end, Sequence) else end
    if first is None:
        raise ValueError(
            "stop_words_ids: there is no end of sequence to stop with; pass eos_token_id, or set "
            "it in the generation configuration"
        )
    return first
