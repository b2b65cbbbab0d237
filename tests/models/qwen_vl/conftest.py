"""Qwen-VL's real vocabulary with what the original made of it, and a tiny one that is always there.

Nothing of the original's data lies in this repository: its tests are skipped where it is absent.
"""

from __future__ import annotations

import base64
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from vlmtune.data.media import ImagePolicy, Size
from vlmtune.models.family import Family, FamilyFacts, Parts
from vlmtune.models.qwen_vl import boxes
from vlmtune.models.qwen_vl.tokenization import QWenTokenizer, load_tokenizer

WORDS = (
    "the quick brown dog, 你好 世界. assistant user system Picture (1,2)\n\n  <img>dog.png</img>"
)


@pytest.fixture(scope="session")
def golden(shared_data: Path) -> dict[str, Any]:
    """Texts and what the original tokenizer makes of them. Read only."""
    path = shared_data / "qwen_vl_golden" / "tokenizer" / "golden_tokenizer.json"
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def golden_model(shared_data: Path) -> dict[str, Any]:
    """What the original tiny model and its tokenizer of 400 ranks give. Read only."""
    path = shared_data / "qwen_vl_golden" / "model" / "golden.json"
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def real(shared_data: Path) -> QWenTokenizer:
    """The tokenizer of the real model."""
    return load_tokenizer(shared_data / "model_meta" / "qwen_vl_chat")


@pytest.fixture(scope="session")
def small(shared_data: Path) -> QWenTokenizer:
    """The tokenizer of the tiny model in the golden data."""
    return load_tokenizer(shared_data / "qwen_vl_golden" / "model")


@pytest.fixture(scope="session")
def ranks_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a ``qwen.tiktoken`` of 256 bytes and some merges, made here. Read only."""
    tokens = [bytes([value]) for value in range(256)]
    pieces = [[bytes([value]) for value in word.encode()] for word in WORDS.split(" ")]
    for _ in range(60):
        pairs = [pair for piece in pieces for pair in itertools.pairwise(piece)]
        if not pairs:
            break
        best = max(sorted(set(pairs)), key=pairs.count)
        tokens.append(best[0] + best[1])
        pieces = [_merged(piece, best) for piece in pieces]
    folder = tmp_path_factory.mktemp("ranks")
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens)]
    (folder / "qwen.tiktoken").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def made(ranks_folder: Path) -> QWenTokenizer:
    """The tokenizer of ``ranks_folder``; needs no reference data."""
    return load_tokenizer(ranks_folder)


def _merged(piece: list[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    merged: list[bytes] = []
    for token in piece:
        if merged and (merged[-1], token) == pair:
            merged[-1] += token
        else:
            merged.append(token)
    return merged


class TextOnly(Family):
    """Qwen-VL as far as texts go: every image is 256 tokens, and has no pixels."""

    facts = FamilyFacts(
        name="qwen_vl",
        model_types=("qwen",),
        processor_class="",
        image_processor="",
        vision_tower="transformer.visual",
        projector=("transformer.visual.attn_pool",),
        language_model=("transformer.h", "lm_head"),
        image_token="<imgpad>",
        end_of_turn="<|im_end|>",
        lora_targets=("c_attn",),
    )

    def resized(self, size, policy):  # noqa: ARG002
        return Size(448, 448)

    def visual_tokens(self, size, policy):  # noqa: ARG002
        return 256

    def image_inputs(self, images, policy):  # noqa: ARG002
        return {}

    def image_processor_config(self, policy):  # noqa: ARG002
        return {}

    def render_box(self, box, size, policy):  # noqa: ARG002
        return boxes.render_box(box, size)

    def parse_boxes(self, text, sizes, policy):  # noqa: ARG002
        return boxes.parse_boxes(text, sizes)


@pytest.fixture(scope="session")
def encoder_with():
    """Makes an encoder of a tokenizer; ``settings`` are the contract's."""
    from tiny_rows import encoder_of

    def make(tokenizer, **settings):
        parts = Parts(
            config=None,  # type: ignore[arg-type]
            tokenizer=tokenizer,
            image_processor=None,  # type: ignore[arg-type]
            template=tokenizer.chat_template,
            backend="pil",
            vision={},
        )
        return encoder_of(TextOnly(parts), ImagePolicy(), **settings)

    return make
