"""transformers' own processor of a model folder, asked what it makes of images and texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlmtune.errors import ImageError, ModelError
from vlmtune.models.family import Join, Parts, Piece, join_tensors
from vlmtune.models.folder import read_json, stock_class
from vlmtune.models.plain_text import control_tokens

if TYPE_CHECKING:
    from PIL.Image import Image as Picture
    from transformers import PreTrainedTokenizerBase

TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")
TEXT = ("input_ids", "attention_mask", *TOKEN_TYPES)
MARK = "\ue000"


def processor_class_name(folder: Path, model_type: str) -> str:
    """What the folder, or else transformers, calls the processor.

    Raises:
        ModelError: If neither does.
    """
    from transformers.models.auto import processing_auto

    for name in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        settings = read_json(folder / name) if (folder / name).is_file() else {}
        if settings.get("processor_class"):
            return str(settings["processor_class"])
    known = vars(processing_auto)["PROCESSOR_MAPPING_NAMES"].get(model_type)
    if known is None:
        raise ModelError(
            f"{folder} names no processor_class (processor_config.json), and transformers knows "
            f"none for {model_type!r}: nothing says how its images become tokens"
        )
    return str(known)


class Stock:
    """The stock processor over a model's parts; what it does with images is the measure of ours.

    Args:
        parts: The model's parts; ``processor`` names the class as ``processor_class``.
    """

    def __init__(self, parts: Parts) -> None:
        self._tokenizer = parts.tokenizer
        controls = control_tokens(parts.tokenizer.backend_tokenizer)
        self._controls = {identifier: token for token, identifier in controls.items()}
        self._processor = _processor(parts)
        self.place = _place(parts.tokenizer, parts.template, self._controls.values())

    def images(self, rows: Sequence[Sequence[Picture]]) -> dict[str, Tensor]:
        """Everything that the processor makes of rows that are nothing but images.

        Raises:
            ImageError: If it refuses one.
        """
        try:
            output = self._processor(
                text=[self.place * len(row) for row in rows],
                images=[list(row) for row in rows],
                text_kwargs={"add_special_tokens": False, "padding": True},
                return_tensors="pt",
            )
        except Exception as error:  # a processor that is not ours raises whatever it likes
            sizes = ", ".join(
                f"{picture.width} x {picture.height}" for row in rows for picture in row
            )
            raise ImageError(
                "image_refused", f"the model's own processor refuses {sizes}: {error}"
            ) from error
        return _tensors(output)

    def chat(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """What it makes of a conversation whose last turn is a question.

        Raises:
            ModelError: If it fails.
        """
        arguments = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        try:
            output = self._processor.apply_chat_template(
                rows, add_generation_prompt=True, **arguments
            )
        except Exception as error:  # as above
            raise ModelError(f"the model's own processor fails on a question: {error}") from error
        return _tensors(output)

    def span(self, ids: Sequence[int]) -> tuple[Piece, ...]:
        """Ids that stand for one image, as pieces of text and control tokens."""
        pieces = []
        for control, run in groupby(ids, key=lambda each: each if each in self._controls else None):
            stretch = list(run)
            if control is not None:
                pieces.append(Piece(self._controls[control], control=True, count=len(stretch)))
            else:
                pieces.append(Piece(str(self._tokenizer.decode(stretch))))
        return tuple(pieces)


def vision(output: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a processor's output that belong to images."""
    return {name: tensor for name, tensor in output.items() if name not in TEXT}


