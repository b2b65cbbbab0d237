"""The base as an ordinary model folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

PROCESSOR = Path(__file__).with_name("processor.json")  # pictures of 1 to 256 visual tokens


def export(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    """Write weights, tokenizer and processor; the folder appears whole or not at all."""
    temporary = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    shutil.copyfile(PROCESSOR, temporary / "preprocessor_config.json")
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    return folder
