"""How often a run will look at each image: as ``look`` decides it, without a weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vlmtune.batching.feature_store import MemoryStore, features_bytes
from vlmtune.batching.planner import Plan
from vlmtune.batching.vision_cache import CachingEncoder, Forecast, VisionCache
from vlmtune.data.conversation import Conversation
from vlmtune.data.dataset import Rows
from vlmtune.forecast.shadow import Traced
from vlmtune.forecast.survey import Amounts, Survey, amounts
from vlmtune.models.empty import empty_model
from vlmtune.models.encode import Encoder
from vlmtune.models.features import FEATURES
from vlmtune.training.distributed.ranks import Ranks
from vlmtune.training.looking import GB, check_refusal, worth
from vlmtune.verbs.looking import parts_of_run, why_not
from vlmtune.verbs.tracing import Tracing


@dataclass(frozen=True)
class Look:
    """The one look at all images that are trained on.

    Attributes:
        traced: A look at the images of some rows.
        own: The amounts of these rows.
        images: Their images.
        tokens: Their visual tokens.
        all: What is known of all images.
    """

    traced: Traced
    own: Amounts
    images: int
    tokens: int
    all: Forecast

    @property
    def amounts(self) -> Amounts:
        """Of all images, each once."""
        return replace(self.own, area=self.all.area, area_squares=self.all.area_squares)

    @property
    def kernels(self) -> float:
        """Of as many looks as this one as it takes."""
        return self.traced.kernels * self.all.tokens / self.tokens


@dataclass(frozen=True)
class Sightings:
    """How often a run looks at the images that it trains on.

    Attributes:
        why_not: Why at all of them in every epoch; None: once.
        look: The one look, or None.
        kept: Bytes of features, those of the images that are only measured on too.
        shapes: What stands for some visual tokens: no contents, ``(tokens, width)`` each.
    """

    why_not: str | None
    look: Look | None = None
    kept: int = 0
    shapes: Mapping[str, Tensor] | None = None

    def encoder(self, encoder: Encoder) -> Encoder:
        """What encodes the rows that are trained on: with features where they are kept."""
        if self.look is None or self.shapes is None:
            return encoder
        return CachingEncoder(_Shapes(encoder, self.shapes))

    def told(self) -> dict[str, Any]:
        """For ``plan --json``."""
        once = self.look is not None
        told: dict[str, Any] = {"once": once, "why_not": self.why_not, "feature_bytes": self.kept}
        if self.look is not None:
            told |= {"images": self.look.all.images, "sightings": round(self.look.all.sightings)}
        return told


class _Shapes(VisionCache):
    """Finds features for every row; nothing is in them."""

    def __init__(self, encoder: Encoder, shapes: Mapping[str, Tensor]) -> None:
        super().__init__(encoder, MemoryStore(0), "")
        self._shapes = shapes

    def find(self, row: Conversation) -> dict[str, Tensor]:
        """Zeros; of a row without images, nothing."""
        tokens = self.encoder.tokens(row).visual
        return {
            name: torch.zeros((tokens, *each.shape[1:]), dtype=each.dtype)
            for name, each in self._shapes.items()
            if tokens
        }


def sightings(
    tracing: Tracing, plan: Plan, found: Survey, some: Sequence[int], validation: Rows
) -> Sightings:
    """Decide as ``train`` does, whose comparison with live features is taken to succeed.

    Args:
        tracing: The recipe's steps.
        plan: What is trained.
        found: What is known of the rows.
        some: The rows with the most visual tokens that are looked at together.
        validation: What is measured on.

    Raises:
        RecipeError: If a cache is asked for that cannot be.
    """
    recipe, encoder, rows = tracing.recipe, tracing.encoder, tracing.rows
    config = recipe.training
    if config.vision_cache == "off":
        return Sightings("training.vision_cache is off")
    model = empty_model(tracing.base.folder)
    refusal = why_not(model, encoder, recipe, Ranks(count=tracing.devices))
    check_refusal(config, refusal)
    if refusal is not None:
        return Sightings(refusal)
    parts = parts_of_run(recipe, plan, rows, validation)
    chosen = worth(encoder, parts, always=config.vision_cache != "auto")
    if not chosen or not found.images[list(some)].any():
        return Sightings("hardly any is seen twice")
    traced, shapes = tracing.look(some)
    tokens = len(shapes[FEATURES])
    kept = round(sum(each.tokens for _, each in chosen) * features_bytes(shapes) / tokens)
    if kept > config.vision_cache_gb * GB:
        return Sightings(
            f"their features take {kept / GB:.2f} GB, and training.vision_cache_gb is "
            f"{config.vision_cache_gb:g}"
        )
    trained = next((each for part, each in chosen if part is parts[0]), None)
    if trained is None:
        return Sightings("hardly any is seen twice in training", kept=kept)
    own, images = amounts(found, plan, some), int(found.images[list(some)].sum())
    return Sightings(None, Look(traced, own, images, tokens, trained), kept, shapes)
