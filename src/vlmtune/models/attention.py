"""Attention of packed rows, row by row, through transformers' public interface.

The stock way to keep packed rows apart is a mask of all tokens against all tokens: its memory and
time grow with the square of the pack, most of it for pairs that are masked out. Here the mask is
the rows' bounds, and each row attends to itself alone. Everything that is not a pack of several
rows, padded batches and generation included, goes the stock way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

NAME = "vlmtune_rows"
LENGTHS: ContextVar[tuple[int, ...] | None] = ContextVar("lengths", default=None)


@dataclass(frozen=True)
class Bounds:
    """What stands in the place of a mask: where each row of a pack begins and ends.

    Attributes:
        lengths: Tokens of each row.
        cumulative: Their running sum, from 0, on the device, int32.
    """

    lengths: tuple[int, ...]
    cumulative: Tensor


@contextmanager
def packed_rows(lengths: Sequence[int]) -> Iterator[None]:
    """Say how long the rows are that the forward inside is given as one sequence."""
    token = LENGTHS.set(tuple(lengths))
    try:
        yield
    finally:
        LENGTHS.reset(token)


def register() -> str:
    """Make the attention known to transformers; calling it again is harmless.

    Returns:
        The name to load a model with.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, rows_or_mask)
    return NAME


def rows_or_mask(**arguments: Any) -> Any:
    """The mask function of transformers: the bounds of packed rows, or the mask that sdpa takes.

    A pack is known by three signs: transformers found positions that begin anew and may not skip
    the mask, the forward was told the rows' lengths, and they add up to what it was given.
    """
    from transformers.masking_utils import sdpa_mask

    lengths = LENGTHS.get()
    packed = (
        lengths is not None
        and len(lengths) > 1
        and arguments.get("attention_mask") is None
        and arguments.get("allow_is_causal_skip") is False
        and not arguments.get("use_vmap")  # a mask of the model's own besides
        and arguments["batch_size"] == 1
        and arguments["q_length"] == arguments["kv_length"] == sum(lengths)
    )
    if not packed or lengths is None or not _within_window(lengths, arguments["config"]):
        return sdpa_mask(**arguments)
    cumulative = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return Bounds(lengths, cumulative.to(arguments["device"]))


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | Bounds | None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """The attention function of transformers; shapes ``(batch, heads, tokens, width)``.

    Returns:
        The output, ``(batch, tokens, heads, width)``, and no weights.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    stock: Any = sdpa_attention_forward
    if not isinstance(attention_mask, Bounds):
        output: Tensor = stock(module, query, key, value, attention_mask, **arguments)[0]
        return output, None
    bounds = attention_mask
    half = query.dtype in (torch.float16, torch.bfloat16)
    if query.is_cuda and half and not arguments.get("dropout"):
        return _on_gpu(query, key, value, bounds, arguments.get("scaling")), None
    rows = [
        stock(
            module,
            query[:, :, start:stop],
            key[:, :, start:stop],
            value[:, :, start:stop],
            None,
            **arguments,
        )[0]
        for start, stop in pairwise((0, *accumulate(bounds.lengths)))
    ]
    return torch.cat(rows, dim=1), None


def _on_gpu(
    query: Tensor, key: Tensor, value: Tensor, bounds: Bounds, scale: float | None
) -> Tensor:
    """All rows in one kernel, torch's own for sequences of different lengths."""
    from torch.nn.attention.varlen import varlen_attn

    longest = max(bounds.lengths)
    output: Any = varlen_attn(
        query[0].transpose(0, 1),  # (tokens, heads, width)
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        bounds.cumulative,
        bounds.cumulative,
        longest,
        longest,
        scale=scale,
        window_size=(-1, 0),  # causal
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return torch.as_tensor(output).unsqueeze(0)


def _within_window(lengths: Sequence[int], config: Any) -> bool:
    """Whether no row is longer than a sliding window, where layers have one."""
    window = config.to_dict().get("sliding_window")
    return window is None or max(lengths) <= window
