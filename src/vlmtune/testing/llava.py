"""Tiny models of the LLaVA line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlmtune.testing.layout import (
    CLIP_MEAN,
    CLIP_STD,
    HALF,
    seeded,
    token_id,
    write_folder,
    write_json,
)
from vlmtune.testing.size import TinySize
from vlmtune.testing.vocabulary import byte_level_bpe, sentencepiece_bpe

# As on the hubs: images before texts whatever their order; an answer has no end.
VICUNA_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
MISTRAL_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}"
    "{{ '<<SYS>>\n' + message['content'][0]['text'] + '\n<</SYS>>\n\n' }}"
    "{% elif message['role'] == 'user' %}{{ '[INST] ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] }}{% endfor %}{{ ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'][0]['text'] + '</s> ' }}"
    "{% endif %}{% endfor %}"
)
# A blank before an answer's line, and none where it is asked for.
QWEN_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ '\n' + content['text'] }}{% endfor %}{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PATCH = 14


def llava(folder: Path, seed: int, size: TinySize) -> None:
    """LLaVA 1.5: CLIP without its last layer, the middle square of an image, Vicuna."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    controls = ["<image>", "<pad>"]
    tokenizer = sentencepiece_bpe(size.vocabulary - len(controls), controls, pad="<pad>")
    tokenizer.chat_template = VICUNA_TEMPLATE
    side = 4 * PATCH
    config = LlavaConfig(
        text_config=_text("llama", size, tokenizer),
        vision_config=_tower("clip_vision_model", size, side),
        image_token_index=token_id(tokenizer, "<image>"),
        image_seq_length=16,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    write_folder(
        folder,
        seeded(LlavaForConditionalGeneration, config, seed),
        tokenizer,
        _pixels("CLIPImageProcessor", "LlavaProcessor", side),
        ends=("</s>",),
    )
    write_json(folder / "processor_config.json", _processor("LlavaProcessor"))


def llava_next(folder: Path, seed: int, size: TinySize) -> None:
    """LLaVA-NeXT: CLIP on tiles, padding taken out, Mistral."""
    from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

    controls = ["<image>", "<pad>"]
    tokenizer = sentencepiece_bpe(size.vocabulary - len(controls), controls, pad="<pad>")
    tokenizer.chat_template = MISTRAL_TEMPLATE
    side = 4 * PATCH
    grids = [[side * rows, side * columns] for rows, columns in ((1, 2), (2, 1), (2, 2))]
    grids += [[side * 3, side], [side, side * 3]]
    config = LlavaNextConfig(
        text_config=_text("mistral", size, tokenizer),
        vision_config=_tower("clip_vision_model", size, side),
        image_token_index=token_id(tokenizer, "<image>"),
        image_seq_length=16,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_grid_pinpoints=grids,
    )
    pixels = _pixels("LlavaNextImageProcessor", "LlavaNextProcessor", side)
    write_folder(
        folder,
        seeded(LlavaNextForConditionalGeneration, config, seed),
        tokenizer,
        {**pixels, "do_pad": True, "image_grid_pinpoints": grids},
        ends=("</s>",),
    )
    write_json(folder / "processor_config.json", _processor("LlavaNextProcessor"))


def llava_onevision(folder: Path, seed: int, size: TinySize) -> None:
    """LLaVA-OneVision: SigLIP on up to 25 tiles, features thinned out, Qwen2."""
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    controls = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"]
    tokenizer = byte_level_bpe(
        size.vocabulary - len(controls), controls, end="<|im_end|>", pad="<|endoftext|>"
    )
    tokenizer.chat_template = QWEN_TEMPLATE
    side = 2 * PATCH
    grids = [[side * rows, side * columns] for rows in range(1, 6) for columns in range(1, 6)]
    config = LlavaOnevisionConfig(
        text_config=_text("qwen2", size, tokenizer, tied=True),
        vision_config={**_tower("siglip_vision_model", size, side), "vision_use_head": False},
        image_token_index=token_id(tokenizer, "<image>"),
        video_token_index=token_id(tokenizer, "<video>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
        image_grid_pinpoints=grids,
        tie_word_embeddings=True,
    )
    write_folder(
        folder,
        seeded(LlavaOnevisionForConditionalGeneration, config, seed),
        tokenizer,
        {
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "processor_class": "LlavaOnevisionProcessor",
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_pad": True,
            "do_rescale": True,
            "do_resize": True,
            "image_grid_pinpoints": grids,
            "image_mean": HALF,
            "image_std": HALF,
            "rescale_factor": 1 / 255,
            "resample": 3,
            "size": {"height": side, "width": side},
        },
        ends=("<|im_end|>", "<|endoftext|>"),
    )
    write_json(
        folder / "processor_config.json",
        {
            "processor_class": "LlavaOnevisionProcessor",
            "num_image_tokens": (side // PATCH) ** 2,
            "vision_feature_select_strategy": "full",
            "image_token": "<image>",
            "video_token": "<video>",
            "vision_aspect_ratio": "anyres_max_9",
        },
    )


def _text(kind: str, size: TinySize, tokenizer: Any, *, tied: bool = False) -> dict[str, Any]:
    heads = size.hidden // 16
    return {
        "model_type": kind,
        "vocab_size": size.vocabulary,
        "hidden_size": size.hidden,
        "intermediate_size": 2 * size.hidden,
        "num_hidden_layers": size.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "max_position_embeddings": 32768,
        "sliding_window": None,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": tied,
    }


def _tower(kind: str, size: TinySize, side: int) -> dict[str, Any]:
    return {
        "model_type": kind,
        "hidden_size": size.vision_width,
        "intermediate_size": 2 * size.vision_width,
        "num_hidden_layers": size.vision_layers,
        "num_attention_heads": size.vision_width // 16,
        "image_size": side,
        "patch_size": PATCH,
    }


def _pixels(kind: str, processor: str, side: int) -> dict[str, Any]:
    """Settings of CLIP's image processor, and of those made from it."""
    return {
        "image_processor_type": kind,
        "processor_class": processor,
        "crop_size": {"height": side, "width": side},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
        "rescale_factor": 1 / 255,
        "resample": 3,
        "size": {"shortest_edge": side},
    }


def _processor(kind: str) -> dict[str, Any]:
    return {
        "processor_class": kind,
        "image_token": "<image>",
        "num_additional_image_tokens": 1,
        "patch_size": PATCH,
        "vision_feature_select_strategy": "default",
    }
