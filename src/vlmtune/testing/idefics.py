"""Tiny models of the Idefics line."""

from __future__ import annotations

from pathlib import Path

from vlmtune.testing.layout import HALF, seeded, token_id, write_folder, write_json
from vlmtune.testing.size import TinySize
from vlmtune.testing.vocabulary import sentencepiece_bpe

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
