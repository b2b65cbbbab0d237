"""A base whose answers depend on what it sees, and what its trained models say."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlmtune.batching.collate import pack
from vlmtune.data.dataset import PreparedDataset
from vlmtune.models.encode import Encoder
from vlmtune.training.loss import label_logits


@pytest.fixture(scope="session")
def lively_base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base with larger weights: what is done to a layer reaches the logits."""
    folder = tmp_path_factory.mktemp("lively") / "base"
    shutil.copytree(tiny_base, folder)
    weights = load_file(folder / "model.safetensors")
    larger = {
        name: tensor * (8 if tensor.dim() > 1 and "embed_tokens" not in name else 1)
        for name, tensor in weights.items()
    }
    save_file(larger, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def logits_on(tiny_data: Path) -> Any:
    """Logits of two validation rows' answers, ``(labels, vocabulary)``, fp32."""
    rows = list(PreparedDataset.open(tiny_data).split("validation")[:2])

    def ask(model: Any, encoder: Encoder) -> torch.Tensor:
        batch = pack(encoder.family, [encoder.encode(row) for row in rows])
        training = model.training
        model.eval()
        with torch.no_grad():
            logits = label_logits(model, encoder.family, batch)
        model.train(training)
        return logits.float()

    return ask
