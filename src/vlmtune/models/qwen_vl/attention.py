"""Attention through transformers' interface, so that any implementation it knows can be chosen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


class Attention(nn.Module):
    """What attention layers share: whose configuration chooses the implementation, and the scale.

    Args:
        config: Names the implementation.
        head_width: Width of a head.
        is_causal: Whether a place sees only those before it, where no mask says otherwise.
    """

    def __init__(self, config: PreTrainedConfig, head_width: int, *, is_causal: bool) -> None:
        super().__init__()
        self.config = config
        self.head_width = head_width
        self.is_causal = is_causal

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        mask: Tensor | None = None,
        dropout: float = 0.0,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of ``(rows, heads, tokens, head_width)``.

        Returns:
            What was seen, ``(rows, tokens, heads * head_width)``, and the weights, where the
            implementation has them.
        """
        implementation: Any = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation or "eager", eager_attention
        )
        seen, weights = implementation(
            self,
            query,
            key,
            value,
            mask,
            dropout=dropout if self.training else 0.0,
            scaling=self.head_width**-0.5,
            **options,
        )
        return seen.flatten(2), weights


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **options: Any,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    """Attention written out, with its weights; the softmax is in the dtype of the scores."""
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = torch.softmax(scores, dim=-1)
    dropped = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (dropped @ value).transpose(1, 2).contiguous(), weights
