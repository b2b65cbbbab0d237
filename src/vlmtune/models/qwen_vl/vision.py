"""The vision tower: a vision transformer, and the resampler that makes 256 tokens of an image.

Parameter names and the order of everything are the original's.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.output_capturing import capture_outputs

from vlmtune.models.qwen_vl.attention import Attention
from vlmtune.models.qwen_vl.configuration import QwenVLVisionConfig
from vlmtune.models.qwen_vl.pretrained import QwenVLPreTrainedModel

EPSILON = 1e-6
POSITIONS = 256  # the transformer's positions are a grid of 16 x 16, whatever the image
RESAMPLER_HEAD = 128


class QwenVLVisionAttention(Attention):
    """Self-attention of the patches.

    The input projection is laid out by heads: a head's query, key and value stand side by side,
    then the next head's.
    """

    def __init__(self, config: QwenVLVisionConfig) -> None:
        super().__init__(config, config.width // config.heads, is_causal=False)
        self.in_proj = nn.Linear(config.width, 3 * config.width)
        self.out_proj = nn.Linear(config.width, config.width)

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor | None]:
        """States ``(images, patches, width)``."""
        by_head = self.in_proj(states).unflatten(-1, (-1, 3 * self.head_width)).transpose(1, 2)
        seen, weights = self.attend(*by_head.chunk(3, dim=-1))
        return self.out_proj(seen), weights


class QwenVLVisionMLP(nn.Module):
    """Feed-forward layer with the exact GELU, not its approximation by tanh."""

    def __init__(self, config: QwenVLVisionConfig) -> None:
        super().__init__()
        inner = int(config.width * config.mlp_ratio)
        self.c_fc = nn.Linear(config.width, inner)
        self.c_proj = nn.Linear(inner, config.width)

    def forward(self, states: Tensor) -> Tensor:
        """Each patch for itself."""
        return self.c_proj(nn.functional.gelu(self.c_fc(states)))


class QwenVLVisionBlock(GradientCheckpointingLayer):
    """One layer of the vision transformer."""

    def __init__(self, config: QwenVLVisionConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.width, eps=EPSILON)
        self.ln_2 = nn.LayerNorm(config.width, eps=EPSILON)
        self.attn = QwenVLVisionAttention(config)
        self.mlp = QwenVLVisionMLP(config)

    def forward(self, states: Tensor) -> Tensor:
        """States ``(images, patches, width)`` in and out."""
        seen, _ = self.attn(self.ln_1(states))
        states = states + seen
        return states + self.mlp(self.ln_2(states))


class QwenVLVisionEncoder(nn.Module):
    """The blocks of the vision transformer."""

    def __init__(self, config: QwenVLVisionConfig) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(QwenVLVisionBlock(config) for _ in range(config.layers))

    def forward(self, states: Tensor) -> Tensor:
        """States ``(images, patches, width)`` in and out."""
        for block in self.resblocks:
            states = block(states)
        return states


class CrossAttention(Attention):
    """Attention of queries over keys, under the parameter names of ``nn.MultiheadAttention``."""

    def __init__(self, config: PreTrainedConfig, width: int) -> None:
        heads = max(width // RESAMPLER_HEAD, 1)
        super().__init__(config, width // heads, is_causal=False)
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """``(images, queries, width)`` from keys and values ``(images, patches, width)``."""
        weights = self.in_proj_weight.chunk(3)
        biases = self.in_proj_bias.chunk(3)
        projected = (
            nn.functional.linear(states, weight, bias)
            .unflatten(-1, (-1, self.head_width))
            .transpose(1, 2)
            for states, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )
        seen, _ = self.attend(*projected)
        return self.out_proj(seen)


class QwenVLResampler(nn.Module):
    """A fixed number of learnt queries reads the patches; positions are those of a plane."""

    def __init__(self, config: QwenVLVisionConfig) -> None:
        super().__init__()
        width = config.output_dim
        # Made by a formula, and yet a parameter of the checkpoints; trained with the resampler.
        self.pos_embed = nn.Parameter(torch.empty(config.n_queries, width), requires_grad=False)
        self.query = nn.Parameter(torch.empty(config.n_queries, width))
        self.kv_proj: nn.Module = nn.Identity()
        if config.width != width:
            self.kv_proj = nn.Linear(config.width, width, bias=False)
        self.attn = CrossAttention(config, width)
        self.ln_q = nn.LayerNorm(width, eps=EPSILON)
        self.ln_kv = nn.LayerNorm(width, eps=EPSILON)

    def forward(self, patches: Tensor) -> Tensor:
        """``(images, queries, output_dim)`` from patches ``(images, patches, width)``."""
        value = self.ln_kv(self.kv_proj(patches))
        query = (self.ln_q(self.query) + self.pos_embed).expand(len(patches), -1, -1)
        key = value + resized_grid(self.pos_embed, patches.shape[1])
        return self.attn(query, key, value)


class QwenVLVisionModel(QwenVLPreTrainedModel):
    """Images to the tokens that the language model reads."""

    config: QwenVLVisionConfig  # type: ignore[assignment]
    config_class = QwenVLVisionConfig  # type: ignore[assignment]
    base_model_prefix = "visual"
    main_input_name = "pixel_values"
    input_modalities = ["image"]  # noqa: RUF012
    _input_embed_layer = "conv1"
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": QwenVLVisionBlock,
        "attentions": QwenVLVisionAttention,
    }

    def __init__(self, config: QwenVLVisionConfig) -> None:
        super().__init__(config)
        self.positional_embedding = nn.Parameter(torch.empty(POSITIONS, config.width))
        self.proj = nn.Parameter(torch.empty(config.output_dim, config.output_dim))
        side = config.patch_size
        self.conv1 = nn.Conv2d(3, config.width, kernel_size=side, stride=side, bias=False)
        self.ln_pre = nn.LayerNorm(config.width, eps=EPSILON)
        self.transformer = QwenVLVisionEncoder(config)
        self.attn_pool = QwenVLResampler(config)
        self.ln_post = nn.LayerNorm(config.output_dim, eps=EPSILON)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, CrossAttention):
            init.trunc_normal_(module.in_proj_weight, std=std)
            init.zeros_(module.in_proj_bias)
        elif isinstance(module, QwenVLResampler):
            init.copy_(module.pos_embed, plane_positions(*module.pos_embed.shape))
            init.trunc_normal_(module.query, std=std)
        elif isinstance(module, QwenVLVisionModel):
            init.normal_(module.positional_embedding, std=self.config.width**-0.5)
            init.normal_(module.proj, std=self.config.output_dim**-0.5)

    @capture_outputs  # type: ignore[untyped-decorator]
    def forward(
        self,
        pixel_values: Tensor,
        **options: Any,  # noqa: ARG002  # read by the decorator
    ) -> BaseModelOutputWithPooling:
        """Encode images.

        Args:
            pixel_values: Normalised images, shape ``(images, 3, side, side)``.
            options: ``output_hidden_states`` and the like.

        Returns:
            ``pooler_output``, the tokens ``(images, n_queries, output_dim)``, and
            ``last_hidden_state``, the patches ``(images, patches, width)`` that they were read of.

        Raises:
            ValueError: If the images are not square, or not whole patches.
        """
        side = self.config.patch_size
        if pixel_values.dim() != 4 or pixel_values.shape[2] != pixel_values.shape[3]:
            raise ValueError(
                f"pixel_values: found the shape {tuple(pixel_values.shape)}, expected (images, 3, "
                "side, side): Qwen-VL sees square images"
            )
        if pixel_values.shape[3] % side:
            raise ValueError(
                f"pixel_values: found a side of {pixel_values.shape[3]} pixels, expected a "
                f"multiple of {side}"
            )
        patches = self.conv1(pixel_values.to(self.conv1.weight.dtype)).flatten(2).transpose(1, 2)
        patches = patches + resized_grid(self.positional_embedding, patches.shape[1])
        states = self.transformer(self.ln_pre(patches))
        tokens = self.ln_post(self.attn_pool(states)) @ self.proj
        return BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=tokens)


def resized_grid(positions: Tensor, places: int) -> Tensor:
    """Positions of a square grid ``(places, width)``, interpolated to another square grid.

    Args:
        positions: One row a place, row by row of the grid.
        places: How many places the new grid has.
    """
    if len(positions) == places:
        return positions
    side, wanted = math.isqrt(len(positions)), math.isqrt(places)
    plane = positions.to(torch.float32).reshape(1, side, side, -1).permute(0, 3, 1, 2)
    resized = nn.functional.interpolate(
        plane, size=(wanted, wanted), mode="bicubic", align_corners=False
    )
    return resized.permute(0, 2, 3, 1).flatten(0, 2).to(positions.dtype)


def plane_positions(places: int, width: int) -> Tensor:
    """Sines and cosines of a square grid's columns (first half) and rows, ``(places, width)``."""
    side = math.isqrt(places)
    exponents = torch.arange(width // 4, dtype=torch.float64) / (width / 4)
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    halves = []
    for axis in (column, row):
        angles = axis.reshape(-1, 1) * 10000.0**-exponents
        halves += [angles.sin(), angles.cos()]
    return torch.cat(halves, dim=1).to(torch.float32)
