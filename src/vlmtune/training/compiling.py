"""``training.compile``: the language model's layers compiled, each by itself.

By layers and not as a whole: they are alike, so one is compiled and all use it, and what differs
from pack to pack (the rows' bounds, which attention needs as numbers) stays outside.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from vlmtune.models import attention
from vlmtune.models.family import FamilyFacts
from vlmtune.models.quantize import within

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def compile_layers(
    model: PreTrainedModel, facts: FamilyFacts, backend: str = "inductor"
) -> list[nn.Module]:
    """Compile the language model's layers, in place, for packs of any length.

    Args:
        model: The model, adapters inside.
        facts: Its family's facts.
        backend: Of ``torch.compile``.

    Returns:
        The layers.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(attention.NAME, torch.compiler.disable(attention.attend))
    layers = [
        layer
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and within(name, facts.language_model)
        for layer in module
    ]
    for layer in layers:
        layer.compile(dynamic=True, backend=backend)
    return layers
