"""How many weights train at real sizes: on the meta device, which holds none of them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from vlmtune.models.families import family_class
from vlmtune.recipe import load_recipe
from vlmtune.tuning.apply import Tuned, apply_tuning
from vlmtune.tuning.config import TuningConfig
from vlmtune.tuning.parts import count_parts

pytestmark = pytest.mark.slow  # seconds of making modules


def tuned_at_full_size(model_class: Any, config: Any, tuning: TuningConfig) -> Tuned:
    with torch.device("meta"):
        model = model_class(config)
        model.tie_weights()
        facts = family_class(config.model_type).facts
        return apply_tuning(model, tuning, facts, base_id="base")


def of_one_layer(tuned: Tuned, layer: str) -> dict[str, int]:
    """Trainable weights of each projection of a layer."""
    counts: Counter[str] = Counter()
    for name, parameter in tuned.trainable().items():
        if f".{layer}." in name:
            counts[name.partition(".lora_")[0].rsplit(".", 1)[-1]] += parameter.numel()
    return dict(counts)


def test_qwen2_vl_2b_with_the_recipe_for_formulas():
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    config = Qwen2VLConfig(
        text_config={
            "vocab_size": 151936,
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [16, 24, 24],
            },
        },
        vision_config={"depth": 32, "embed_dim": 1280, "hidden_size": 1536, "num_heads": 16},
        tie_word_embeddings=True,
    )
    tuned = tuned_at_full_size(
        Qwen2VLForConditionalGeneration, config, load_recipe("latex-ocr").tuning
    )
    layer = of_one_layer(tuned, "language_model.layers.0")
    # rank x (inputs + outputs) of each projection
    assert layer == {
        "q_proj": 64 * (1536 + 1536),
        "k_proj": 64 * (1536 + 256),
        "v_proj": 64 * (1536 + 256),
        "o_proj": 64 * (1536 + 1536),
        "gate_proj": 64 * (1536 + 8960),
        "up_proj": 64 * (1536 + 8960),
        "down_proj": 64 * (8960 + 1536),
    }
    facts = family_class("qwen2_vl").facts
    trains = count_parts(tuned.model, facts, trainable=True)
    assert trains == {"vision": 0, "projector": 0, "language": 73_859_072}
    assert sum(layer.values()) * 28 == 73_859_072
    whole = count_parts(tuned.model, facts, trainable=False)
    assert whole == {
        "vision": 631_183_360,
        "projector": 34_087_936,
        "language": 1_543_714_304 + 73_859_072,
    }


def test_idefics2_8b_with_the_expression_of_the_workflow():
    """7,589,912 of 8,410,358,024, as peft itself printed it in the hand-written workflow."""
    from transformers import Idefics2Config, Idefics2ForConditionalGeneration

    config = Idefics2Config(
        text_config={
            "model_type": "mistral",
            "vocab_size": 32003,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        },
        vision_config={
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "image_size": 980,
            "patch_size": 14,
        },
        perceiver_config={
            "hidden_size": 4096,
            "resampler_n_latents": 64,
            "resampler_depth": 3,
            "resampler_n_heads": 16,
            "resampler_head_dim": 96,
            "num_key_value_heads": 4,
        },
        tie_word_embeddings=False,
    )
    tuning = TuningConfig(
        rank=8,
        alpha=8,
        dropout=0.1,
        init="gaussian",
        targets=r".*(text_model|modality_projection|perceiver_resampler)"
        r".*(k_proj|q_proj|v_proj|o_proj).*|lm_head$",
    )
    tuned = tuned_at_full_size(Idefics2ForConditionalGeneration, config, tuning)
    assert of_one_layer(tuned, "text_model.layers.0") == {
        "q_proj": 8 * (4096 + 4096),
        "k_proj": 8 * (4096 + 1024),
        "v_proj": 8 * (4096 + 1024),
        "o_proj": 8 * (4096 + 4096),
    }
    assert of_one_layer(tuned, "perceiver_resampler.layers.0") == {
        "q_proj": 8 * (4096 + 1536),
        "k_proj": 8 * (4096 + 384),
        "v_proj": 8 * (4096 + 384),
        "o_proj": 8 * (1536 + 4096),
    }
    facts = family_class("idefics2").facts
    trains = count_parts(tuned.model, facts, trainable=True)
    head = 8 * (4096 + 32003)
    assert trains == {"vision": 0, "projector": 485_376, "language": 6_815_744 + head}
    whole = sum(count_parts(tuned.model, facts, trainable=False).values())
    assert (sum(trains.values()), whole) == (7_589_912, 8_410_358_024)
