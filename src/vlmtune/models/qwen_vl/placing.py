"""Where an image stands among the token ids, and putting its features there.

An image is ``<img>``, as many placeholders as it has tokens, ``</img>``. What the placeholders are
does not matter: the original wrote a path into them, byte by byte, and padded with ``<imgpad>``.
Here nothing in a text is ever opened.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def image_spans(input_ids: Tensor, start_id: int, length: int) -> tuple[Tensor, Tensor]:
    """Rows and places of the complete images: of ``<img>`` with ``</img>`` right behind ``length``.

    Args:
        input_ids: Shape ``(rows, tokens)``.
        start_id: Id of ``<img>``; that of ``</img>`` follows it.
        length: Placeholders of an image.

    Returns:
        Row of each image, and place of its ``<img>``, both ``(images,)``, in reading order.
    """
    if input_ids.shape[1] < length + 2:
        nothing = input_ids.new_empty(0)
        return nothing, nothing
    starts = input_ids[:, : -length - 1] == start_id
    ends = input_ids[:, length + 1 :] == start_id + 1
    rows, places = (starts & ends).nonzero(as_tuple=True)
    return rows, places


def place_images(states: Tensor, spans: tuple[Tensor, Tensor], features: Tensor | None) -> Tensor:
    """Embeddings with the features of the images in the places of their placeholders.

    Args:
        states: Embeddings, shape ``(rows, tokens, width)``.
        spans: As ``image_spans`` gives them.
        features: Shape ``(images, tokens of an image, width)``, or None.

    Raises:
        ValueError: If there are not as many images as spans.
    """
    rows, places = spans
    images = 0 if features is None else len(features)
    if len(rows) != images:
        raise ValueError(
            f"input_ids hold {len(rows)} complete images (<img>, placeholders, </img>) and "
            f"{images} were given as pixel_values or mm_encoder_outputs; expected one for each, in "
            "reading order. Was a row cut inside an image?"
        )
    if features is None or not images:
        return states
    within = torch.arange(1, features.shape[1] + 1, device=states.device)
    return states.index_put(
        (rows.unsqueeze(1), places.unsqueeze(1) + within), features.to(states.dtype)
    )


def features_per_row(
    spans: tuple[Tensor, Tensor], rows: int, features: Sequence[Tensor] | Tensor
) -> list[list[Tensor]]:
    """The features of each row's images."""
    counts = torch.bincount(spans[0], minlength=rows).tolist()
    left = iter(features)
    return [[next(left) for _ in range(count)] for count in counts]
