"""Tiny models of classes that have no family of their own, in the real layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlmtune.models.folder import load_config
from vlmtune.models.generic import Generic
from vlmtune.testing.layout import HALF, seeded, write_folder, write_json
from vlmtune.testing.vocabulary import byte_level_bpe

VOCABULARY, HIDDEN, WIDTH = 512, 64, 32
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 2 * HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
}
VISION = {
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 14,
    "image_size": 56,
}
PIXELS = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": HALF,
    "image_std": HALF,
    "rescale_factor": 1 / 255,
    "resample": 3,
}


def generic(folder: Path) -> Generic:
    """A model read as if it had no family, whether it has one or not."""
    return Generic(Generic.load_parts(str(folder), load_config(str(folder)), "pil"))


def chatml(image: str) -> str:
    """ChatML with this in the place of an image."""
    return (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        "{% if message['content'] is string %}{{ message['content'] }}"
        "{% else %}{% for part in message['content'] %}"
        f"{{% if part['type'] == 'image' %}}{image}"
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def _tokenizer(image: str, *controls: str, **named: str) -> tuple[Any, dict[str, int]]:
    every = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *controls]
    tokenizer = byte_level_bpe(
        VOCABULARY - len(every), every, end="<|im_end|>", pad="<|endoftext|>", **named
    )
    tokenizer.chat_template = chatml(image)
    return tokenizer, tokenizer.get_added_vocab()


def _ends(ids: dict[str, int]) -> dict[str, int]:
    end, pad = ids["<|im_end|>"], ids["<|endoftext|>"]
    return {"bos_token_id": pad, "eos_token_id": end, "pad_token_id": pad}


def _write(
    folder: Path, model: Any, tokenizer: Any, images: dict[str, Any], processor: dict[str, Any]
) -> Path:
    folder.mkdir(parents=True)
    name = {"processor_class": processor["processor_class"]}
    write_folder(folder, model, tokenizer, {**PIXELS, **images, **name}, ends=("<|im_end|>",))
    write_json(folder / "processor_config.json", processor)
    return folder


def aya_vision(folder: Path, text: dict[str, Any] | None = None) -> Path:
    """Tiles named in words, pixel shuffle, Cohere2 with sliding windows."""
    from transformers import AyaVisionConfig, AyaVisionForConditionalGeneration

    marks = ["<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>"]
    tokenizer, ids = _tokenizer("<image>", *marks)
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 12}
    own = text or {"model_type": "cohere2", **layers}
    config = AyaVisionConfig(
        text_config={**TEXT, **_ends(ids), **own},
        vision_config={"model_type": "siglip_vision_model", **VISION, "vision_use_head": False},
        image_token_index=ids["<|IMG_PATCH|>"],
    )
    return _write(
        folder,
        seeded(AyaVisionForConditionalGeneration, config, 3),
        tokenizer,
        {
            "image_processor_type": "GotOcr2ImageProcessor",
            "size": {"height": 56, "width": 56},
            "crop_to_patches": True,
            "min_patches": 1,
            "max_patches": 6,
        },
        {
            "processor_class": "AyaVisionProcessor",
            "img_size": 56,
            "patch_size": 14,
            "downsample_factor": 2,
        },
    )


def ovis2(folder: Path) -> Path:
    """Visual words of a vocabulary of their own, indicator tokens between tiles."""
    from transformers import Ovis2Config, Ovis2ForConditionalGeneration

    marks = ["<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"]
    tokenizer, ids = _tokenizer("<image>\n", "<image>", "<IMG_ATOM>", *marks)
    config = Ovis2Config(
        text_config={"model_type": "qwen2", **TEXT, **_ends(ids), "tie_word_embeddings": True},
        vision_config={**VISION, "vocab_size": 48, "hidden_stride": 2},
        image_token_id=ids["<IMG_ATOM>"],
        visual_indicator_token_ids=[ids[mark] for mark in marks],
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        tie_word_embeddings=True,
    )
    return _write(
        folder,
        seeded(Ovis2ForConditionalGeneration, config, 3),
        tokenizer,
        {
            "image_processor_type": "Ovis2ImageProcessor",
            "size": {"height": 56, "width": 56},
            "crop_to_patches": True,
            "min_patches": 1,
            "max_patches": 4,
        },
        {"processor_class": "Ovis2Processor", "image_seq_length": 4},
    )


def glm4v(folder: Path) -> Path:
    """M-RoPE, and a processor that asks for a part for videos."""
    from transformers import Glm4vConfig, Glm4vForConditionalGeneration

    marks = ["<|image|>", "<|video|>", "<|begin_of_image|>", "<|end_of_image|>"]
    marks += ["<|begin_of_video|>", "<|end_of_video|>"]
    tokenizer, ids = _tokenizer("<|begin_of_image|><|image|><|end_of_image|>", *marks)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    config = Glm4vConfig(
        text_config={**TEXT, **_ends(ids), "rope_parameters": rope, "head_dim": 16},
        vision_config={
            "depth": 2,
            "hidden_size": WIDTH,
            "num_heads": 2,
            "patch_size": 14,
            "image_size": 56,
            "intermediate_size": 2 * WIDTH,
            "out_hidden_size": HIDDEN,
        },
        image_token_id=ids["<|image|>"],
        video_token_id=ids["<|video|>"],
        image_start_token_id=ids["<|begin_of_image|>"],
        image_end_token_id=ids["<|end_of_image|>"],
        video_start_token_id=ids["<|begin_of_video|>"],
        video_end_token_id=ids["<|end_of_video|>"],
        tie_word_embeddings=False,
    )
    return _write(
        folder,
        seeded(Glm4vForConditionalGeneration, config, 3),
        tokenizer,
        {
            "image_processor_type": "Glm4vImageProcessor",
            "size": {"shortest_edge": 3136, "longest_edge": 25088},
            "patch_size": 14,
            "temporal_patch_size": 2,
            "merge_size": 2,
        },
        {"processor_class": "Glm4vProcessor"},
    )


def deepseek_vl(folder: Path) -> Path:
    """One padded square an image, a fixed number of tokens."""
    from transformers import DeepseekVLConfig, DeepseekVLForConditionalGeneration

    tokenizer, ids = _tokenizer("<img>", "<img>", image_token="<img>")
    config = DeepseekVLConfig(
        text_config={"model_type": "llama", **TEXT, **_ends(ids)},
        vision_config={"model_type": "siglip_vision_model", **VISION, "vision_use_head": False},
        image_token_id=ids["<img>"],
    )
    return _write(
        folder,
        seeded(DeepseekVLForConditionalGeneration, config, 3),
        tokenizer,
        {
            "image_processor_type": "DeepseekVLImageProcessor",
            "size": {"height": 56, "width": 56},
            "min_size": 14,
        },
        {"processor_class": "DeepseekVLProcessor", "num_image_tokens": 16},
    )


def paligemma(folder: Path) -> Path:
    """A model without a chat template."""
    from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

    tokenizer, ids = _tokenizer("<image>", "<image>")
    tokenizer.chat_template = None
    config = PaliGemmaConfig(
        text_config={"model_type": "gemma", **TEXT, **_ends(ids), "head_dim": 16},
        vision_config={**VISION, "projection_dim": HIDDEN},
        image_token_index=ids["<image>"],
        projection_dim=HIDDEN,
    )
    return _write(
        folder,
        seeded(PaliGemmaForConditionalGeneration, config, 3),
        tokenizer,
        {
            "image_processor_type": "SiglipImageProcessor",
            "size": {"height": 56, "width": 56},
            "image_seq_length": 16,
        },
        {"processor_class": "PaliGemmaProcessor"},
    )


def mllama(folder: Path) -> Path:
    """Images are looked at by cross-attention: a mask of tokens by images belongs to each row."""
    from transformers import MllamaConfig, MllamaForConditionalGeneration

    tokenizer, ids = _tokenizer("<|image|>", "<|image|>", "<|python_tag|>")
    tokenizer.bos_token = "<|endoftext|>"
    text = {**TEXT, **_ends(ids), "cross_attention_layers": [1]}
    config = MllamaConfig(
        text_config={**text, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        vision_config={
            **{name: value for name, value in VISION.items() if name != "num_attention_heads"},
            "attention_heads": 2,
            "num_global_layers": 1,
            "max_num_tiles": 2,
            "intermediate_layers_indices": [0],
            "vision_output_dim": 2 * WIDTH,
            "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
        },
        image_token_index=ids["<|image|>"],
    )
    return _write(
        folder,
        seeded(MllamaForConditionalGeneration, config, 3),
        tokenizer,
        {
            "image_processor_type": "MllamaImageProcessor",
            "size": {"height": 56, "width": 56},
            "max_image_tiles": 2,
            "do_pad": True,
        },
        {"processor_class": "MllamaProcessor"},
    )


CLASSES: dict[str, Callable[[Path], Path]] = {
    "aya_vision": aya_vision,
    "ovis2": ovis2,
    "glm4v": glm4v,
    "deepseek_vl": deepseek_vl,
}
SHOWING = ("aya_vision", "ovis2", "deepseek_vl")  # whose pixels are pictures, as the tests expect
