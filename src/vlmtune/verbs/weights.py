"""Writing what was trained: an adapter, or a model folder that every engine reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from vlmtune.models.encode import Encoder
from vlmtune.models.load import BaseSource
from vlmtune.models.save import save_model
from vlmtune.tuning.apply import ADAPTER_WEIGHTS, Tuned
from vlmtune.tuning.parts import parts_of


def write_weights(
    out: Path, tensors: Mapping[str, Tensor], tuned: Tuned, encoder: Encoder, base: BaseSource
) -> None:
    """Write an adapter or a full model with its contract into an existing folder.

    Args:
        out: The folder.
        tensors: Copies of ``tuned.saved()``.
        tuned: What they are copies of.
        encoder: The model's encoder.
        base: The base, whose tokenizer and template go with a full model.
    """
    trained = parts_of(tuned.trainable(), encoder.family.facts)
    contract = encoder.contract.model_copy(update={"trained": trained})
    if tuned.adapter is None:
        save_model(
            tuned.model,
            out,
            family=encoder.family,
            contract=contract,
            base=base.folder,
            tensors=tensors,
        )
        return
    named = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    # "auto" would ask the hub for the base's configuration in the middle of a run.
    tuned.adapter.save_pretrained(str(out), save_embedding_layers=False, state_dict=named)
    (out / "README.md").unlink(missing_ok=True)
    (out / ADAPTER_WEIGHTS).chmod(0o644)  # as save_model does, so that others can serve it
    contract.write(out)
