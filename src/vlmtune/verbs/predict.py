"""``predict``: one answer, through the same encoder as training."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmtune.data.conversation import Conversation, EncodedImage, Image, Message, Part, Text
from vlmtune.data.media import ImagePolicy
from vlmtune.errors import ImageError, UsageError
from vlmtune.fetch import fetch_image_bytes, is_url, shown
from vlmtune.models.generate import generate
from vlmtune.models.load import LoadingConfig
from vlmtune.runs.resolve import open_model, resolve

MAX_NEW_TOKENS = 1024


def predict(  # noqa: PLR0913
    model: str | Path,
    images: Sequence[str | Path],
    prompt: str | None = None,
    *,
    instruction: str | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    allow_urls: bool = False,
    image: ImagePolicy | None = None,
    base: str | None = None,
    loading: LoadingConfig | None = None,
) -> dict[str, Any]:
    """Answer one question about images.

    Args:
        model: Hub id, local model, run, checkpoint or adapter.
        images: Image files, or their URLs (as strings) where ``allow_urls``.
        prompt: The question; None asks what the model was trained to be asked.
        instruction: Text before the images; None: what stood there in training, if anything did.
        max_new_tokens: Longest answer.
        allow_urls: Whether URLs are opened; never an address that is not public.
        image: Image policy of a plain model; what was trained keeps its contract.
        base: Where an adapter's base is now, if it moved.
        loading: Device, dtype, quantization.

    Returns:
        The keys of ``vlmtune predict --json``.

    Raises:
        UsageError: If there is neither an image nor a prompt, or a URL without ``allow_urls``.
        ImageError: If an image cannot be opened.
        FetchError: If a URL may not be opened, or gives nothing.
    """
    encoded = tuple(_read(each, allow_urls=allow_urls) for each in images)
    if not encoded and not prompt:
        raise UsageError("give at least one --image or a --prompt")
    opened = open_model(resolve(model, base=base), loading or LoadingConfig(), image=image)
    if prompt is None and opened.contract.prompt is None:
        raise UsageError(
            f"--prompt: missing; {model} has no prompt of its own in its contract, say what to ask"
        )
    parts: list[Part] = [Text(instruction)] if instruction else []
    parts += [Image(index) for index in range(len(encoded))]
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


def _read(path: str | Path, *, allow_urls: bool) -> EncodedImage:
    if isinstance(path, str) and is_url(path):
        if not allow_urls:
            raise UsageError(
                f"--image: {shown(path)} is a URL, and URLs are opened only with --allow-urls "
                "(allow_urls=True); add it, or download the image and give the file"
            )
        return EncodedImage(fetch_image_bytes(path), shown(path))
    try:
        return EncodedImage(Path(path).read_bytes(), str(path))
    except OSError as error:
        raise ImageError(
            "image_missing", f"--image: {path} cannot be read: {error.strerror or error}"
        ) from error
