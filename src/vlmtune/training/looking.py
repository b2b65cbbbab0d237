"""Whether images are looked at once for all epochs, and the proof that this changes nothing."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vlmtune.batching.collate import pack
from vlmtune.batching.feature_store import DiskStore, MemoryStore, features_bytes
from vlmtune.batching.proof import TOLERANCE
from vlmtune.batching.vision_cache import CachingEncoder, Forecast, VisionCache, identity_of
from vlmtune.data.conversation import Conversation
from vlmtune.errors import RecipeError
from vlmtune.models.encode import Encoded, Encoder
from vlmtune.models.features import FEATURES, image_features
from vlmtune.models.load import DTYPES
from vlmtune.training.config import TrainingConfig
from vlmtune.training.loss import label_logits
from vlmtune.training.optim import autocast

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

FOLDER = Path("~/.cache/vlmtune/vision")  # of all runs
LAST = 4  # tokens whose logits are compared
SAMPLES = 4  # rows whose features are compared with live ones before they are relied upon
TOKENS_TOGETHER = {"cuda": 4096}  # visual tokens; elsewhere the images of a row
GB = 10**9


@dataclass(frozen=True)
class Part:
    """Rows of which each is used so many times in a run.

    Attributes:
        rows: A split.
        indices: Which of it.
        times: Uses of a row: epochs, measurements.
    """

    rows: Sequence[Conversation]
    indices: Sequence[int]
    times: float

    def __iter__(self) -> Iterator[Conversation]:
        return (self.rows[int(index)] for index in self.indices)

    def __len__(self) -> int:
        return len(self.indices)

    def some(self) -> list[Conversation]:
        """A few rows with images, from all over."""
        apart = max(1, len(self) // SAMPLES)
        shifts = (self.indices[shift::apart] for shift in range(apart))
        rows = (self.rows[int(index)] for index in chain.from_iterable(shifts))
        return list(islice((row for row in rows if row.images), SAMPLES))


@dataclass(frozen=True)
class Keeping:
    """How features are kept.

    Attributes:
        mode: ``memory``, ``disk``, or ``auto``: in memory, and only where images are seen twice.
        gb: Most to keep, in GB.
        compute: Number format of the matrix products, which the caller has set.
        workers: Threads that decode ahead of the tower.
    """

    mode: str
    gb: float
    compute: torch.dtype
    workers: int = 0


def looking_once(
    model: PreTrainedModel,
    encoder: Encoder,
    parts: Iterable[Part],
    config: TrainingConfig,
    refusal: str | None,
    progress: Callable[[int, int], None] | None = None,
) -> Encoder:
    """The encoder for a run: one that knows all images' features, where that is right and pays.

    Args:
        model: The model, its vision tower as it will be during the run.
        encoder: Its encoder.
        parts: What the run looks at.
        config: The recipe's ``training``.
        refusal: Why features cannot be kept, or None.
        progress: Called with (rows so far, all rows).

    Raises:
        RecipeError: If a cache is asked for that cannot be.
    """
    if config.vision_cache == "off":
        return encoder
    check_refusal(config, refusal)
    if refusal is not None:
        logger.info("images are looked at every time: %s", refusal)
        return encoder
    compute = DTYPES[config.precision]
    keeping = Keeping(config.vision_cache, config.vision_cache_gb, compute, config.workers)
    with autocast(config, model.device):
        return with_features(model, encoder, list(parts), keeping, progress)


def check_refusal(config: TrainingConfig, refusal: str | None) -> None:
    """Find that features are asked for and cannot be kept.

    Raises:
        RecipeError: Naming the option.
    """
    if refusal is not None and config.vision_cache in ("memory", "disk"):
        raise RecipeError(
            f"training.vision_cache: found {config.vision_cache}, and {refusal}. Use "
            "training.vision_cache=off, or auto, which does without where it must"
        )


def with_features(
    model: PreTrainedModel,
    encoder: Encoder,
    parts: Sequence[Part],
    keeping: Keeping,
    progress: Callable[[int, int], None] | None = None,
) -> Encoder:
    """An encoder that knows the features of all images, if they fit and prove right.

    Args:
        model: The model, its vision tower as it will be.
        encoder: Its encoder, which is returned where features are not kept.
        parts: What will be looked at.
        keeping: Where, and how much.
        progress: Called with (rows so far, all rows).
    """
    started = time.perf_counter()
    chosen, needed = _worth(model, encoder, parts, always=keeping.mode != "auto")
    if not chosen:
        return encoder
    limit, on_disk = round(keeping.gb * GB), keeping.mode == "disk"
    if needed > limit:
        logger.warning(
            "images are looked at every time: their features take %.2f GB, and "
            "training.vision_cache_gb is %g. Raise it%s",
            needed / GB,
            keeping.gb,
            "" if on_disk else ", or set training.vision_cache=disk",
        )
        return encoder
    try:
        store = DiskStore(FOLDER.expanduser(), limit) if on_disk else MemoryStore(limit)
    except OSError as error:
        logger.warning("images are looked at every time: %s cannot be used: %s", FOLDER, error)
        return encoder
    facts = encoder.family.facts
    identity = identity_of(model, facts, encoder.contract, keeping.compute)
    cache = VisionCache(encoder, store, identity)
    looked = 0
    for part in chosen:
        looked += cache.fill(
            model,
            part,
            workers=keeping.workers,
            group_tokens=TOKENS_TOGETHER.get(model.device.type, 0),
            progress=partial(_tell, progress, len(part)),
        )
    caching = CachingEncoder(cache)
    fault = fault_of(model, encoder, caching, chosen)
    if fault is not None:
        logger.warning("images are looked at every time: %s", fault)
        return encoder
    logger.info(
        "%d images were looked at, once for all: %.3f GB of features %s, %.1f s",
        looked,
        needed / GB,
        f"in {FOLDER}" if on_disk else "in memory",
        time.perf_counter() - started,
    )
    return caching


def worth(encoder: Encoder, parts: Iterable[Part], *, always: bool) -> list[tuple[Part, Forecast]]:
    """The parts whose features are worth keeping, and what is known of their images."""
    counting = VisionCache(encoder, MemoryStore(0), "")
    found = [(part, counting.forecast(part, part.times)) for part in parts]
    return [(part, each) for part, each in found if each.sightings and (always or each.pays)]


def _worth(
    model: PreTrainedModel, encoder: Encoder, parts: Sequence[Part], *, always: bool
) -> tuple[list[Part], float]:
    """The parts whose features are worth keeping, and the bytes they take."""
    found = worth(encoder, parts, always=always)
    chosen, tokens = [part for part, _ in found], sum(each.tokens for _, each in found)
    sample = next((row for row in chain.from_iterable(chosen) if row.images), None)
    if sample is None:
        logger.info("images are looked at every time: hardly any is seen twice")
        return [], 0
    seen = live_features(model, encoder, encoder.encode(sample, ask=True))
    return chosen, tokens * features_bytes(seen) / len(seen[FEATURES])


def _tell(progress: Callable[[int, int], None] | None, rows: int, done: int) -> None:
    if progress is not None:
        progress(done, rows)


def live_features(model: PreTrainedModel, encoder: Encoder, row: Encoded) -> dict[str, Tensor]:
    """What the tower makes of a row's images now."""
    (features,) = image_features(model, encoder.family, row.vision, [row.tokens.visual])
    return features


