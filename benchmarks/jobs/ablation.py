"""Taking one of our measures away, for ``gpu.py``. What is taken away is exact: losses stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def label_only_logits() -> None:
    """Logits of every token; those of labels are picked afterwards."""
    from vlmtune.models.attention import packed_rows
    from vlmtune.training import loss

    def all_logits(model: Any, family: Any, batch: Any) -> Any:
        with packed_rows(batch.lengths):
            return model(**family.forward_inputs(batch.inputs)).logits[batch.predicts]

    loss.label_logits = all_logits
    chunked_loss()


def chunked_loss() -> None:
    """The logits of all labels at once, and torch's cross-entropy."""
    from vlmtune.models.head import LossHead

    LossHead._makes_loss = lambda *_: False  # type: ignore[method-assign]


def attention_by_rows() -> None:
    """The stock attention, with a mask of all tokens against all tokens."""
    from vlmtune.models import attention

    attention._within_window = lambda *_: False


def patch_product() -> None:
    """The patch embedding as a Conv3d."""
    from vlmtune.models import products

    products._cuts_patches = lambda *_: False


def fused_adamw() -> None:
    """Torch's default AdamW."""
    from vlmtune.verbs import holding

    holding.fuses = lambda *_: False


PATCHES: dict[str, Callable[[], None]] = {
    "label-only logits": label_only_logits,
    "chunked loss": chunked_loss,
    "attention by rows": attention_by_rows,
    "patch embedding as a product": patch_product,
    "fused AdamW": fused_adamw,
}

# Measures that the recipe can leave out.
OPTIONS: dict[str, dict[str, Any]] = {
    "packing": {"token_budget": 1},
    "vision cache": {"vision_cache": "off"},
    "workers": {"workers": 0},
}
