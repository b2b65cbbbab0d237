"""Qwen-VL's control tokens."""

from __future__ import annotations

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
IMAGE_START, IMAGE_END, IMAGE_PAD = "<img>", "</img>", "<imgpad>"
TAGS = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>")
IMAGE_TAGS = (*TAGS, IMAGE_START, IMAGE_END, IMAGE_PAD)
# Their ids follow the ranks, in this order.
CONTROLS = (
    END_OF_TEXT,
    TURN_START,
    TURN_END,
    *(f"<|extra_{number}|>" for number in range(205)),
    *IMAGE_TAGS,
)
