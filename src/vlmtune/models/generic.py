"""Any class of transformers' ``AutoModelForImageTextToText`` that no family file knows.

Nothing is known of it beforehand. Its parts are read from its modules, and what its images become
is found by asking its own processor: the placeholder, its expansion, the vision tensors, how they
join. What cannot be found, or is not what rows need, is refused. Rows are not packed unless a
loaded model has proven that it keeps them apart; boxes are JSON.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from vlmtune.data.media import ImagePolicy, Size
from vlmtune.errors import ImageError, ModelError
from vlmtune.models.anatomy import dissect
from vlmtune.models.contract import BaseModelIdentity, make_contract
from vlmtune.models.encode import Encoder
from vlmtune.models.family import Family, FamilyFacts, Parts, Piece
from vlmtune.models.folder import (
    image_processor_type,
    load_image_processor,
    load_template,
    load_tokenizer,
    processor_settings,
)
from vlmtune.models.probes import gradient, probe_row
from vlmtune.models.stock import (
    TOKEN_TYPES,
    Stock,
    find_joins,
    processor_class_name,
    vision,
)

if TYPE_CHECKING:
    from PIL.Image import Image as Picture
    from transformers import PreTrainedConfig

PREFIX = "generic:"  # a family file that comes later is another family, and contracts say so
SQUARE, WIDE = Size(64, 64), Size(190, 60)  # what processors are asked about first
GREY = 221


@dataclass(frozen=True)
class Seen:
    """What an image of some size becomes.

    Attributes:
        span: What stands for it in a row.
        length: Its part of the first dimension of the pixels.
        whole: Which of its views shows all of it; None where pixels are no pictures.
        size: Size of its views, or its own where pixels are no pictures.
    """

    span: tuple[Piece, ...]
    length: int
    whole: int | None
    size: Size


class Generic(Family):
    """The family of one class, bound to one model's parts; its facts are found here."""

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self._stock = Stock(parts)
        self._seen: dict[Size, Seen] = {}
        one, other = gradient(SQUARE), gradient(WIDE)
        try:
            first, second, both, side_by_side = (
                self._stock.images(rows)
                for rows in ([[one]], [[other]], [[one, other]], [[one], [other]])
            )
        except ImageError as error:
            raise ModelError(f"two ordinary images cannot be encoded: {error}") from error
        joins, self._nested = find_joins(vision(first), vision(second), vision(both))
        self.facts = _facts(parts, self._stock, second, joins)
        self._types = _token_types(second, self.image_token_id)
        ours = self.join_vision([self._processed(each, ImagePolicy()) for each in (one, other)])
        batches = _equal(self._nest(ours), vision(side_by_side))
        self.facts = replace(self.facts, batches=batches)
        prove_equal(self, self._stock)

    @classmethod
    def load_parts(cls, folder: str, config: PreTrainedConfig, backend: str) -> Parts:
        """As every family does; the classes are those that transformers has for the model type."""
        from transformers.models.auto import image_processing_auto

        names = vars(image_processing_auto)["IMAGE_PROCESSOR_MAPPING_NAMES"]
        known = names.get(config.model_type) or {}
        default = str(known.get("torchvision") or known.get("pil") or "")
        tokenizer = load_tokenizer(folder)
        template = load_template(folder, tokenizer)
        processor = load_image_processor(folder, [default], backend)
        name = processor_class_name(Path(folder), config.model_type)
        return Parts(
            config=config,
            tokenizer=tokenizer,
            image_processor=processor,
            template=template,
            backend=backend,
            vision=processor.to_dict(),
            processor={**processor_settings(Path(folder)), "processor_class": name},
        )

    def packing(self) -> Generic:
        """The same family, rows packed: for a model that has been shown to keep them apart."""
        other = copy(self)
        other.facts = replace(self.facts, packs=True)
        return other

    def seen(self, size: Size) -> Seen:
        """What an image of ``size`` pixels becomes, found by making one; remembered by size."""
        if size not in self._seen:
            picture = gradient(size)
            output = self._stock.images([[picture]])
            pixels = self._unnested(vision(output)).get("pixel_values", torch.empty(0))
            whole, view = self._whole(pixels, picture)
            span = self._stock.span(output["input_ids"][0].tolist())
            self._seen[size] = Seen(span, len(pixels), whole, view)
        return self._seen[size]

    def resized(self, size: Size, policy: ImagePolicy) -> Size:  # noqa: ARG002
        """Size of the view that shows all of the image; its own where pixels are no pictures."""
        return self.seen(size).size

    def visual_tokens(self, size: Size, policy: ImagePolicy) -> int:
        """The placeholders that the model's own processor writes."""
        token = self.facts.image_token
        return sum(piece.count for piece in self.image_span(size, policy) if piece.text == token)

    def image_span(self, size: Size, policy: ImagePolicy) -> tuple[Piece, ...]:  # noqa: ARG002
        """What the model's own processor writes."""
        return self.seen(size).span

    def pictures(
        self,
        vision: Mapping[str, Tensor],
        sizes: Sequence[Size],
        policy: ImagePolicy,  # noqa: ARG002
    ) -> list[np.ndarray]:
        """The view that shows all of each image; plain grey where pixels are no pictures."""
        pictures, start = [], 0
        for size in sizes:
            seen = self.seen(size)
            if seen.whole is None:
                pictures.append(np.full((size.height, size.width, 3), GREY, dtype=np.uint8))
                continue
            pixels = vision["pixel_values"][start : start + seen.length].flatten(0, -4)
            view = pixels[seen.whole, :, : seen.size.height, : seen.size.width]
            pictures.append(self.denormalised(view))
            start += seen.length
        return pictures

    def forward_inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        """Packed as every family does; else the stock call, the model making its own positions."""
        if self.facts.packs:
            return super().forward_inputs(batch)
        return {
            "input_ids": batch["input_ids"],
            "attention_mask": torch.ones_like(batch["input_ids"]),
            "use_cache": False,
            **self.vision_arguments(batch),
        }

    def vision_arguments(self, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        """The vision tensors as the processor lays them out, and its token types if it has any."""
        types = {
            name: batch["image_mask"].to(dtype) * one for name, (dtype, one) in self._types.items()
        }
        return {**self._nest(super().vision_arguments(batch)), **types}

    def _processed(self, image: Picture, policy: ImagePolicy) -> dict[str, Tensor]:  # noqa: ARG002
        return self._unnested(vision(self._stock.images([[image]])))

    def _nest(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All images as those of one row."""
        return {
            name: tensor.unsqueeze(0) if name in self._nested else tensor
            for name, tensor in tensors.items()
        }

    def _unnested(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: tensor[0] if name in self._nested else tensor for name, tensor in tensors.items()
        }

    def _whole(self, pixels: Tensor, picture: Picture) -> tuple[int | None, Size]:
        """Which view shows all of a picture, and the size of the views."""
        if pixels.dim() < 4 or pixels.shape[-3] != 3:
            return None, Size(*picture.size)
        size = Size(width=pixels.shape[-1], height=pixels.shape[-2])
        expected = np.asarray(picture.resize(size), dtype=np.float64)
        views = [self.denormalised(view) for view in pixels.flatten(0, -4)]
        return int(np.argmin([np.abs(view - expected).mean() for view in views])), size


def prove_equal(family: Family, stock: Stock) -> None:
    """Encode questions as the stock processor does, and as we do; both must be equal.

    Raises:
        ModelError: If the ids or the vision tensors of a kind of question differ.
    """
    base = BaseModelIdentity(id="", weights_sha256="")
    encoder = Encoder(family, make_contract(family, base, ImagePolicy()))
    for kinds, content in QUESTIONS.items():
        pictures = [gradient(part) for part in content if isinstance(part, Size)]
        try:
            ours = encoder.encode(probe_row(content), ask=True)
        except ModelError:
            if len(pictures) == 1:
                raise
            continue  # the template takes no such turn; neither will it in a data set
        parts = [
            {"type": "text", "text": part}
            if isinstance(part, str)
            else {"type": "image", "image": gradient(part)}
            for part in content
        ]
        theirs = stock.chat([{"role": "user", "content": parts}])
        mask = torch.from_numpy(ours.tokens.image_mask)[None]
        mine = {
            "input_ids": torch.from_numpy(ours.tokens.ids)[None],
            **family.vision_arguments({**ours.vision, "image_mask": mask}),
        }
        theirs = {name: tensor for name, tensor in theirs.items() if name != "attention_mask"}
        if not _equal(mine, theirs):
            wrong = [
                name
                for name in sorted({*mine, *theirs})
                if not _equal({name: mine.get(name)}, {name: theirs.get(name)})
            ]
            raise ModelError(
                f"for a question of {kinds}, {', '.join(wrong)} would not be what the model's own "
                "processor makes: such a model needs a family of its own, see "
                "docs/add-a-family.md"
            )


QUESTIONS: dict[str, tuple[str | Size, ...]] = {
    "an image and a text": (WIDE, "What is this?"),
    "a text and an image": ("Look at", SQUARE),
    "a text": ("Hello there",),
    "two images and a text": (WIDE, SQUARE, "Which one?"),
    "texts and images in turn": ("First", SQUARE, "then", WIDE, "what?"),
}


def _facts(
    parts: Parts, stock: Stock, output: Mapping[str, Tensor], joins: Mapping[str, Any]
) -> FamilyFacts:
    anatomy = dissect(parts.config)
    return FamilyFacts(
        name=f"{PREFIX}{parts.config.model_type}",
        model_types=(parts.config.model_type,),
        processor_class=str(parts.processor["processor_class"]),
        image_processor=image_processor_type(parts.image_processor),
        vision_tower=anatomy.vision_tower,
        projector=anatomy.projector,
        language_model=anatomy.language_model,
        image_token=_image_token(parts, stock.span(output["input_ids"][0].tolist())),
        image_place=stock.place,
        lora_targets=anatomy.linear,
        joins=joins,
        decodes=False,
    )


def _image_token(parts: Parts, span: Sequence[Piece]) -> str:
    """The control token that the configuration names, or else the most frequent one of an image."""
    config = parts.config.to_dict()
    named = config.get("image_token_id", config.get("image_token_index"))
    controls = [piece for piece in span if piece.control]
    tokens = {piece.text: piece for piece in controls}
    for token in tokens:
        if parts.tokenizer.convert_tokens_to_ids(token) == named:
            return token
    if not controls:
        raise ModelError(
            "what the model's processor writes for an image holds no control token; vlmtune "
            "cannot see where its features go"
        )
    return max(controls, key=lambda piece: piece.count).text


def _token_types(
    output: Mapping[str, Tensor], image_token: int
) -> dict[str, tuple[torch.dtype, int]]:
    """Token types of the processor's output: their dtype, and what stands at image tokens.

    Raises:
        ModelError: If they say anything else than which tokens are images.
    """
    image = output["input_ids"] == image_token
    types = {}
    for name in TOKEN_TYPES:
        if name not in output:
            continue
        one = int(output[name].max())
        if not torch.equal(output[name], image.to(output[name].dtype) * one):
            raise ModelError(
                f"the model's processor marks more than image tokens in {name}; such a model needs "
                "a family of its own, see docs/add-a-family.md"
            )
        types[name] = (output[name].dtype, one)
    return types


def _equal(ours: Mapping[str, Tensor | None], theirs: Mapping[str, Tensor | None]) -> bool:
    if set(ours) != set(theirs):
        return False
    pairs = ((ours[name], theirs[name]) for name in ours)
    return all(a is not None and b is not None and torch.equal(a, b) for a, b in pairs)