def fault_of(
    model: PreTrainedModel, live: Encoder, caching: Encoder, parts: Iterable[Part]
) -> str | None:
    """Compare what is kept with what the tower makes now, for some rows of each part.

    The features must be those that the tower makes in training, the logits those that pixels give,
    and other features must give others: else the model would not be looking at them at all.

    Returns:
        What is wrong, or None.
    """
    training = model.training
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices), torch.no_grad():
            rows = chain.from_iterable(part.some() for part in parts)
            faults = (_fault(model, live, caching, row) for row in rows)
            return next((fault for fault in faults if fault is not None), None)
    finally:
        model.train(training)


def _fault(
    model: PreTrainedModel, live: Encoder, caching: Encoder, row: Conversation
) -> str | None:
    pixels = live.encode(row, ask=True)
    (kept,) = caching.encode_together([row], ask=True)
    if FEATURES not in kept.vision:
        return f"the features of row {row.id!r} could not be kept"
    model.train()  # where a tower drops features at random, it shows here
    features = live_features(model, live, pixels)
    model.eval()
    for name, tensor in features.items():
        apart = _apart(kept.vision[name].to(tensor.device), tensor)
        if not apart <= _tolerance(tensor):
            return (
                f"what is kept of row {row.id!r} differs from what the vision tower makes now "
                f"({name}, by {apart:.1g} of the largest)"
            )
    seen, known = (_logits(model, live, each) for each in (pixels, kept))
    if not _apart(known, seen) <= _tolerance(seen):
        return (
            f"with what is kept of row {row.id!r}, the model says something else than with pixels"
        )
    other = replace(kept, vision={name: -tensor for name, tensor in kept.vision.items()})
    if torch.equal(_logits(model, live, other), known):
        return "the model does not look at features that it is given"
    return None


def _logits(model: PreTrainedModel, encoder: Encoder, row: Encoded) -> Tensor:
    """Of the last tokens of a question, and of the first of its answer."""
    batch = pack(encoder.family, [row])
    last = torch.zeros_like(batch.predicts)
    last[:, -LAST:] = True
    return label_logits(model, encoder.family, replace(batch, predicts=last).to(model.device))


def _apart(a: Tensor, b: Tensor) -> float:
    """Largest difference, of the largest value."""
    if a.shape != b.shape:
        return float("inf")
    return float((a.float() - b.float()).abs().max() / b.float().abs().max())


def _tolerance(tensor: Tensor) -> float:
    return TOLERANCE.get(tensor.dtype, TOLERANCE[torch.bfloat16])
