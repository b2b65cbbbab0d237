"""Tiny random models of every family in the real layout, made offline in about a second.

For tests, ours and yours: ``python -m vlmtune.testing tiny qwen2_vl OUT`` writes a folder that
loads through the ordinary path like any hub model.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmtune.errors import UsageError, VlmtuneError
from vlmtune.models.torchvision import torchvision_fault

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CORPUS = [
    r"\frac { 1 } { 2 } x ^ { 2 } + \sum _ { i = 0 } ^ { n } a _ { i } = \int _ { 0 } ^ { \infty }",
    r"\left( \alpha \beta \gamma \delta \lambda \right) \sqrt { x } \partial _ { t } \mathrm { e }",
    r"\operatorname { s i n } \theta \cdot \hat { p } \bar { q } \to \phi \psi \pi , \quad \dots",
    "You are a helpful assistant. Describe this picture in one sentence, please.",
    "A man is riding a brown horse on the beach while two dogs are playing with a red ball.",
    "What is the total amount on the invoice? The answer is 1234567890.",
    "system\nuser\nassistant\n",
    "目标是读取用户输入的照片，转换成公式。这是什么？框出图中的位置。",
]


@dataclass(frozen=True, kw_only=True)
class TinySize:
    """The few numbers that decide how big a tiny model is.

    Attributes:
        hidden: Width of the language model; a multiple of 32.
        layers: Layers of the language model.
        vision_width: Width of the vision tower; a multiple of 16.
        vision_layers: Layers of the vision tower.
        vocabulary: Rows of the embedding; at least the tokenizer's size.
    """

    hidden: int = 64
    layers: int = 2
    vision_width: int = 32
    vision_layers: int = 2
    vocabulary: int = 512


def tiny(family: str, out: str | Path, *, seed: int = 0, size: TinySize | None = None) -> Path:
    """Write a tiny random model of a family in the real on-disk layout.

    Args:
        family: A name of ``FAMILIES``.
        out: Folder to make; it must not hold a model yet.
        seed: Seed of the weights.
        size: How big; the default has about 0.2 million parameters.

    Returns:
        The folder.
    """
    if family not in FAMILIES:
        raise UsageError(f"family: found {family!r}, expected one of {', '.join(FAMILIES)}")
    folder = Path(out)
    if (folder / "config.json").exists():
        raise UsageError(f"{folder} already holds a model; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    from transformers.utils import logging

    logging.disable_progress_bar()
    FAMILIES[family](folder, seed, size or TinySize())
    return folder


def _qwen2_vl(folder: Path, seed: int, size: TinySize) -> None:
    import torch

    torchvision_fault()
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    controls = [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|object_ref_start|>",
        "<|object_ref_end|>",
        "<|box_start|>",
        "<|box_end|>",
        "<|quad_start|>",
        "<|quad_end|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|vision_pad|>",
        "<|image_pad|>",
        "<|video_pad|>",
    ]
    tokenizer = _byte_level_bpe(size.vocabulary - len(controls), controls, pad="<|endoftext|>")
    tokenizer.chat_template = CHATML_WITH_IMAGES
    added = tokenizer.get_added_vocab()
    ids = {token: added[token] for token in controls}
    heads = size.hidden // 16
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": size.vocabulary,
            "hidden_size": size.hidden,
            "intermediate_size": 2 * size.hidden,
            "num_hidden_layers": size.layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads // 2,
            "max_position_embeddings": 32768,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [2, 3, 3],
            },
            "tie_word_embeddings": True,
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            "depth": size.vision_layers,
            "embed_dim": size.vision_width,
            "num_heads": size.vision_width // 16,
            "hidden_size": size.hidden,
            "mlp_ratio": 2,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen2VLForConditionalGeneration(config)
    model.generation_config.update(
        eos_token_id=[ids["<|im_end|>"], ids["<|endoftext|>"]], pad_token_id=ids["<|endoftext|>"]
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2VLProcessor",
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "rescale_factor": 1 / 255,
            "resample": 3,
            "min_pixels": 3136,
            "max_pixels": 1003520,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "merge_size": 2,
        },
    )


FAMILIES: dict[str, Callable[[Path, int, TinySize], None]] = {"qwen2_vl": _qwen2_vl}
FIRST = next(iter(FAMILIES))  # what the quickstart starts from until it has a base of its own

# ChatML with image placeholders, as the Qwen2-VL models on the hubs have it.
CHATML_WITH_IMAGES = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _byte_level_bpe(size: int, controls: list[str], *, pad: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with Qwen2's pre-tokenizer, trained on a few lines."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    split = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(size, 512),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(controls)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token=pad,
        additional_special_tokens=controls,
        model_max_length=32768,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m vlmtune.testing")
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("tiny", help="write a tiny random model of a family")
    command.add_argument("family", choices=sorted(FAMILIES))
    command.add_argument("out", type=Path)
    command.add_argument("--seed", type=int, default=0)
    for name, default in vars(TinySize()).items():
        command.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    options = vars(parser.parse_args(arguments))
    family, out, seed = options.pop("family"), options.pop("out"), options.pop("seed")
    try:
        folder = tiny(family, out, seed=seed, size=TinySize(**options))
    except VlmtuneError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_status
    sys.stdout.write(f"{folder}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(_main(sys.argv[1:]))
