"""What a family of models must say about itself: mostly facts, and a few methods.

Nothing outside ``models/`` compares a family's name. A new family is one file with its facts and
methods, one line in ``models/families.py``, one test file.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from vlmtune.data.conversation import Box
from vlmtune.data.media import ImagePolicy, Size
from vlmtune.errors import ModelError

if TYPE_CHECKING:
    from PIL.Image import Image as Picture
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase
    from transformers.image_processing_utils import BaseImageProcessor


class Join(Enum):
    """How a vision tensor of several rows becomes one tensor of a batch."""

    CONCATENATE = "concatenate"  # along the first dimension, e.g. patches of all images
    STACK = "stack"  # along a new first dimension, padded to the largest


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a rendered turn: plain text, or a control token the family itself writes."""

    text: str
    control: bool = False


@dataclass(frozen=True, kw_only=True)
class FamilyFacts:
    """What is true of every model of a family.

    Attributes:
        name: The family's name in contracts.
        model_types: ``model_type`` values of ``config.json`` that belong to it.
        processor_class: Class that transformers' ``AutoProcessor`` expects in exported folders.
        vision_tower: Prefix of the vision tower's parameters (the projector may lie inside).
        projector: Prefixes of the parameters between vision tower and language model.
        language_model: Prefixes of the language model's parameters, its head included.
        image_token: The placeholder that the chat template writes for one image.
        end_of_turn: The control token that ends an answer; it is trained.
        lora_targets: Names of the linear layers of the language model that LoRA adapts by default.
        joins: How each vision tensor joins in a batch.
        packs: Whether several rows in one sequence are known to be independent.
    """

    name: str
    model_types: tuple[str, ...]
    processor_class: str
    vision_tower: str
    projector: tuple[str, ...]
    language_model: tuple[str, ...]
    image_token: str
    end_of_turn: str
    lora_targets: tuple[str, ...]
    joins: Mapping[str, Join] = field(default_factory=dict)
    packs: bool = False


@dataclass(frozen=True)
class Parts:
    """What a family reads from a model folder besides the weights."""

    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    image_processor: BaseImageProcessor
    template: str
    backend: str
    vision: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Tokens:
    """A row as token ids, known from image headers alone.

    Attributes:
        ids: Token ids, shape ``(tokens,)``, int64.
        labels: The id where a token is trained, -100 elsewhere; not shifted. Shape ``(tokens,)``.
        image_mask: True at image placeholders, shape ``(tokens,)``.
        image_sizes: Upright sizes of the row's images, in pixels.
    """

    ids: np.ndarray
    labels: np.ndarray
    image_mask: np.ndarray
    image_sizes: tuple[Size, ...]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def visual(self) -> int:
        """Number of image tokens."""
        return int(self.image_mask.sum())

    @property
    def trained(self) -> int:
        """Number of tokens with a label."""
        return int((self.labels != -100).sum())


class Family(ABC):
    """A family bound to the parts of one model."""

    facts: ClassVar[FamilyFacts]

    def __init__(self, parts: Parts) -> None:
        self.parts = parts

    @property
    def image_token_id(self) -> int:
        """Id of the image placeholder."""
        return self.token_id(self.facts.image_token)

    def token_id(self, token: str) -> int:
        """Id of a control token of the vocabulary.

        Raises:
            ModelError: If the tokenizer does not have it.
        """
        tokenizer = self.parts.tokenizer
        identifier = tokenizer.convert_tokens_to_ids(token)
        if not isinstance(identifier, int) or identifier == tokenizer.unk_token_id:
            raise ModelError(
                f"the tokenizer lacks the control token {token!r} of the family "
                f"{self.facts.name}; the folder is incomplete or of another family"
            )
        return identifier

    @staticmethod
    @abstractmethod
    def load_parts(folder: str, config: PreTrainedConfig, backend: str) -> Parts:
        """Read tokenizer, template and image processor from a model folder."""

    @abstractmethod
    def settle(self, policy: ImagePolicy) -> ImagePolicy:
        """The policy with everything that was left to the model filled in."""

    @abstractmethod
    def resized(self, size: Size, policy: ImagePolicy) -> Size:
        """Size in pixels at which the model sees an upright image of ``size`` pixels."""

    @abstractmethod
    def visual_tokens(self, size: Size, policy: ImagePolicy) -> int:
        """Image tokens that an upright image of ``size`` pixels becomes. Needs no pixels."""

    @abstractmethod
    def image_inputs(self, images: Sequence[Picture], policy: ImagePolicy) -> dict[str, Tensor]:
        """The vision tensors of upright RGB images, keyed as the model's forward names them."""

    @abstractmethod
    def pictures(self, vision: Mapping[str, Tensor]) -> list[np.ndarray]:
        """The pictures that vision tensors hold, one an image, shape ``(height, width, 3)``, uint8.

        The inverse of ``image_inputs`` after its resize: what the model really sees.
        """

    @abstractmethod
    def positions(self, tokens: Tokens, policy: ImagePolicy) -> Tensor:
        """Positions of one row alone, shape ``(rows, tokens)``, row 0 counting tokens from 0."""

    @abstractmethod
    def forward_inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        """A packed batch as keyword arguments of the model's forward."""

    @abstractmethod
    def generate_inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        """A left-padded batch as keyword arguments of the model's ``generate``."""

    @abstractmethod
    def render_box(self, box: Box, size: Size) -> list[Piece]:
        """A box in the family's own syntax; ``size`` is that of the box's upright image."""

    @abstractmethod
    def parse_boxes(self, text: str, sizes: Sequence[Size]) -> list[Box]:
        """Boxes in a model's raw answer, control tokens kept, in pixels of the upright image."""

    @abstractmethod
    def image_processor_config(self, policy: ImagePolicy) -> dict[str, Any]:
        """The image processor's configuration with the policy's limits, for exported folders."""

    def denormalised(self, values: Tensor) -> np.ndarray:
        """Normalised channels ``(3, height, width)`` as a picture ``(height, width, 3)``, uint8."""
        vision = self.parts.vision
        pixels = values.permute(1, 2, 0).to(torch.float64).numpy()
        if vision["do_normalize"]:
            pixels = pixels * np.array(vision["image_std"]) + np.array(vision["image_mean"])
        if vision["do_rescale"]:
            pixels = pixels / vision["rescale_factor"]
        return np.rint(pixels).clip(0, 255).astype(np.uint8)

    def join(self, name: str, tensors: Sequence[Tensor]) -> Tensor:
        """Join one vision tensor of several rows as the facts say."""
        if self.facts.joins[name] is Join.CONCATENATE:
            return torch.cat(list(tensors))
        shape = [max(tensor.shape[axis] for tensor in tensors) for axis in range(tensors[0].dim())]
        joined = tensors[0].new_zeros((len(tensors), *shape))
        for row, tensor in enumerate(tensors):
            corner = tuple(slice(0, length) for length in tensor.shape)
            joined[row][corner] = tensor
        return joined

    def join_vision(self, rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Vision tensors of a batch; rows without images have none."""
        seeing = [vision for vision in rows if vision]
        if not seeing:
            return {}
        return {name: self.join(name, [vision[name] for vision in seeing]) for name in seeing[0]}
