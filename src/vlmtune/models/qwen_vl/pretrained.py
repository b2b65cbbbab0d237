"""What every part of Qwen-VL has in common as a model of transformers."""

from __future__ import annotations

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_utils import PreTrainedModel

from vlmtune.models.qwen_vl.configuration import QwenVLConfig
from vlmtune.models.qwen_vl.language import QwenVLBlock


class QwenVLPreTrainedModel(PreTrainedModel):
    """Configuration, fresh weights, and what the network can do."""

    config: QwenVLConfig
    config_class = QwenVLConfig
    base_model_prefix = "transformer"
    input_modalities = ["image", "text"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    _no_split_modules = ["QwenVLBlock", "QwenVLVisionBlock", "QwenVLResampler"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, QwenVLBlock):
            # The residual stream of a fresh model grows with its depth otherwise.
            std = self.config.initializer_range / (2 * self.config.num_hidden_layers) ** 0.5
            for projection in (module.attn.c_proj, module.mlp.c_proj):
                init.normal_(projection.weight, std=std)
