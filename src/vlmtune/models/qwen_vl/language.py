"""The language model's layers, under the original's parameter names."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from vlmtune.models.qwen_vl.attention import Attention
from vlmtune.models.qwen_vl.configuration import QwenVLConfig
from vlmtune.models.qwen_vl.rotary import rotate


class QwenVLRMSNorm(nn.Module):
    """Root-mean-square norm: in float32, cast back, and only then multiplied by the weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, states: Tensor) -> Tensor:
        """Normalise the last dimension."""
        full = states.to(torch.float32)
        normal = full * torch.rsqrt(full.pow(2).mean(-1, keepdim=True) + self.eps)
        return normal.to(states.dtype) * self.weight


class QwenVLAttention(Attention):
    """Causal self-attention; queries, keys and values come from one layer, in three blocks."""

    def __init__(self, config: QwenVLConfig, layer: int) -> None:
        super().__init__(config, config.kv_channels, is_causal=True)
        self.layer_idx = layer
        self.dropout = config.attn_dropout_prob
        self.c_attn = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=True)
        self.c_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=not config.no_bias)

    def forward(
        self,
        states: Tensor,
        *,
        angles: tuple[Tensor, Tensor],
        query_scale: Tensor | None,
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend over this row's tokens and those in the cache.

        Args:
            states: Shape ``(rows, tokens, width)``.
            angles: Cosine and sine of the tokens, each ``(rows, 1, tokens, head width)``.
            query_scale: The factor of logn attention, ``(rows, 1, tokens, 1)``, or None.
            attention_mask: As the attention implementation wants it.
            past_key_values: Keys and values seen before; grows by these tokens.
            options: Handed to the attention implementation.
        """
        heads = (*states.shape[:-1], -1, self.head_width)
        query, key, value = (
            part.view(heads).transpose(1, 2) for part in self.c_attn(states).chunk(3, dim=-1)
        )
        query, key = rotate(query, angles), rotate(key, angles)
        if query_scale is not None:
            query = query * query_scale.to(query.dtype)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        seen, weights = self.attend(
            query, key, value, mask=attention_mask, dropout=self.dropout, **options
        )
        return self.c_proj(seen), weights


class QwenVLMLP(nn.Module):
    """Gated feed-forward layer; the gate is ``w2``."""

    def __init__(self, config: QwenVLConfig) -> None:
        super().__init__()
        inner = config.intermediate_size // 2
        self.w1 = nn.Linear(config.hidden_size, inner, bias=not config.no_bias)
        self.w2 = nn.Linear(config.hidden_size, inner, bias=not config.no_bias)
        self.c_proj = nn.Linear(inner, config.hidden_size, bias=not config.no_bias)

    def forward(self, states: Tensor) -> Tensor:
        """Each token for itself."""
        return self.c_proj(self.w1(states) * nn.functional.silu(self.w2(states)))


class QwenVLBlock(GradientCheckpointingLayer):
    """One layer: attention and feed-forward, each behind a norm and beside a residual."""

    def __init__(self, config: QwenVLConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = QwenVLRMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.attn = QwenVLAttention(config, layer)
        self.ln_2 = QwenVLRMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mlp = QwenVLMLP(config)

    def forward(self, states: Tensor, **options: Any) -> Tensor:
        """States in and out, shape ``(rows, tokens, width)``; the rest goes to the attention."""
        seen, _ = self.attn(self.ln_1(states), **options)
        states = states + seen
        return states + self.mlp(self.ln_2(states))
