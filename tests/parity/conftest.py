from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from vlmtune.models.families import load_family
from vlmtune.models.family import Family

CONTROLS = {
    151643: "<|endoftext|>",
    151644: "<|im_start|>",
    151645: "<|im_end|>",
    151646: "<|object_ref_start|>",
    151647: "<|object_ref_end|>",
    151648: "<|box_start|>",
    151649: "<|box_end|>",
    151650: "<|quad_start|>",
    151651: "<|quad_end|>",
    151652: "<|vision_start|>",
    151653: "<|vision_end|>",
    151654: "<|vision_pad|>",
    151655: "<|image_pad|>",
    151656: "<|video_pad|>",
}


# What Qwen2.5 and Qwen3 added; no special tokens but added ones all the same.
LATER_CONTROLS = {
    151657: "<tool_call>",
    151658: "</tool_call>",
    151659: "<|fim_prefix|>",
    151660: "<|fim_middle|>",
    151661: "<|fim_suffix|>",
    151662: "<|fim_pad|>",
    151663: "<|repo_name|>",
    151664: "<|file_sep|>",
    151665: "<tool_response>",
    151666: "</tool_response>",
    151667: "<think>",
    151668: "</think>",
}


@pytest.fixture(scope="session")
def controls() -> dict[int, str]:
    """The family's control tokens by their real ids."""
    return CONTROLS


@pytest.fixture(scope="session")
def golden(shared_data: Path):
    return json.loads((shared_data / "golden" / "expected_values.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def training_template(shared_data: Path) -> str:
    """TRL's copy of the template, with the places marked that are trained."""
    templates = shared_data / "model_meta" / "trl_chat_templates"
    return (templates / "qwen2_5_vl_training.jinja").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def real_folder(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen2-VL as its hub has it, but for the weights: vocabulary, ids, template, settings."""
    folder = real_folder_of(
        tmp_path_factory.mktemp("real") / "qwen2_vl",
        shared_data / "model_meta",
        template="qwen2_5_vl",  # the two families share it
        settings="qwen2_vl_osatlas_7b",
    )
    write(
        folder / "config.json",
        {
            "model_type": "qwen2_vl",
            "architectures": ["Qwen2VLForConditionalGeneration"],
            "vocab_size": 151936,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_theta": 1e6,
            "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
            "bos_token_id": 151643,
            "eos_token_id": 151645,
            "vision_start_token_id": 151652,
            "vision_end_token_id": 151653,
            "vision_token_id": 151654,
            "image_token_id": 151655,
            "video_token_id": 151656,
            "vision_config": {"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 64},
        },
    )
    return folder


@pytest.fixture(scope="session")
def real_family(real_folder: Path) -> Family:
    return load_family(str(real_folder))


def real_folder_of(
    folder: Path,
    meta: Path,
    *,
    template: str,
    settings: str,
    later: Mapping[int, str] | None = None,
) -> Path:
    """A folder with everything of a hub's but ``config.json`` and the weights.

    Args:
        folder: To be made.
        meta: The published files.
        template: Name of the chat template.
        settings: Name of the image processor's settings.
        later: Added tokens besides ``CONTROLS`` by their ids.
    """
    folder.mkdir()
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(meta / "qwen2_text_1.5b" / name, folder / name)
    shutil.copyfile(
        meta / "trl_chat_templates" / f"{template}.jinja", folder / "chat_template.jinja"
    )
    shutil.copyfile(
        meta / "small_json" / f"{settings}.preprocessor_config.json",
        folder / "preprocessor_config.json",
    )
    own = json.loads((meta / "qwen2_text_1.5b" / "tokenizer_config.json").read_text("utf-8"))
    flags = own["added_tokens_decoder"]["151643"]
    own["added_tokens_decoder"] = {
        **{str(place): {**flags, "content": token} for place, token in CONTROLS.items()},
        **{
            str(place): {**flags, "content": token, "special": False}
            for place, token in (later or {}).items()
        },
    }
    own["additional_special_tokens"] = list(CONTROLS.values())[1:]
    del own["chat_template"]
    write(folder / "tokenizer_config.json", own)
    return folder


# Qwen2.5-VL-7B's as its hub has it: flat, with the old name of the vision part's type.
QWEN25_CONFIG: dict[str, Any] = {
    "model_type": "qwen2_5_vl",
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_window_layers": 28,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "tie_word_embeddings": False,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_config": {
        "model_type": "qwen2_5_vl",
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
        "spatial_patch_size": 14,
        "tokens_per_second": 2,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    },
}


@pytest.fixture(scope="session")
def real_qwen25(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen2.5-VL as its hub has it, but for the weights."""
    folder = real_folder_of(
        tmp_path_factory.mktemp("real") / "qwen2_5_vl",
        shared_data / "model_meta",
        template="qwen2_5_vl",
        settings="qwen2_5_vl_7b",
        later=dict(list(LATER_CONTROLS.items())[:8]),
    )
    write(folder / "config.json", QWEN25_CONFIG)
    return folder


@pytest.fixture(scope="session")
def real_qwen3(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen3-VL as its hub has it, but for the weights."""
    meta = shared_data / "model_meta"
    folder = real_folder_of(
        tmp_path_factory.mktemp("real") / "qwen3_vl",
        meta,
        template="qwen3_vl",
        settings="qwen3_vl_embedding",
        later=LATER_CONTROLS,
    )
    shutil.copyfile(meta / "small_json" / "qwen3_vl_2b.config.json", folder / "config.json")
    return folder


def write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")
