"""``predict``: one answer, through the same encoder as training."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmtune.data.conversation import Conversation, EncodedImage, Image, Message, Part, Text
from vlmtune.data.media import ImagePolicy
from vlmtune.errors import ImageError, UsageError
from vlmtune.models.generate import generate
from vlmtune.models.load import LoadingConfig
from vlmtune.runs.resolve import open_model, resolve

MAX_NEW_TOKENS = 1024


def predict(
    model: str | Path,
    images: Sequence[str | Path],
    prompt: str | None = None,
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    image: ImagePolicy | None = None,
    base: str | None = None,
    loading: LoadingConfig | None = None,
) -> dict[str, Any]:
    """Answer one question about images.

    Args:
        model: Hub id, local model, run, checkpoint or adapter.
        images: Image files.
        prompt: The question; None asks what the model was trained to be asked.
        max_new_tokens: Longest answer.
        image: Image policy of a plain model; what was trained keeps its contract.
        base: Where an adapter's base is now, if it moved.
        loading: Device and dtype.

    Returns:
        The keys of ``vlmtune predict --json``.

    Raises:
        UsageError: If there is neither an image nor a prompt.
        ImageError: If an image cannot be opened.
    """
    encoded = tuple(_read(path) for path in images)
    if not encoded and not prompt:
        raise UsageError("give at least one --image or a --prompt")
    opened = open_model(resolve(model, base=base), loading or LoadingConfig(), image=image)
    if prompt is None and opened.contract.prompt is None:
        raise UsageError(
            f"--prompt: missing; {model} has no prompt of its own in its contract, say what to ask"
        )
    parts: list[Part] = [Image(index) for index in range(len(encoded))]
    if prompt:
        parts.append(Text(prompt))
    question = Conversation("predict", (Message("user", tuple(parts)),), encoded)
    started = time.perf_counter()
    answer = generate(opened.model, opened.encoder, [question], max_new_tokens=max_new_tokens)[0]
    return {
        "text": answer.text,
        "boxes": [
            {"label": box.label, "xyxy": list(box.xyxy), "image": box.image} for box in answer.boxes
        ],
        "tokens": {"prompt": answer.prompt_tokens, "completion": answer.completion_tokens},
        "seconds": round(time.perf_counter() - started, 3),
    }


def _read(path: str | Path) -> EncodedImage:
    try:
        return EncodedImage(Path(path).read_bytes(), str(path))
    except OSError as error:
        raise ImageError(
            "image_missing", f"--image: {path} cannot be read: {error.strerror or error}"
        ) from error
