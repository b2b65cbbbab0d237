"""A dataset in which every fault of ``check`` is planted once, and where it was planted."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as Pictures

from tiny_rows import row, turn
from vlmtune.data.conversation import Box, Conversation, EncodedImage
from vlmtune.data.writer import DatasetWriter


def write_dataset(
    out: Path, train: Sequence[Conversation], validation: Sequence[Conversation] = ()
) -> Path:
    """A prepared dataset of these rows as they are: nothing is quarantined."""
    with DatasetWriter(out) as writer:
        for each in (*train, *validation):
            writer.add(each)
        places = range(len(train), len(train) + len(validation))
        writer.finish(validation=set(places), source="planted", options={})
        writer.publish()
    return out


def scene(seed: int, size: tuple[int, int] = (160, 120)) -> Pictures.Image:
    """Blobs of colour: as unlike any other seed's as two photographs."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Pictures.fromarray(coarse).resize(size, Pictures.Resampling.BICUBIC)


def saved(picture: Pictures.Image, kind: str = "PNG", **options: Any) -> EncodedImage:
    """A picture's file."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return EncodedImage(buffer.getvalue())


def sample(name: str, image: EncodedImage, answer: str = "", question: str = "What is it?") -> Any:
    """One picture, one question, one answer; a source as ``prepare`` writes it."""
    answer = answer or f"a scene that is called {name}"
    made = row(turn("user", 0, question), turn("assistant", answer), images=(image,), name=name)
    return Conversation(made.id, made.messages, made.images, (), {"source": f"rows.csv:{name}"})


def clean_rows(count: int, start: int = 1000) -> list[Conversation]:
    """Rows without a fault."""
    return [sample(f"clean-{n}", saved(scene(n))) for n in range(start, start + count)]


def boxed(name: str, seed: int, *boxes: Box) -> Conversation:
    """A row whose answer is boxes on one picture of 160 x 120."""
    messages = (turn("user", 0, "Where?"), turn("assistant", *boxes))
    return row(*messages, images=(saved(scene(seed)),), name=name)


def _rotated() -> EncodedImage:
    exif = Pictures.Exif()
    exif[0x0112] = 6
    return saved(scene(3), "JPEG", exif=exif, quality=95)


def _deep() -> EncodedImage:
    ramp = np.linspace(0, 65535, 160 * 120).reshape(120, 160).astype(np.uint16)
    return saved(Pictures.fromarray(ramp))


def _clear() -> EncodedImage:
    picture = scene(1).convert("RGBA")
    picture.putalpha(Pictures.linear_gradient("L").resize(picture.size))
    return saved(picture)


def _moving() -> EncodedImage:
    return saved(scene(4), "GIF", save_all=True, append_images=[scene(5)])


def planted() -> tuple[list[Conversation], list[Conversation], set[tuple[str, str]]]:
    """Train rows, validation rows, and all (code, id) that ``check`` must find.

    Some are seen only against a model: ``too_long`` at 400 tokens, the sizes with at least 3136
    and at most 100352 pixels.
    """
    shared, first = saved(scene(20)), saved(scene(21))
    whole, nearly = scene(22), scene(23)
    train = [
        *clean_rows(30),
        sample("clear", _clear()),
        sample("turned", _rotated()),
        sample("deep", _deep()),
        sample("print", saved(scene(6).convert("CMYK"), "TIFF")),
        sample("moving", _moving()),
        sample("small", saved(scene(7, (20, 20)))),
        sample("huge", saved(scene(8, (1600, 1200)), "JPEG")),
        sample("flat", saved(scene(9, (900, 10)))),
        sample("thread", saved(scene(10, (402, 2)))),
        sample("cut", EncodedImage(saved(scene(11)).data[:900])),
        sample("text", EncodedImage(b"this is no picture at all")),
        sample("nothing", EncodedImage(b"")),
        sample("long", saved(scene(12)), "word " * 500),
        sample("markup", saved(scene(13)), question="What is it?<|im_end|>"),
        sample("twin", saved(scene(14))),
        sample("twin", saved(scene(15)), "quite another scene, under the same name"),
        boxed("inside", 16, Box(0, "it", (0, 0, 160, 120))),
        boxed("outside", 17, Box(0, "it", (100, 50, 190, 100))),
        boxed("turned over", 18, Box(0, "it", (100, 50, 40, 100))),
        boxed("elsewhere", 19, Box(1, "it", (1, 2, 3, 4))),
        sample("first", first, "the very same answer"),
        sample("copy", first, "the very same answer"),
        sample("contradiction", first, "something that is quite different"),
        sample("original", saved(whole)),
        sample("compressed", saved(whole, "JPEG", quality=70)),
        row(
            turn("user", 0, "?"),
            turn("assistant", " \n"),
            images=(saved(scene(24)),),
            name="mute",
        ),
        row(turn("user", 0, "?"), images=(saved(scene(25)),), name="unanswered"),
        row(turn("assistant", "first!"), turn("user", "?"), name="backwards"),
        row(name="void"),
        row(turn("user", 0, 0, "?"), turn("assistant", "two or one"),
            images=(saved(scene(26)),), name="placed twice"),
        sample("shared", shared, "an answer that both splits have"),
        sample("seen", saved(nearly)),
    ]  # fmt: skip
    validation = [
        *clean_rows(6, 2000),
        sample("leaked", shared, "an answer that both splits have"),
        sample("asked anew", shared, "an answer of validation alone", "And now?"),
        sample("look-alike", saved(nearly.resize((120, 90)), "JPEG", quality=80)),
    ]
    found = {
        ("transparent", "clear"),
        ("rotated", "turned"),
        ("sixteen_bit", "deep"),
        ("cmyk", "print"),
        ("animated", "moving"),
        ("image_too_small", "small"),
        ("image_shrunk", "huge"),
        ("image_squeezed", "flat"),
        ("image_too_stretched", "thread"),
        ("image_truncated", "cut"),
        ("image_not_an_image", "text"),
        ("image_empty", "nothing"),
        ("too_long", "long"),
        ("answer_length", "long"),
        ("control_token", "markup"),
        ("duplicate_id", "twin"),
        ("box_outside", "outside"),
        ("box_inverted", "turned over"),
        ("box_without_image", "elsewhere"),
        ("duplicate", "copy"),
        ("conflicting_answers", "contradiction"),
        ("near_duplicate", "compressed"),
        ("empty_answer", "mute"),
        ("no_answer", "unanswered"),
        ("role_order", "backwards"),
        ("empty_conversation", "void"),
        ("image_mismatch", "placed twice"),
        ("leak", "leaked"),
        ("image_in_both", "asked anew"),
        ("near_leak", "look-alike"),
    }
    return train, validation, found
