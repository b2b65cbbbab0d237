"""Rows, encoders and reference processors for the tests of models, batching and parity."""

from __future__ import annotations

import io
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as Pictures

from vlmtune.data.conversation import Conversation, EncodedImage, Image, Message, Part, Text
from vlmtune.data.media import ImagePolicy
from vlmtune.models.contract import BaseModelIdentity, make_contract
from vlmtune.models.encode import IGNORED, Encoder
from vlmtune.models.families import load_family
from vlmtune.models.family import Family
from vlmtune.models.load import load_model

BASE = BaseModelIdentity(id="tiny", weights_sha256="0" * 64)
SMALL = ImagePolicy(min_pixels=784, max_pixels=7840)  # 1 to 10 image tokens

WORDS = (r"\frac { a } { b }", "hello", "目标是", "🐎 red", "assistant", "\n", " two  spaces", "é")


def picture(
    size: tuple[int, int] = (64, 48), *, colour: str | None = None, seed: int = 0
) -> EncodedImage:
    """A PNG of one colour, or of seeded noise."""
    if colour is not None:
        image = Pictures.new("RGB", size, colour)
    else:
        noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        image = Pictures.fromarray(noise)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return EncodedImage(buffer.getvalue())


def turn(role: Any, *content: str | int | Part) -> Message:
    """A turn; strings are texts, integers are places of images."""
    return Message(role, tuple(_part(part) for part in content))


def _part(part: str | int | Part) -> Part:
    if isinstance(part, str):
        return Text(part)
    return Image(part) if isinstance(part, int) else part


def row(*messages: Message, images: tuple[EncodedImage, ...] = (), name: str = "row") -> Any:
    """A conversation."""
    return Conversation(name, messages, images)


def asked(question: str, answer: str, *images: EncodedImage) -> Any:
    """One question with its images before it, and its answer."""
    user = turn("user", *range(len(images)), question)
    return row(user, turn("assistant", answer), images=images)


def mixed_rows(count: int, seed: int) -> list[Any]:
    """Random rows: 0 to 3 images of any shape anywhere, 1 to 3 turns, some with a system turn."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        images: list[EncodedImage] = []
        messages = []
        if rng.random() < 0.3:
            messages.append(turn("system", "Be brief."))
        for _ in range(rng.randint(1, 3)):
            content: list[str | int] = []
            for _ in range(rng.choice((0, 1, 1, 2)) if len(images) < 2 else 0):
                size = rng.randint(20, 140), rng.randint(20, 140)
                content.append(len(images))
                images.append(picture(size, seed=rng.randrange(10**6)))
            content.insert(rng.randint(0, len(content)), _words(rng))
            messages.append(turn("user", *content))
            messages.append(turn("assistant", _words(rng)))
        rows.append(row(*messages, images=tuple(images), name=f"{seed}-{number}"))
    return rows


def _words(rng: random.Random) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 6))) + "."


def encoder_of(model: Path | Family, image: ImagePolicy = SMALL, **settings: Any) -> Encoder:
    """An encoder of a model folder or a family; ``settings`` are the contract's."""
    family = load_family(str(model)) if isinstance(model, Path) else model
    return Encoder(family, make_contract(family, BASE, image, **settings))


def lively(folder: Path) -> Any:
    """A folder's model in fp32 with larger weights, so that its answers depend on what it sees.

    Freshly initialised, layers hardly change the stream: with tied embeddings every token then
    predicts itself, and a test that compares answers would compare nothing.
    """
    model = load_model(folder, dtype=torch.float32, device=torch.device("cpu"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed_tokens" not in name:
                parameter.mul_(8)
    return model


def changed(folder: Path, to: Path, *removed: str, **files: str) -> Path:
    """A copy of a model folder without some files, others replaced: ``config_json`` is its text."""
    shutil.copytree(folder, to)
    for name in removed:
        (to / name).unlink()
    for name, text in files.items():
        stem, _, ending = name.rpartition("_")
        (to / f"{stem}.{ending}").write_text(text, encoding="utf-8")
    return to


def trained_text(encoder: Encoder, row: Any) -> str:
    """What the labels of a row spell."""
    labels = encoder.tokens(row).labels
    tokenizer = encoder.family.parts.tokenizer
    return str(tokenizer.decode(labels[labels != IGNORED].tolist()))


def reference_processor(folder: Path, kind: str = "Qwen2VLProcessor", **limits: int) -> Any:
    """transformers' own processor of a folder, without its video part (which wants torchvision)."""
    import transformers
    from transformers import AutoTokenizer, Qwen2VLImageProcessorPil

    processor_class = getattr(transformers, kind)

    class ImageOnly(processor_class):
        @classmethod
        def get_attributes(cls) -> list[str]:
            return ["image_processor", "tokenizer"]

        def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **_):
            self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
            self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
            self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
            super(processor_class, self).__init__(
                image_processor, tokenizer, chat_template=chat_template
            )

    return ImageOnly(
        Qwen2VLImageProcessorPil.from_pretrained(folder, **limits),
        AutoTokenizer.from_pretrained(folder),
        chat_template=(folder / "chat_template.jinja").read_text(encoding="utf-8"),
    )


def as_chat(row: Any) -> list[dict[str, Any]]:
    """A conversation of texts and images as transformers takes it."""
    pictures = [Pictures.open(io.BytesIO(image.data)).convert("RGB") for image in row.images]
    return [
        {
            "role": message.role,
            "content": [
                {"type": "image", "image": pictures[part.index]}
                if isinstance(part, Image)
                else {"type": "text", "text": part.text}
                for part in message.content
            ],
        }
        for message in row.messages
    ]
