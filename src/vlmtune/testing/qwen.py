"""Tiny models of the Qwen line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmtune.testing.layout import CLIP_MEAN, CLIP_STD, HALF, seeded, write_folder
from vlmtune.testing.size import TinySize
from vlmtune.testing.vocabulary import byte_level_bpe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

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

# Qwen3-VL's puts no system turn before a conversation that has none.
CHATML_WITHOUT_SYSTEM = CHATML_WITH_IMAGES.replace(
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}",
    "",
)

CONTROLS = [
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


def qwen2_vl(folder: Path, seed: int, size: TinySize) -> None:
    """Qwen2-VL: M-RoPE, native resolution."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    tokenizer = _tokenizer(size, CHATML_WITH_IMAGES)
    ids = tokenizer.get_added_vocab()
    config = Qwen2VLConfig(
        text_config={
            **_text(size, ids),
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [2, 3, 3],
            },
            "tie_word_embeddings": True,
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
        **_image_ids(ids),
        tie_word_embeddings=True,
    )
    write_folder(
        folder,
        seeded(Qwen2VLForConditionalGeneration, config, seed),
        tokenizer,
        _processor("Qwen2VLProcessor", CLIP_MEAN, CLIP_STD, patch=14),
        ends=("<|im_end|>", "<|endoftext|>"),
    )


def qwen2_5_vl(folder: Path, seed: int, size: TinySize) -> None:
    """Qwen2.5-VL: window attention in the tower but for its last layer; an output layer of its own.

    A window is two tokens wide, so that images of a few tokens have several.
    """
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokenizer = _tokenizer(size, CHATML_WITH_IMAGES)
    ids = tokenizer.get_added_vocab()
    config = Qwen2_5_VLConfig(
        text_config={
            **_text(size, ids),
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [2, 3, 3],
            },
        },
        vision_config={
            "depth": size.vision_layers,
            "hidden_size": size.vision_width,
            "num_heads": size.vision_width // 16,
            "intermediate_size": 2 * size.vision_width,
            "out_hidden_size": size.hidden,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 56,
            "fullatt_block_indexes": [size.vision_layers - 1],
            "tokens_per_second": 2,
        },
        **_image_ids(ids),
        tie_word_embeddings=False,
    )
    write_folder(
        folder,
        seeded(Qwen2_5_VLForConditionalGeneration, config, seed),
        tokenizer,
        _processor("Qwen2_5_VLProcessor", CLIP_MEAN, CLIP_STD, patch=14),
        ends=("<|im_end|>", "<|endoftext|>"),
    )


def qwen3_vl(folder: Path, seed: int, size: TinySize) -> None:
    """Qwen3-VL: DeepStack from the first vision layers.

    What is added after the language model's last layer is never read: there are fewer levels than
    layers.
    """
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    tokenizer = _tokenizer(size, CHATML_WITHOUT_SYSTEM)
    ids = tokenizer.get_added_vocab()
    config = Qwen3VLConfig(
        text_config={
            **_text(size, ids),
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e6,
                "mrope_section": [4, 2, 2],
                "mrope_interleaved": True,
            },
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": size.vision_layers,
            "hidden_size": size.vision_width,
            "num_heads": size.vision_width // 16,
            "intermediate_size": 2 * size.vision_width,
            "out_hidden_size": size.hidden,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "num_position_embeddings": 8 * 8,
            "deepstack_visual_indexes": list(range(min(size.vision_layers, size.layers - 1))),
        },
        **_image_ids(ids),
        tie_word_embeddings=True,
    )
    write_folder(
        folder,
        seeded(Qwen3VLForConditionalGeneration, config, seed),
        tokenizer,
        _processor("Qwen3VLProcessor", HALF, HALF, patch=16),
        ends=("<|im_end|>", "<|endoftext|>"),
    )


def _tokenizer(size: TinySize, template: str) -> PreTrainedTokenizerFast:
    tokenizer = byte_level_bpe(
        size.vocabulary - len(CONTROLS), CONTROLS, end="<|im_end|>", pad="<|endoftext|>"
    )
    tokenizer.chat_template = template
    return tokenizer


def _text(size: TinySize, ids: dict[str, int]) -> dict[str, Any]:
    heads = size.hidden // 16
    return {
        "vocab_size": size.vocabulary,
        "hidden_size": size.hidden,
        "intermediate_size": 2 * size.hidden,
        "num_hidden_layers": size.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "max_position_embeddings": 32768,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
    }


def _image_ids(ids: dict[str, int]) -> dict[str, Any]:
    return {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
    }


def _processor(
    name: str, mean: tuple[float, ...], deviation: tuple[float, ...], *, patch: int
) -> dict[str, Any]:
    """What ``preprocessor_config.json`` says; 4 to 1280 tokens an image."""
    token = (2 * patch) ** 2
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": name,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": mean,
        "image_std": deviation,
        "rescale_factor": 1 / 255,
        "resample": 3,
        "min_pixels": 4 * token,
        "max_pixels": 1280 * token,
        "patch_size": patch,
        "temporal_patch_size": 2,
        "merge_size": 2,
    }
