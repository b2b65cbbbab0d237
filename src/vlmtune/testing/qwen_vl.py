"""Tiny models of the first Qwen-VL, in the layout of the original folders.

Like them they have no ``tokenizer.json``, no chat template and no settings of an image processor.
"""

from __future__ import annotations

import base64
import itertools
import json
from collections import Counter
from pathlib import Path

from vlmtune.testing.layout import seeded, write_json
from vlmtune.testing.size import TinySize
from vlmtune.testing.vocabulary import CORPUS

QUERIES = 16
SPARE = 100  # most ranks beyond the 256 bytes


def qwen_vl(folder: Path, seed: int, size: TinySize) -> None:
    """Qwen-VL-Chat: 16 tokens an image instead of 256, images of 56 pixels.

    The original's 217 control tokens leave no room for the vocabulary of ``TinySize`` below 473:
    the embedding has as many rows as are needed.
    """
    from vlmtune.models.qwen_vl.configuration import tiny_config
    from vlmtune.models.qwen_vl.controls import CONTROLS, END_OF_TEXT, IMAGE_START
    from vlmtune.models.qwen_vl.modeling import QwenVLForConditionalGeneration
    from vlmtune.models.qwen_vl.register import register

    register()
    spare = min(max(size.vocabulary - 256 - len(CONTROLS), 0), SPARE)
    ranks = byte_pair_ranks(CORPUS, 256 + spare)
    _write_ranks(folder / "qwen.tiktoken", ranks)
    ids = {token: len(ranks) + place for place, token in enumerate(CONTROLS)}
    config = tiny_config(
        vocab_size=max(size.vocabulary, len(ranks) + len(CONTROLS)),
        image_start_id=ids[IMAGE_START],
        hidden_size=size.hidden,
        layers=size.layers,
        vision_width=size.vision_width,
        vision_layers=size.vision_layers,
        n_queries=QUERIES,
    )
    seeded(QwenVLForConditionalGeneration, config, seed).save_pretrained(folder)
    end = ids[END_OF_TEXT]
    write_json(
        folder / "generation_config.json",
        {
            "chat_format": "chatml",
            "eos_token_id": end,
            "pad_token_id": end,
            "max_window_size": 6144,
            "max_new_tokens": 512,
            "do_sample": False,
            "transformers_version": "4.31.0",
        },
    )
    write_json(
        folder / "tokenizer_config.json",
        {
            "model_max_length": 8192,
            "tokenizer_class": "QWenTokenizer",
            "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]},
        },
    )
    _write_original_config(folder / "config.json")


def byte_pair_ranks(corpus: list[str], count: int) -> list[bytes]:
    """Byte sequences by rank: the 256 bytes, then the most frequent pairs of a small corpus."""
    tokens = [bytes([value]) for value in range(256)]
    words = [
        [bytes([value]) for value in word.encode()] for line in corpus for word in _words(line)
    ]
    while len(tokens) < count:
        pairs = Counter(pair for word in words for pair in itertools.pairwise(word))
        if not pairs:
            break
        (first, second), _ = min(pairs.items(), key=lambda item: (-item[1], item[0]))
        tokens.append(first + second)
        words = [_merged(word, first, second) for word in words]
    return tokens


def _words(line: str) -> list[str]:
    """Words with the blank before them, as the tokenizer cuts a text (digits stand alone)."""
    return [
        word
        for number, part in enumerate(line.split(" "))
        for word in ([" " + part if number else part] if part.isalpha() else list(part))
    ]


def _merged(word: list[bytes], first: bytes, second: bytes) -> list[bytes]:
    merged: list[bytes] = []
    for token in word:
        if merged and merged[-1] == first and token == second:
            merged[-1] += token
        else:
            merged.append(token)
    return merged


def _write_ranks(path: Path, ranks: list[bytes]) -> None:
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(ranks))
    path.write_text("".join(lines), encoding="utf-8")


def _write_original_config(path: Path) -> None:
    """What the original's ``config.json`` says besides, the pointers to its code among it."""
    config = json.loads(path.read_text(encoding="utf-8"))
    visual = ["heads", "image_size", "image_start_id", "layers", "mlp_ratio", "n_queries"]
    visual += ["output_dim", "patch_size", "width"]
    config |= {
        "architectures": ["QWenLMHeadModel"],
        "auto_map": {
            "AutoConfig": "configuration_qwen.QWenConfig",
            "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
        },
        "bf16": False,
        "fp16": False,
        "fp32": True,
        "onnx_safe": None,
        "tokenizer_type": "QWenTokenizer",
        "torch_dtype": config.pop("dtype", "float32"),
        "transformers_version": "4.32.0",
        "use_flash_attn": "auto",
        "visual": {name: config["visual"][name] for name in visual},
    }
    write_json(path, config)
