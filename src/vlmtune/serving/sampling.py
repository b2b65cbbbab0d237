"""Choosing the next token of each row, whatever its neighbours want."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Wish:
    """How one row's next token is chosen.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_p: Draw only from the likeliest tokens that together have this probability.
        generator: The row's own source of chance, on the CPU; unused at temperature 0.
        top_logprobs: Likeliest tokens told beside the chosen one; None tells no probabilities.
    """

    temperature: float
    top_p: float
    generator: torch.Generator
    top_logprobs: int | None = None


@dataclass(frozen=True)
class Pick:
    """A chosen token.

    Attributes:
        token: Its id.
        logprob: Natural logarithm of the probability that the model itself gave it, whatever the
            temperature; 0 where it was not asked for.
        top: Ids and log-probabilities of the likeliest tokens, best first.
    """

    token: int
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()


def generator(seed: int, choice: int) -> torch.Generator:
    """The source of chance of one of the ``n`` answers to a question."""
    return torch.Generator().manual_seed((seed * 1_000_003 + choice) % 2**63)


@torch.no_grad()
def choose(logits: Tensor, wishes: Sequence[Wish]) -> list[Pick | None]:
    """The next token of each row.

    Args:
        logits: ``(rows, vocabulary)``.
        wishes: One a row.

    Returns:
        One a row; None where the model's logits are no numbers.
    """
    tokens = logits.argmax(dim=-1)
    drawn = [row for row, wish in enumerate(wishes) if wish.temperature > 0]
    if drawn:
        tokens[drawn] = _draw(logits[drawn], [wishes[row] for row in drawn])
    told = [row for row, wish in enumerate(wishes) if wish.top_logprobs is not None]
    probabilities = dict(zip(told, _tell(logits, tokens, wishes, told), strict=True))
    # One transfer from the device for both; a NaN anywhere in a row is its maximum.
    sound = logits.amax(dim=-1).isfinite()
    found = torch.stack([tokens, sound.to(tokens.dtype)]).tolist()
    return [
        Pick(token, *probabilities.get(row, (0.0, ()))) if fine else None
        for row, (token, fine) in enumerate(zip(*found, strict=True))
    ]


def _draw(logits: Tensor, wishes: Sequence[Wish]) -> Tensor:
    """One token a row, by the inverse of the distribution at one random number.

    In the order of the vocabulary, not of the probabilities: logits differ in their last bits with
    the size of the batch, and two tokens that are about equally likely would change places.
    """
    # (rows, 1) each; float64, where temperatures near 0 neither overflow nor round a step away
    temperature = logits.new_tensor([wish.temperature for wish in wishes], dtype=torch.float64)
    top_p = logits.new_tensor([wish.top_p for wish in wishes], dtype=torch.float64)
    chance = [torch.rand(1, generator=wish.generator, dtype=torch.float64) for wish in wishes]
    scaled = logits.double() - logits.amax(dim=-1, keepdim=True).double()
    probability = (scaled / temperature[:, None]).softmax(dim=-1)
    if any(wish.top_p < 1 for wish in wishes):
        probability = _nucleus(probability, top_p[:, None])
    reached = probability.cumsum(dim=-1)
    aim = torch.stack(chance).to(logits.device) * reached[:, -1:]
    # The first token beyond the aim: one without probability is never beyond what stands before it.
    return torch.searchsorted(reached, aim, right=True).clamp(max=logits.shape[-1] - 1).squeeze(-1)


def _nucleus(probability: Tensor, top_p: Tensor) -> Tensor:
    """Zero all but the likeliest tokens that together reach ``top_p`` (Holtzman et al. 2020)."""
    ordered, order = probability.sort(dim=-1, descending=True)
    before = ordered.cumsum(dim=-1) - ordered
    kept = torch.where(before < top_p, ordered, torch.zeros_like(ordered))
    return torch.zeros_like(probability).scatter(-1, order, kept)


def _tell(
    logits: Tensor, tokens: Tensor, wishes: Sequence[Wish], rows: Sequence[int]
) -> list[tuple[float, tuple[tuple[int, float], ...]]]:
    """Log-probabilities of the chosen tokens and of the likeliest ones, of some rows."""
    if not rows:
        return []
    logprobs = logits[list(rows)].float().log_softmax(dim=-1)
    chosen = logprobs.gather(-1, tokens[list(rows)][:, None]).squeeze(-1).tolist()
    most = max(wishes[row].top_logprobs or 0 for row in rows)
    values, ids = logprobs.topk(most, dim=-1)
    told = []
    for place, row in enumerate(rows):
        count = wishes[row].top_logprobs or 0
        best = zip(ids[place, :count].tolist(), values[place, :count].tolist(), strict=True)
        told.append((float(chosen[place]), tuple(best)))
    return told
