"""Image features: what the vision tower and the projector make of images, once and for all.

The forward of stock models takes them in the place of pixels (``mm_encoder_outputs``), so that a
frozen tower need not see the same image twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from vlmtune.models.quantize import within

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from vlmtune.models.family import Family, FamilyFacts

FEATURES = "image_features"  # the tensor of a row in the place of its pixels, (tokens, width)
LEVEL = "image_features_of_level_"  # and those that inner layers add, by number

FeatureForm = Literal["list", "tensor"]


@torch.no_grad()
def image_features(
    model: PreTrainedModel, family: Family, vision: Mapping[str, Tensor], tokens: Sequence[int]
) -> list[dict[str, Tensor]]:
    """Run the vision tower and the projector on images.

    Args:
        model: The model, on its device.
        family: Its family.
        vision: The images' vision tensors, joined as in a batch.
        tokens: Visual tokens of each image, in order.

    Returns:
        For each image what stands for it in a row: ``(tokens, width)`` under ``FEATURES``, and one
        more a level where the language model takes features of inner layers too.

    Raises:
        ValueError: If the model makes other than ``tokens`` features.
    """
    seen = {name: tensor.to(model.device) for name, tensor in vision.items()}
    mask = torch.ones((1, sum(tokens)), dtype=torch.bool, device=model.device)
    arguments = family.vision_arguments({**seen, "image_mask": mask})
    given = {name: arguments[name] for name in family.facts.joins if name in arguments}
    stock: Any = model
    output = stock.get_image_features(**given)
    made = {FEATURES: _flat(output["pooler_output"])}
    for number, level in enumerate(output.get("deepstack_features") or ()):
        made[f"{LEVEL}{number}"] = _flat(level)
    if len(made[FEATURES]) != sum(tokens):
        raise ValueError(f"{len(made[FEATURES])} features of images of {sum(tokens)} tokens")
    parts = {name: tensor.split(list(tokens)) for name, tensor in made.items()}
    return [
        # A copy: a view would keep the features of all images of the call in memory.
        {name: parts[name][index].clone() for name in made}
        for index in range(len(tokens))
    ]


def feature_output(batch: Mapping[str, Tensor], form: FeatureForm | None) -> Any:
    """The features of a batch as ``get_image_features`` would have returned them.

    Args:
        batch: Holds ``FEATURES``, the images' features one after the other.
        form: Whether the model's class expects a list or one tensor.
    """
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    features: Any = batch[FEATURES]
    features = [features] if form == "list" else features
    return BaseModelOutputWithPooling(pooler_output=features)


def feature_levels(batch: Mapping[str, Tensor]) -> list[Tensor]:
    """The features that inner layers of the tower add, by level."""
    count = sum(name.startswith(LEVEL) for name in batch)
    return [batch[f"{LEVEL}{number}"] for number in range(count)]


def vision_digest(model: nn.Module, facts: FamilyFacts) -> str:
    """A hash of every weight that features depend on, as it is in memory; reads them all."""
    digest = hashlib.sha256()
    parts = (facts.vision_tower, *facts.projector)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if within(name, parts):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            plain = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
            content: Any = plain.numpy()
            digest.update(content)
    return digest.hexdigest()


def _flat(found: Tensor | Sequence[Tensor]) -> Tensor:
    """``(tokens, width)`` of all images, however the class divides them."""
    tensors = [found] if isinstance(found, Tensor) else list(found)
    return torch.cat([tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors])
