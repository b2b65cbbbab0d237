"""Tiny models of the InternVL line."""

from __future__ import annotations

from pathlib import Path

from vlmtune.testing.layout import seeded, token_id, write_folder, write_json
from vlmtune.testing.size import TinySize
from vlmtune.testing.vocabulary import byte_level_bpe

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TILE, PATCH = 56, 14

# ChatML with a line for each image, as the InternVL models on the hubs have it.
CHATML_WITH_LINES = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}"
    "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def internvl(folder: Path, seed: int, size: TinySize) -> None:
    """InternVL 3: tiles of 4 x 4 patches, pixel shuffle to 2 x 2 tokens, Qwen2."""
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    controls = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *named.values()]
    controls += ["<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>"]
    tokenizer = byte_level_bpe(
        size.vocabulary - len(controls), controls, end="<|im_end|>", pad="<|endoftext|>", **named
    )
    tokenizer.chat_template = CHATML_WITH_LINES
    heads, tokens = size.hidden // 16, (TILE // PATCH // 2) ** 2
    config = InternVLConfig(
        text_config={
            "model_type": "qwen2",
            "vocab_size": size.vocabulary,
            "hidden_size": size.hidden,
            "intermediate_size": 2 * size.hidden,
            "num_hidden_layers": size.layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads // 2,
            "max_position_embeddings": 32768,
            "bos_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "tie_word_embeddings": False,
        },
        vision_config={
            "hidden_size": size.vision_width,
            "intermediate_size": 2 * size.vision_width,
            "num_hidden_layers": size.vision_layers,
            "num_attention_heads": size.vision_width // 16,
            "attention_bias": True,
            "image_size": [TILE, TILE],
            "patch_size": [PATCH, PATCH],
        },
        image_token_id=token_id(tokenizer, "<IMG_CONTEXT>"),
        image_seq_length=tokens,
        tie_word_embeddings=False,
    )
    write_folder(
        folder,
        seeded(InternVLForConditionalGeneration, config, seed),
        tokenizer,
        {
            "image_processor_type": "GotOcr2ImageProcessor",
            "processor_class": "InternVLProcessor",
            "crop_to_patches": False,
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": IMAGENET_MEAN,
            "image_std": IMAGENET_STD,
            "max_patches": 12,
            "min_patches": 1,
            "rescale_factor": 1 / 255,
            "resample": 3,
            "size": {"height": TILE, "width": TILE},
        },
        ends=("<|im_end|>", "<|endoftext|>"),
    )
    write_json(
        folder / "processor_config.json",
        {"processor_class": "InternVLProcessor", "image_seq_length": tokens},
    )
