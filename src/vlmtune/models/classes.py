"""Architectures of our own, made known to transformers' Auto classes when a folder needs one."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from vlmtune.models.qwen_vl.register import register as register_qwen_vl

OWN: Mapping[str, Callable[[], None]] = {"qwen": register_qwen_vl}


def know_classes_of(model_type: object) -> None:
    """Register what a ``config.json`` of this ``model_type`` needs; of most that is nothing.

    Must run before an Auto class sees the folder. Nothing of ours is imported for other folders.
    """
    register = OWN.get(str(model_type))
    if register is not None:
        register()
