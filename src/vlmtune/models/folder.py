"""Reading a model folder piece by piece: configuration, tokenizer, template, image processor.

transformers' own processors of many families insist on a video processor and so on torchvision;
reading the pieces ourselves needs neither, and no code from the folder is ever run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmtune.errors import ModelError
from vlmtune.models.classes import know_classes_of
from vlmtune.models.torchvision import torchvision_fault

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase
    from transformers.image_processing_utils import BaseImageProcessor

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a model folder.

    Raises:
        ModelError: If the file is missing or is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ModelError(
            f"{path} is missing: {path.parent} is not a model folder. Expected config.json, a "
            "tokenizer, a processor configuration and *.safetensors in it"
        ) from error
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON ({error}); fetch the model again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a {type(value).__name__}, expected a JSON object")
    return value


def load_config(folder: str) -> PreTrainedConfig:
    """The model's configuration; code in the folder is not run."""
    torchvision_fault()
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    kind = read_json(Path(folder) / "config.json").get("model_type")
    know_classes_of(kind)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise ModelError(
            f"{folder}: model type {kind!r} cannot be read by the installed transformers: {error}"
        ) from error
    assert not isinstance(config, tuple)
    return config


def load_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    """The folder's fast tokenizer."""
    from transformers import AutoTokenizer

    if not any((Path(folder) / name).is_file() for name in TOKENIZER_FILES):
        # transformers would make an empty tokenizer of the kind that config.json suggests.
        raise ModelError(
            f"{folder} has no tokenizer; expected one of {', '.join(TOKENIZER_FILES)}. "
            "Fetch the model again"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the errors of tokenizers have no other class
        raise ModelError(f"{folder}: the tokenizer cannot be read: {error}") from error
    if not tokenizer.is_fast:
        raise ModelError(
            f"{folder}: only a slow tokenizer was found; expected tokenizer.json (or vocab.json "
            "and merges.txt)"
        )
    return tokenizer


def load_template(folder: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template; a file of its own stands above the tokenizer's configuration."""
    jinja = Path(folder) / "chat_template.jinja"
    if jinja.is_file():
        return jinja.read_text(encoding="utf-8")
    legacy = Path(folder) / "chat_template.json"
    if legacy.is_file():
        template = read_json(legacy).get("chat_template")
        if isinstance(template, str):
            return template
    if isinstance(tokenizer.chat_template, str):
        return tokenizer.chat_template
    raise ModelError(
        f"{folder} has no chat template (chat_template.jinja, chat_template.json or in "
        "tokenizer_config.json): use an instruction-tuned model"
    )


def load_image_processor(folder: str, names: Sequence[str], backend: str) -> BaseImageProcessor:
    """The stock image processor of a backend, with the folder's settings.

    Args:
        folder: Model folder.
        names: The class where the folder names none, and what old folders call it.
        backend: ``"pil"`` or ``"torchvision"``.

    Raises:
        ModelError: If transformers has no such class for this backend.
    """
    name = _stock_name(folder, names)
    # The class is named, not looked up by AutoImageProcessor, which would choose the backend by
    # what happens to be installed: train and serve would differ from machine to machine.
    if backend == "torchvision":
        _require_torchvision()
        processor_class = stock_class(name)
    else:
        processor_class = stock_class(f"{name}Pil")
    if processor_class is None:
        advice = ""
        if backend == "pil" and stock_class(name) is not None:
            advice = "; it has one on torchvision: install that, and set model.backend=torchvision"
        raise ModelError(
            f"{folder} names the image processor {name!r}, which the installed transformers does "
            f"not have for model.backend={backend}{advice}"
        )
    return processor_class(**image_processor_settings(Path(folder)))


def image_processor_type(processor: BaseImageProcessor) -> str:
    """The name of an image processor's class in model folders, whatever its backend."""
    return type(processor).__name__.removesuffix("Pil")


def _stock_name(folder: str, names: Sequence[str]) -> str:
    """What the folder calls its image processor; "Fast" was once the name of a backend."""
    default, *former = names
    named = _image_settings(Path(folder)).get("image_processor_type")
    name = str(named or default).removesuffix("Fast").removesuffix("Pil")
    return name if name.endswith("ImageProcessor") and name not in former else default


def stock_class(name: str) -> Any:
    """A class of transformers by its name; None where it has none."""
    import transformers

    try:
        return vars(transformers).get(name) or transformers.__getattr__(name)
    except AttributeError:
        return None


def processor_settings(folder: Path) -> dict[str, Any]:
    """What ``processor_config.json`` says of the processor itself, e.g. the tokens of an image."""
    path = folder / "processor_config.json"
    settings = read_json(path) if path.is_file() else {}
    nested = ("image_processor", "video_processor", "feature_extractor", "tokenizer")
    return {key: value for key, value in settings.items() if key not in nested}


def _image_settings(folder: Path) -> dict[str, Any]:
    old, new = folder / "preprocessor_config.json", folder / "processor_config.json"
    settings: dict[str, Any] = {}
    if new.is_file():
        settings = dict(read_json(new).get("image_processor", {}))
    return settings or read_json(old)


def image_processor_settings(folder: Path) -> dict[str, Any]:
    """Settings from ``preprocessor_config.json``, or from ``processor_config.json`` (newer)."""
    settings = _image_settings(folder)
    for key in ("image_processor_type", "processor_class", "feature_extractor_type", "backend"):
        settings.pop(key, None)
    # Old files hold min_pixels and max_pixels beside a "size" that repeats them in old names.
    size = settings.get("size") or {}
    if "max_pixels" in size or "min_pixels" in size:
        settings["size"] = {
            "shortest_edge": size.get("min_pixels", settings.get("min_pixels")),
            "longest_edge": size.get("max_pixels", settings.get("max_pixels")),
        }
    return {key: value for key, value in settings.items() if value is not None}


def _require_torchvision() -> None:
    """Fail early, with the reason, when torchvision is missing or does not match torch."""
    fault = torchvision_fault()
    if fault is not None:
        raise ModelError(
            f"model.backend: torchvision cannot be used here ({fault}). Install the torchvision "
            "that belongs to the installed torch, or use model.backend=pil"
        )


def template_hash(template: str) -> str:
    """Sha256 of a chat template's text."""
    return hashlib.sha256(template.encode()).hexdigest()
