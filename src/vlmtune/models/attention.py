"""Attention of packed rows, row by row, through transformers' public interface.

The stock way to keep packed rows apart is a mask of all tokens against all tokens: its memory and
time grow with the square of the pack, most of it for pairs that are masked out. Here the mask is
the rows' bounds, and each row attends to itself alone. Everything that is not a pack of several
rows, padded batches and generation included, goes the stock way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

NAME = "vlmtune_rows"
# transformers gives bounds to those alone whose name has "flash" in it; to others image by image,
# asking the device how long each is in every block.
SEGMENTS = "vlmtune_flash_segments"
Attention = Callable[..., tuple[Tensor, None]]
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


def _precise_where_slow(attention: Attention) -> Attention:
    """An attention that is made in fp32 where torch would be slow; with a mask it stays."""

    @wraps(attention)
    def precise(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | Bounds | None,
        **arguments: Any,
    ) -> tuple[Tensor, None]:
        states = (query, key, value)
        if isinstance(attention_mask, Tensor) or not _is_slow(*states):
            return attention(module, *states, attention_mask, **arguments)
        with torch.autocast("cpu", enabled=False):
            wide = (state.float() for state in states)
            return attention(module, *wide, attention_mask, **arguments)[0].to(value.dtype), None

    return precise


@_precise_where_slow
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
    if _has_kernel(query, arguments):
        longest, scale = max(bounds.lengths), arguments.get("scaling")
        return _on_gpu((query, key, value), bounds.cumulative, longest, scale, causal=True), None
    return _one_by_one(module, (query, key, value), bounds.lengths, arguments), None


@_precise_where_slow
def attend_segments(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001
    **arguments: Any,
) -> tuple[Tensor, None]:
    """The attention function of a vision tower that lays images end to end.

    Args:
        module: The layer.
        query: ``(1, heads, patches, width)``.
        key: The same.
        value: The same.
        attention_mask: None: each image sees all of itself.
        **arguments: Among them ``cu_seq_lens_q``, the images' bounds on the device, and
            ``max_length_q``.

    Returns:
        The output, ``(1, patches, heads, width)``, and no weights.
    """
    bounds, longest = arguments.pop("cu_seq_lens_q"), arguments.pop("max_length_q")
    for name in ("cu_seq_lens_k", "max_length_k"):
        arguments.pop(name, None)
    states = (query, key, value)
    if _has_kernel(query, arguments):
        scale = arguments.get("scaling")
        return _on_gpu(states, bounds.to(torch.int32), longest, scale, causal=False), None
    return _one_by_one(module, states, bounds.diff().tolist(), arguments), None


def use_segments(tower: nn.Module) -> None:
    """Let a vision tower attend by its images' bounds, without a loop over images on a GPU."""
    from transformers import AttentionInterface, PreTrainedModel

    AttentionInterface.register(SEGMENTS, attend_segments)
    for module in tower.modules():
        if isinstance(module, PreTrainedModel):
            module.config._attn_implementation = SEGMENTS


def _has_kernel(query: Tensor, arguments: dict[str, Any]) -> bool:
    half = query.dtype in (torch.float16, torch.bfloat16)
    return query.is_cuda and half and not arguments.get("dropout")


def _one_by_one(
    module: nn.Module,
    states: tuple[Tensor, Tensor, Tensor],
    lengths: Sequence[int],
    arguments: dict[str, Any],
) -> Tensor:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    stock: Any = sdpa_attention_forward
    # Not by slices: the gradient of each would be as large as the whole pack.
    parts = zip(*(state.split(list(lengths), dim=2) for state in states), strict=True)
    return torch.cat([stock(module, *part, None, **arguments)[0] for part in parts], dim=1)


def _is_slow(*states: Tensor) -> bool:
    """Whether torch's backward would be slow: in bf16 on a CPU it takes five times fp32's.

    Under autocast one bf16 state is enough: rotated queries and keys come in fp32.
    """
    return (
        states[0].device.type == "cpu"
        and any(state.dtype is torch.bfloat16 for state in states)
        and any(state.requires_grad for state in states)
    )


def _on_gpu(
    states: tuple[Tensor, Tensor, Tensor],
    cumulative: Tensor,
    longest: int,
    scale: float | None,
    *,
    causal: bool,
) -> Tensor:
    """All rows in one kernel, torch's own for sequences of different lengths."""
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = (state[0].transpose(0, 1) for state in states)  # (tokens, heads, width)
    output: Any = varlen_attn(
        query,
        key,
        value,
        cumulative,
        cumulative,
        longest,
        longest,
        scale=scale,
        window_size=(-1, 0) if causal else (-1, -1),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return torch.as_tensor(output).unsqueeze(0)


def _within_window(lengths: Sequence[int], config: Any) -> bool:
    """Whether no row is longer than a sliding window, where layers have one."""
    window = config.to_dict().get("sliding_window")
    return window is None or max(lengths) <= window
