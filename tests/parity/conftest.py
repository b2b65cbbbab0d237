from __future__ import annotations

import json
import shutil
from pathlib import Path

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
    meta = shared_data / "model_meta"
    folder = tmp_path_factory.mktemp("real") / "qwen2_vl"
    folder.mkdir()
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(meta / "qwen2_text_1.5b" / name, folder / name)
    template = meta / "trl_chat_templates" / "qwen2_5_vl.jinja"  # the two families share it
    shutil.copyfile(template, folder / "chat_template.jinja")
    settings = meta / "small_json" / "qwen2_vl_osatlas_7b.preprocessor_config.json"
    shutil.copyfile(settings, folder / "preprocessor_config.json")
    own = json.loads((meta / "qwen2_text_1.5b" / "tokenizer_config.json").read_text("utf-8"))
    flags = own["added_tokens_decoder"]["151643"]
    own["added_tokens_decoder"] = {
        str(place): {**flags, "content": token} for place, token in CONTROLS.items()
    }
    own["additional_special_tokens"] = list(CONTROLS.values())[1:]
    del own["chat_template"]
    write(folder / "tokenizer_config.json", own)
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


def write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")
