"""What a family of models must say about itself: mostly facts, and a few methods.

Nothing outside ``models/`` compares a family's name. A new family is one file with its facts and
methods, one line in ``models/families.py``, one test file.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from vlmtune.data.boxes import to_grid
from vlmtune.data.conversation import Box
from vlmtune.data.media import ImagePolicy, Size
from vlmtune.errors import ModelError, UsageError
from vlmtune.models import box_syntax
from vlmtune.models.features import FEATURES, FeatureForm, feature_output
from vlmtune.models.folder import (
    image_processor_type,
    load_image_processor,
    load_template,
    load_tokenizer,
    processor_settings,
)

if TYPE_CHECKING:
    from PIL.Image import Image as Picture
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase
    from transformers.image_processing_utils import BaseImageProcessor


SIZE_OPTIONS = frozenset({"max_pixels", "min_pixels", "size", "longest_edge", "split", "max_tiles"})
BOX_GRID = 1000  # of families without a syntax of their own: integers 0 … 999 of width and height


class Join(Enum):
    """How a vision tensor of several rows becomes one tensor of a batch."""

    CONCATENATE = "concatenate"  # along the first dimension, e.g. patches of all images
    PAD = "pad"  # the same, the other dimensions padded with zeros to the largest


@dataclass(frozen=True, slots=True)
class Piece:
    """What a family itself writes: plain text, or a control token, ``count`` times."""

    text: str
    control: bool = False
    count: int = 1


@dataclass(frozen=True, kw_only=True)
class FamilyFacts:
    """What is true of every model of a family.

    Attributes:
        name: The family's name in contracts.
        model_types: ``model_type`` values of ``config.json`` that belong to it.
        processor_class: Class that transformers' ``AutoProcessor`` expects in exported folders.
        image_processor: Class of the image processor on torchvision, where the folder names none;
            with ``Pil`` behind it, the one on Pillow.
        former_image_processors: What old folders call that class.
        vision_tower: Prefix of the vision tower's parameters (the projector may lie inside).
        projector: Prefixes of the parameters between vision tower and language model.
        language_model: Prefixes of the language model's parameters, its head included.
        image_token: The token that stands for one visual token.
        image_place: What the chat template writes for a whole image, where that is another token.
        end_of_turn: The control token with which the template ends an answer; it is trained. None
            takes what the template writes, or the tokenizer's end of text where it writes nothing.
        further_ends: Control tokens that end an answer too, where a model writes them in it.
        labels_once: Whether one label stands before all the boxes that follow each other under it.
        collapses: A control token of which the processor makes one where two meet, or None.
        lora_targets: Names of the linear layers of the language model that LoRA adapts by default.
        image_options: Options of the recipe's ``image`` section that decide this family's sizes.
        joins: How each vision tensor joins in a batch; the rest of a processor's output is dropped.
        packs: Whether several rows in one sequence are known to be independent.
        segments: Whether the vision tower lays all images end to end, and hands their bounds to
            attention functions that transformers takes for flash attention.
        batches: Whether the model's own ``generate`` is known to answer questions side by side as
            it answers each alone.
        decodes: Whether ``Decoding`` is known to say what the model's own ``generate`` says.
        features: How the forward takes features made before, in the place of pixels: as a list or
            one tensor; None: it is not known to take them.
    """

    name: str
    model_types: tuple[str, ...]
    processor_class: str
    image_processor: str
    former_image_processors: tuple[str, ...] = ()
    vision_tower: str
    projector: tuple[str, ...]
    language_model: tuple[str, ...]
    image_token: str
    image_place: str | None = None
    end_of_turn: str | None = None
    further_ends: tuple[str, ...] = ()
    labels_once: bool = False
    collapses: str | None = None
    lora_targets: tuple[str, ...]
    image_options: frozenset[str] = frozenset()
    joins: Mapping[str, Join] = field(default_factory=dict)
    packs: bool = False
    segments: bool = False
    batches: bool = True
    decodes: bool = True
    features: FeatureForm | None = None


@dataclass(frozen=True)
class Parts:
    """What a family reads from a model folder besides the weights.

    Attributes:
        config: The model's configuration.
        tokenizer: The fast tokenizer.
        image_processor: The stock image processor.
        template: The chat template, as Jinja text.
        backend: What resizes images, ``pil`` or ``torchvision``.
        vision: The image processor's settings.
        processor: What ``processor_config.json`` says besides, e.g. the tokens of an image.
    """

    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    image_processor: BaseImageProcessor
    template: str
    backend: str
    vision: Mapping[str, Any]
    processor: Mapping[str, Any] = field(default_factory=dict)


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
    """A family bound to the parts of one model.

    What is implemented here suits a family whose images are a run of equal tokens, whose positions
    count 0, 1, 2 …, and whose forward takes the vision tensors as the image processor makes them.
    """

    facts: FamilyFacts

    def __init__(self, parts: Parts) -> None:
        self.parts = parts

    @classmethod
    def load_parts(cls, folder: str, config: PreTrainedConfig, backend: str) -> Parts:
        """Read tokenizer, template and image processor from a model folder."""
        names = (cls.facts.image_processor, *cls.facts.former_image_processors)
        processor = load_image_processor(folder, names, backend)
        tokenizer = load_tokenizer(folder)
        return Parts(
            config=config,
            tokenizer=tokenizer,
            image_processor=processor,
            template=load_template(folder, tokenizer),
            backend=backend,
            vision=processor.to_dict(),
            processor=processor_settings(Path(folder)),
        )

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

    def settle(self, policy: ImagePolicy) -> ImagePolicy:
        """The policy with everything that was left to the model filled in.

        Raises:
            UsageError: If the policy asks for what this family cannot do.
        """
        for option in SIZE_OPTIONS - self.facts.image_options:
            if policy.model_dump()[option] is not None:
                known = ", ".join(f"image.{name}" for name in sorted(self.facts.image_options))
                raise UsageError(
                    f"image.{option}: the family {self.facts.name} has no such choice"
                    + (f"; it has {known}" if known else ": it sees every image at its own size")
                )
        return policy

    def row_policy(self, policy: ImagePolicy, images: int) -> ImagePolicy:  # noqa: ARG002
        """The policy for each image of a row that has so many; several may be shown in less detail.

        What is said of one image (``resized``, ``visual_tokens``, ``image_span``) is asked with it.
        """
        return policy

    def packing(self) -> Family | None:
        """The family with rows packed, where a loaded model may prove it; None: facts say all."""
        return None

    @abstractmethod
    def resized(self, size: Size, policy: ImagePolicy) -> Size:
        """Size in pixels at which the model sees an upright image of ``size`` pixels."""

    def visible(self, size: Size, policy: ImagePolicy) -> float:  # noqa: ARG002
        """The part of an upright image's area that the model sees; below 1 where edges are cut."""
        return 1.0

    @abstractmethod
    def visual_tokens(self, size: Size, policy: ImagePolicy) -> int:
        """Image tokens that an upright image of ``size`` pixels becomes. Needs no pixels."""

    def image_span(self, size: Size, policy: ImagePolicy) -> tuple[Piece, ...]:
        """What stands in a row for an upright image of ``size`` pixels."""
        count = self.visual_tokens(size, policy)
        return (Piece(self.facts.image_token, control=True, count=count),)

    def text_after(self, control: str, text: str) -> str:  # noqa: ARG002
        """The text as the model's own processor writes it straight after a control token."""
        return text

    def image_inputs(self, images: Sequence[Picture], policy: ImagePolicy) -> dict[str, Tensor]:
        """The vision tensors of upright RGB images, keyed as the model's forward names them."""
        if not images:
            return {}
        # One image at a time: what an image becomes must not depend on its neighbours.
        return self.join_vision([self._processed(image, policy) for image in images])

    def _processed(self, image: Picture, policy: ImagePolicy) -> dict[str, Tensor]:
        arguments = self.processor_arguments(self.settle(policy))
        output = self.parts.image_processor(images=[image], return_tensors="pt", **arguments)
        return {name: output[name] for name in self.facts.joins}

    def processor_arguments(self, settled: ImagePolicy) -> dict[str, Any]:  # noqa: ARG002
        """What a settled policy changes of the image processor's settings."""
        return {}

    def image_processor_config(self, policy: ImagePolicy) -> dict[str, Any]:
        """The image processor's configuration with the policy's limits, for exported folders."""
        return {
            **self.parts.vision,
            **self.processor_arguments(self.settle(policy)),
            "image_processor_type": image_processor_type(self.parts.image_processor),
        }

    def pictures(
        self,
        vision: Mapping[str, Tensor],
        sizes: Sequence[Size],  # noqa: ARG002
        policy: ImagePolicy,  # noqa: ARG002
    ) -> list[np.ndarray]:
        """The pictures that a row's vision tensors hold, the inverse of ``image_inputs``.

        Args:
            vision: The row's vision tensors.
            sizes: Upright sizes of its images.
            policy: The image policy they were made under.

        Returns:
            What the model really sees, one an image, ``(height, width, 3)``, uint8; of an image in
            tiles, the whole.
        """
        return [self.denormalised(values) for values in vision["pixel_values"]] if vision else []

    def positions(self, tokens: Tokens, policy: ImagePolicy) -> Tensor:  # noqa: ARG002
        """Positions of one row alone, shape ``(rows, tokens)``, row 0 counting tokens from 0."""
        return torch.arange(len(tokens)).unsqueeze(0)

    def forward_inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        """A packed batch as keyword arguments of the model's forward.

        No attention mask and no cache: only then do the positions keep packed rows apart.
        """
        return {
            "input_ids": batch["input_ids"],
            **self.position_arguments(batch["positions"].unsqueeze(1)),
            "use_cache": False,
            **self.image_arguments(batch),
        }

    def position_arguments(self, positions: Tensor) -> dict[str, Any]:
        """Positions ``(rows, batch, tokens)`` as keyword arguments of the model's forward."""
        return {"position_ids": positions[0]}

    def prefill_inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        """A left-padded batch as keyword arguments of a forward that fills a cache."""
        return {**self.generate_inputs(batch), **self.position_arguments(batch["positions"])}

    def generate_inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        """A left-padded batch as keyword arguments of the model's ``generate``."""
        return {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"],
            **self.image_arguments(batch),
        }

    def image_arguments(self, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        """The batch's images as the model's forward takes them, seen now or before."""
        return self.feature_arguments(batch) if FEATURES in batch else self.vision_arguments(batch)

    def feature_arguments(self, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        """Features in the place of the vision tensors."""
        return {"mm_encoder_outputs": {"image": feature_output(batch, self.facts.features)}}

    def vision_arguments(self, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        """The batch's vision tensors as the model's forward takes them; none without images."""
        return {name: batch[name] for name in self.facts.joins if name in batch}

    def render_box(self, box: Box, size: Size, policy: ImagePolicy) -> list[Piece]:  # noqa: ARG002
        """A box in the family's own syntax; ``size`` is that of the box's upright image."""
        return [Piece(box_syntax.render_json(box.label, to_grid(box.xyxy, size, BOX_GRID)))]

    def parse_boxes(self, text: str, sizes: Sequence[Size], policy: ImagePolicy) -> list[Box]:  # noqa: ARG002
        """Boxes in a model's raw answer, control tokens kept, in pixels of the upright image."""
        return box_syntax.json_boxes(text, sizes, BOX_GRID)

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
        return join_tensors(self.facts.joins.get(name, Join.CONCATENATE), tensors)

    def join_vision(self, rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Vision tensors of a batch; rows without images have none."""
        seeing = [vision for vision in rows if vision]
        if not seeing:
            return {}
        return {name: self.join(name, [vision[name] for vision in seeing]) for name in seeing[0]}


def join_tensors(join: Join, tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of several images or rows as one, along the first dimension."""
    if join is Join.CONCATENATE:
        return torch.cat(list(tensors))
    inner = [max(sides) for sides in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    joined = tensors[0].new_zeros((sum(len(tensor) for tensor in tensors), *inner))
    start = 0
    for tensor in tensors:
        corner = tuple(slice(0, length) for length in tensor.shape[1:])
        joined[(slice(start, start + len(tensor)), *corner)] = tensor
        start += len(tensor)
    return joined
