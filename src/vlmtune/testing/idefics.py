"""Tiny models of the Idefics line, SmolVLM among them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlmtune.testing.layout import HALF, seeded, token_id, write_folder, write_json
from vlmtune.testing.size import TinySize
from vlmtune.testing.vocabulary import byte_level_bpe, sentencepiece_bpe

# Role names in words, images as one token, as the Idefics models on the hubs have it.
IDEFICS_TEMPLATE = (
    "{% for message in messages %}{{message['role'].capitalize()}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}"
    "{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}"
    "{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)

AROUND = ("<fake_token_around_image>", "<image>")
TILE, PATCH, SHUFFLE = 56, 14, 2  # of Idefics3 and SmolVLM


def idefics2(folder: Path, seed: int, size: TinySize) -> None:
    """Idefics2: NaViT-like SigLIP, perceiver resampler, Mistral."""
    from transformers import Idefics2Config, Idefics2ForConditionalGeneration

    controls = ["<fake_token_around_image>", "<image>", "<end_of_utterance>"]
    tokenizer = sentencepiece_bpe(size.vocabulary - len(controls), controls)
    tokenizer.chat_template = IDEFICS_TEMPLATE
    heads, latents = size.hidden // 16, 8
    config = Idefics2Config(
        text_config={
            "model_type": "mistral",
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
        },
        vision_config={
            "hidden_size": size.vision_width,
            "intermediate_size": 2 * size.vision_width,
            "num_hidden_layers": size.vision_layers,
            "num_attention_heads": size.vision_width // 16,
            "image_size": 140,
            "patch_size": 14,
        },
        perceiver_config={
            "hidden_size": size.hidden,
            "resampler_n_latents": latents,
            "resampler_depth": 1,
            "resampler_n_heads": heads,
            "resampler_head_dim": 16,
            "num_key_value_heads": heads // 2,
        },
        image_token_id=token_id(tokenizer, "<image>"),
        tie_word_embeddings=False,
    )
    write_folder(
        folder,
        seeded(Idefics2ForConditionalGeneration, config, seed),
        tokenizer,
        {
            "image_processor_type": "Idefics2ImageProcessor",
            "processor_class": "Idefics2Processor",
            "do_convert_rgb": True,
            "do_image_splitting": False,
            "do_normalize": True,
            "do_pad": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": HALF,
            "image_std": HALF,
            "rescale_factor": 1 / 255,
            "resample": 2,
            "size": {"longest_edge": 140, "shortest_edge": 42},
        },
        ends=("<end_of_utterance>", "</s>"),
    )
    write_json(
        folder / "processor_config.json",
        {"processor_class": "Idefics2Processor", "image_seq_len": latents},
    )


def idefics3(folder: Path, seed: int, size: TinySize) -> None:
    """Idefics3: SigLIP on tiles, pixel shuffle, Llama 3; the names of tiles are plain text."""
    from tokenizers import processors
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration

    start = "<|begin_of_text|>"
    controls = [start, "<|end_of_text|>", *AROUND, "<end_of_utterance>"]
    tokenizer = byte_level_bpe(
        size.vocabulary - len(controls), controls, end="<|end_of_text|>", pad="<|end_of_text|>"
    )
    tokenizer.bos_token = start  # written by the tokenizer and by the template, and there once
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A", special_tokens=[(start, token_id(tokenizer, start))]
    )
    tokenizer.chat_template = start + IDEFICS_TEMPLATE
    config = Idefics3Config(**_tiled(size, tokenizer))
    write_folder(
        folder,
        seeded(Idefics3ForConditionalGeneration, config, seed),
        tokenizer,
        # No multiple of a tile: the longer side grows to whole tiles, the shorter one with it.
        _tiling("Idefics3", longest_edge=140),
        ends=("<end_of_utterance>", "<|end_of_text|>"),
    )
    write_json(folder / "processor_config.json", _processor("Idefics3"))


def smolvlm(folder: Path, seed: int, size: TinySize) -> None:
    """SmolVLM: as Idefics3, but the names of tiles are control tokens."""
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4)]
    controls = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<global-img>", *tiles]
    controls += [*AROUND, "<end_of_utterance>"]
    tokenizer = byte_level_bpe(
        size.vocabulary - len(controls), controls, end="<end_of_utterance>", pad="<|im_end|>"
    )
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.unk_token = "<|endoftext|>"
    tokenizer.chat_template = "<|im_start|>" + IDEFICS_TEMPLATE
    config = SmolVLMConfig(**_tiled(size, tokenizer))
    write_folder(
        folder,
        seeded(SmolVLMForConditionalGeneration, config, seed),
        tokenizer,
        _tiling("SmolVLM", longest_edge=168),
        ends=("<end_of_utterance>",),
    )
    write_json(folder / "processor_config.json", _processor("SmolVLM"))


def _tiled(size: TinySize, tokenizer: Any) -> dict[str, Any]:
    """The configuration that Idefics3 and SmolVLM share."""
    heads = size.hidden // 16
    return {
        "text_config": {
            "model_type": "llama",
            "vocab_size": size.vocabulary,
            "hidden_size": size.hidden,
            "intermediate_size": 2 * size.hidden,
            "num_hidden_layers": size.layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads // 2,
            "max_position_embeddings": 32768,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": token_id(tokenizer, "<end_of_utterance>"),
            "pad_token_id": tokenizer.pad_token_id,
        },
        "vision_config": {
            "hidden_size": size.vision_width,
            "intermediate_size": 2 * size.vision_width,
            "num_hidden_layers": size.vision_layers,
            "num_attention_heads": size.vision_width // 16,
            "image_size": TILE,
            "patch_size": PATCH,
        },
        "scale_factor": SHUFFLE,
        "image_token_id": token_id(tokenizer, "<image>"),
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": False,
    }


def _tiling(line: str, longest_edge: int) -> dict[str, Any]:
    """Settings of the image processor."""
    return {
        "image_processor_type": f"{line}ImageProcessor",
        "processor_class": f"{line}Processor",
        "do_convert_rgb": True,
        "do_image_splitting": True,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": HALF,
        "image_std": HALF,
        "max_image_size": {"longest_edge": TILE},
        "rescale_factor": 1 / 255,
        "resample": 1,
        "size": {"longest_edge": longest_edge},
    }


def _processor(line: str) -> dict[str, Any]:
    return {
        "processor_class": f"{line}Processor",
        "image_seq_len": (TILE // PATCH // SHUFFLE) ** 2,
    }
