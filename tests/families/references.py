"""transformers' own processors, which ours must equal; without their video parts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tiny_rows import reference_processor


def settings_of(folder: Path, name: str) -> dict[str, Any]:
    """A JSON file of a folder, without the names of classes."""
    import json

    path = folder / name
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {key: value for key, value in found.items() if key != "processor_class"}


def idefics2(folder: Path) -> Any:
    from transformers import AutoTokenizer, Idefics2ImageProcessorPil, Idefics2Processor

    return Idefics2Processor(
        Idefics2ImageProcessorPil.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
        chat_template=(folder / "chat_template.jinja").read_text(encoding="utf-8"),
        **settings_of(folder, "processor_config.json"),
    )


REFERENCES: dict[str, Callable[[Path], Any]] = {
    "qwen2_vl": reference_processor,
    "idefics2": idefics2,
}
