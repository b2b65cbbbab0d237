"""Rotary positions, dynamic NTK and logn attention of Qwen-VL, as pure functions.

Rotary embedding: Su et al., arXiv 2104.09864, in the form that turns the halves of a head. Dynamic
NTK stretches the base of prompts longer than ``seq_length``; logn attention sharpens the queries
behind it. Both are for evaluation alone: the model was trained without.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LEVELS = 17  # prompts up to 65,536 times the length trained on


def ntk_alpha(level: int) -> int:
    """Factor of the rotary base: ``2 ** (level + 1) - 1``.

    Level 0 is a prompt of at most ``seq_length`` tokens (factor 1), level 1 one of at most twice
    that (3), level 2 of at most four times (7). The original writes ``max(2 ** ceil(log2(length /
    seq_length) + 1) - 1, 1)``.
    """
    return 2 ** (level + 1) - 1


def ntk_levels(position_ids: Tensor, seq_length: int) -> Tensor:
    """The NTK level of each token, by the length of the sequence it belongs to.

    Sequences packed into one row are told apart as attention tells them apart: where a position
    does not follow the one before it, a sequence begins.

    Args:
        position_ids: Positions, shape ``(rows, tokens)``.
        seq_length: Length trained on.

    Returns:
        Levels, shape ``(rows, tokens)``, int64.
    """
    previous = position_ids[:, :1] - 1
    sequence = (position_ids.diff(dim=1, prepend=previous) != 1).cumsum(dim=1)
    last = torch.zeros_like(position_ids).scatter_reduce(1, sequence, position_ids, "amax")
    lengths = last.gather(1, sequence) + 1
    # Whole numbers, not log2: a float error at a power of two would be a whole level.
    bounds = seq_length * 2 ** torch.arange(LEVELS - 1, device=position_ids.device)
    return torch.bucketize(lengths, bounds)


def inverse_frequencies(width: int, base: float, levels: int, device: torch.device) -> Tensor:
    """Rotary frequencies of NTK levels ``0 … levels - 1``, shape ``(levels, width / 2)``, float32.

    Args:
        width: Width of a head.
        base: Rotary base without stretching.
        levels: How many rows.
        device: Where to.
    """
    bases = [base * ntk_alpha(level) ** (width / (width - 2)) for level in range(levels)]
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device=device) / width
    return 1.0 / torch.tensor(bases, device=device).unsqueeze(1) ** exponents


def rotary_angles(position_ids: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every token, each ``(rows, 1, tokens, width)``, float32.

    Args:
        position_ids: Positions, shape ``(rows, tokens)``.
        frequencies: Of each token, or of all of a row: ``(rows or 1, tokens or 1, width / 2)``.
    """
    angles = position_ids.unsqueeze(-1).to(torch.float32) * frequencies
    whole = torch.cat((angles, angles), dim=-1).unsqueeze(1)
    return whole.cos(), whole.sin()


def rotate(states: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Turn queries or keys ``(rows, heads, tokens, width)`` by their angles, in float32."""
    cosine, sine = angles
    full = states.to(torch.float32)
    first, second = full.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (full * cosine + turned * sine).to(states.dtype)


def logn_scale(position_ids: Tensor, seq_length: int) -> Tensor:
    """Factor of every query, shape ``(rows, 1, tokens, 1)``, float32.

    ``log(place) / log(seq_length)`` behind ``seq_length``, else 1; places count from 1.
    """
    places = (position_ids + 1).to(torch.float32)
    scale = torch.where(places > seq_length, places.log() / math.log(seq_length), 1.0)
    return scale[:, None, :, None]
