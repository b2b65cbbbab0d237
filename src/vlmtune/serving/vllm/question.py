"""A question as vLLM takes it: tokens with one place an image, and the pictures as the model sees.

The pictures are sent as the contract's own encoder leaves them: upright, in RGB, at the size that
the model sees, without loss. What is left to vLLM's processor is to take them as they are, and that
is proven (``proof``). Text goes as tokens, so that a control token in somebody's words stays text.
"""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image as Pictures

from vlmtune.errors import ContractMismatchError
from vlmtune.models.encode import Encoded, Encoder
from vlmtune.models.family import Tokens
from vlmtune.serving.settings import Settings

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

FASTEST = 1  # PNG's compression: the file goes to the next process and no further


def question(
    encoder: Encoder, encoded: Encoded, settings: Settings, max_tokens: int
) -> dict[str, Any]:
    """The request that vLLM is sent.

    Args:
        encoder: The encoder of the contract.
        encoded: The question.
        settings: How to answer.
        max_tokens: Longest answer.

    Raises:
        ContractMismatchError: If an image does not stand in one place.
    """
    sampling: dict[str, Any] = {
        "n": settings.n,
        "max_tokens": max_tokens,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        # Ends are the contract's, not what a folder's generation config says besides.
        "ignore_eos": True,
        "stop_token_ids": sorted(encoder.end_ids),
        "detokenize": False,
    }
    if settings.seed is not None:
        sampling["seed"] = settings.seed
    if settings.logprobs:
        sampling["logprobs"] = settings.top_logprobs
    asked: dict[str, Any] = {
        "model": "model",
        "token_ids": folded(encoder, encoded.tokens),
        "sampling_params": sampling,
        "stream": True,
        "return_token_ids": True,
    }
    pictures = seen(encoder, encoded)
    if pictures:
        asked["content_parts"] = [
            {"type": "image_url", "url": data_url(picture)} for picture in pictures
        ]
    return asked


def seen(encoder: Encoder, encoded: Encoded) -> list[Picture]:
    """The pictures of a question as the model sees them, one an image."""
    sizes = encoded.tokens.image_sizes
    policy = encoder.family.row_policy(encoder.contract.image, len(sizes))
    arrays = encoder.family.pictures(encoded.vision, sizes, policy) if sizes else []
    return [Pictures.fromarray(np.ascontiguousarray(array)) for array in arrays]


def folded(encoder: Encoder, tokens: Tokens) -> list[int]:
    """The ids with one image token an image; vLLM unfolds them to as many as it sees.

    Raises:
        ContractMismatchError: If the tokens of an image do not stand side by side.
    """
    family = encoder.family
    policy = family.row_policy(encoder.contract.image, len(tokens.image_sizes))
    ids, mask = tokens.ids.tolist(), tokens.image_mask.tolist()
    kept: list[int] = []
    place = 0
    for size in tokens.image_sizes:
        start = mask.index(True, place)
        end = start + family.visual_tokens(size, policy)
        if not all(mask[start:end]) or len(set(ids[start:end])) > 1:
            raise ContractMismatchError(
                f"--engine vllm: the family {family.facts.name} shows an image in several pieces "
                "with other tokens between them, which vLLM has no single place for"
            )
        kept += [*ids[place:start], ids[start]]
        place = end
    return kept + ids[place:]


def data_url(picture: Picture) -> str:
    """A picture without loss and without anything beside its pixels."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=FASTEST)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