def find_joins(
    one: Mapping[str, Tensor], other: Mapping[str, Tensor], both: Mapping[str, Tensor]
) -> tuple[dict[str, Join], frozenset[str]]:
    """How the tensors of two images make those of both.

    Returns:
        How each joins, and which have a dimension of rows before that of images.

    Raises:
        ModelError: If a tensor of both images is not made of those of each.
    """
    joins, nested = {}, set()
    for name, together in both.items():
        parts = [one[name], other[name]]
        if len(together) == 1:
            nested.add(name)
            parts, together = [part[0] for part in parts], together[0]
        alike = parts[0].shape[1:] == parts[1].shape[1:]
        join = Join.CONCATENATE if alike else Join.PAD
        joined = join_tensors(join, parts) if together.dim() == parts[0].dim() else together[:0]
        if not torch.equal(joined, together):
            raise ModelError(
                f"{name} of two images, {tuple(both[name].shape)}, is not made of those of each, "
                f"{tuple(one[name].shape)} and {tuple(other[name].shape)}: it says more than what "
                "each image is. Such a model needs a family of its own, see "
                "docs/add-a-family.md"
            )
        joins[name] = join
    return joins, frozenset(nested)


def _processor(parts: Parts) -> Any:
    """The processor, without what it would do with videos and sounds.

    Raises:
        ModelError: If it cannot be made here.
    """
    name = str(parts.processor["processor_class"])
    stock = stock_class(name)
    if stock is None:
        raise ModelError(f"the installed transformers has no processor {name!r}")
    try:
        attributes = stock.get_attributes()
        # What is for videos or sounds may need packages that are not here; nothing asks for it.
        image_only: Any = type(
            name, (stock,), {"check_argument_for_proper_class": _absent_is_proper}
        )
        own = {"image_processor": parts.image_processor, "tokenizer": parts.tokenizer}
        unknown = [each for each in attributes if "tokenizer" in each and each not in own]
        if unknown or not set(own) <= set(attributes):
            raise ModelError(
                f"{name} is made of {', '.join(attributes)}; vlmtune knows processors of one image "
                "processor and one tokenizer (parts for videos and sounds are left out)"
            )
        arguments = [own.get(attribute) for attribute in attributes]
        settings = {**parts.processor, "chat_template": parts.template}
        return image_only.from_args_and_dict(arguments, settings)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ModelError(
            f"{name} cannot be made here: {str(error).strip()}. If it asks for a package, install "
            "that; else such a model needs a family of its own, see docs/add-a-family.md"
        ) from error


def _absent_is_proper(self: Any, argument_name: str, argument: Any) -> Any:
    if argument is None:
        return None
    return super(type(self), self).check_argument_for_proper_class(argument_name, argument)


def _place(tokenizer: PreTrainedTokenizerBase, template: str, controls: Any) -> str:
    """What the chat template writes for an image.

    Raises:
        ModelError: If it writes nothing for one.
    """
    from jinja2 import TemplateError

    def rendered(*kinds: str) -> str:
        text = {"type": "text", "text": MARK}
        content = [text if kind == "text" else {"type": kind} for kind in kinds]
        rows: Any = [{"role": "user", "content": content}]
        return str(tokenizer.apply_chat_template(rows, chat_template=template, tokenize=False))

    # Two against one: some templates write another white space where a turn begins with an image.
    try:
        one, two = rendered("image", "text"), rendered("image", "image", "text")
    except (TemplateError, TypeError) as error:
        raise ModelError(
            f"the model's chat template cannot write a turn of two images and a text: {error}"
        ) from error
    differs = (place for place, letter in enumerate(one) if two[place : place + 1] != letter)
    start = next(differs, len(one))
    written = two[start : len(two) - len(one) + start].strip()
    if "'type'" in one or not written or not two.endswith(one[start:]):
        raise ModelError(
            "the model's chat template writes nothing for an image that stands before a text; "
            "vlmtune cannot see where its images go"
        )
    found = [(written.find(token), token) for token in controls if token in written]
    if not found:
        return written
    end = max(written.rfind(token) + len(token) for _, token in found)
    return written[min(found)[0] : end]


def _tensors(output: Any) -> dict[str, Tensor]:
    tensors = dict(output)
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise ModelError(
                f"the model's processor hands on {name} as a {type(value).__name__}, not as a "
                "tensor; such a model needs a family of its own, see docs/add-a-family.md"
            )
    return tensors
