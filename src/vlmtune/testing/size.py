"""How big a tiny model is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TinySize:
    """The few numbers that decide how big a tiny model is.

    Attributes:
        hidden: Width of the language model; a multiple of 32.
        layers: Layers of the language model.
        vision_width: Width of the vision tower; a multiple of 16.
        vision_layers: Layers of the vision tower.
        vocabulary: Rows of the embedding; at least the tokenizer's size.
    """

    hidden: int = 64
    layers: int = 2
    vision_width: int = 32
    vision_layers: int = 2
    vocabulary: int = 512
