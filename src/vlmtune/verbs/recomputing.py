"""What of the activations a run computes again, where its recipe leaves that open.

Computing again costs time, so it is done where the forecast of memory says that it must be, and for
that part of the model where it costs least. A run decides once, before anything trains: what it
decided is in its folder, and holds for whoever continues it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from vlmtune.batching.feature_store import MemoryStore
from vlmtune.batching.planner import Plan
from vlmtune.batching.vision_cache import CachingEncoder
from vlmtune.data.dataset import Rows
from vlmtune.files import write_json
from vlmtune.forecast.devices import CONTEXT_BYTES, PROCESS_BYTES, USABLE
from vlmtune.forecast.survey import cut
from vlmtune.models.empty import empty_model
from vlmtune.models.encode import Encoder
from vlmtune.models.load import BaseSource
from vlmtune.recipe import Recipe
from vlmtune.runs.folder import RunFolder
from vlmtune.training.distributed.ranks import Ranks
from vlmtune.verbs.machine import available_memory
from vlmtune.verbs.start import Recomputed, place_of, stated

if TYPE_CHECKING:
    from vlmtune.verbs.tracing import Tracing

logger = logging.getLogger(__name__)

MARGIN = {"cuda": 0.9, "cpu": 0.8}  # of what is there; the rest is for what no forecast sees
BYTES = 8  # a number that goes into or out of a layer, and what functions behind it keep
PLAINLY = 0.5  # what is at most this part of the room is not traced: it fits


@dataclass(frozen=True)
class Decision:
    """What is computed again, and why.

    Attributes:
        recomputed: The part.
        peaks: Highest memory in bytes as it was forecast, of each part that was looked at; of
            ``nothing`` alone, and no more than this, where that plainly fits.
        room: Bytes that were there.
    """

    recomputed: Recomputed
    peaks: Mapping[Recomputed, int]
    room: int

    def __str__(self) -> str:
        looked = ", ".join(f"{part} {peak / 1e9:.2f} GB" for part, peak in self.peaks.items())
        return (
            f"training.gradient_checkpointing=auto: {self.recomputed} is computed again "
            f"(peak by what is: {looked}; there are {self.room / 1e9:.2f} GB)"
        )


def choose(
    tracing: Tracing, packs: Iterable[Sequence[int]], room: int, *, several: bool
) -> Decision:
    """What to compute again: nothing if that fits, else what costs least of what fits.

    Args:
        tracing: The recipe's steps.
        packs: The heaviest packs, as indices of rows.
        room: Bytes that are there.
        several: Whether a step has several packs.

    Returns:
        The decision; what needs least memory where nothing fits.
    """
    packs = list(dict.fromkeys(tuple(rows) for rows in packs))
    peaks: dict[Recomputed, int] = {}
    peaks["nothing"], _ = tracing.peak(packs, "nothing", several=several)
    if peaks["nothing"] <= room:
        return Decision("nothing", peaks, room)
    model, facts = tracing.tuned("nothing").model, tracing.encoder.family.facts
    if not model.supports_gradient_checkpointing:
        return Decision("nothing", peaks, room)
    seen = model.get_submodule(facts.vision_tower).parameters()
    parts: tuple[Recomputed, ...] = ("language",)
    if any(each.requires_grad for each in seen):
        parts = ("vision", "language", "all")
    costs: dict[Recomputed, float] = {}
    for part in parts:
        peaks[part], costs[part] = tracing.peak(packs, part, several=several)
    fitting = [part for part in parts if peaks[part] <= room and costs[part]]
    if fitting:
        return Decision(min(fitting, key=costs.__getitem__), peaks, room)
    return Decision(min(peaks, key=peaks.__getitem__), peaks, room)


def room_here(device: torch.device, processes: int) -> int:
    """Bytes that each process of a run may take on this machine, with a margin.

    To be asked before weights are loaded: what is held already is not there any more.
    """
    if device.type == "cuda":
        free, whole = torch.cuda.mem_get_info(device)
        return int(min(free, whole - CONTEXT_BYTES) * USABLE * MARGIN["cuda"])
    # All are on one machine, and none has its kernels yet.
    return max(0, int(available_memory() * MARGIN["cpu"]) // processes - PROCESS_BYTES)


def rough_peak(model: nn.Module, recipe: Recipe, tower: str, pixels: int, tokens: int) -> int:
    """More bytes than a step takes, from the shapes of the linear layers; costs nothing.

    Args:
        model: The base, empty or not.
        recipe: The recipe.
        tower: Name of the vision tower.
        pixels: Numbers of all channels of the pack's images.
        tokens: Of the pack.
    """
    patches = pixels // 588 + 1  # 3 x 14 x 14 numbers; larger patches are fewer
    inside = set(model.get_submodule(tower).modules())
    total = sum(4 * each.numel() for each in model.parameters())
    if not recipe.tuning.adapts:
        total *= 4
    for module in model.modules():
        if isinstance(module, nn.Linear):
            width = module.in_features + module.out_features
            total += BYTES * width * (patches if module in inside else tokens)
            total += 16 * width * recipe.tuning.rank * recipe.tuning.adapts
    return total


def decide(  # noqa: PLR0913
    recipe: Recipe,
    base: BaseSource,
    encoder: Encoder,
    plan: Plan,
    rows: Rows,
    folder: RunFolder,
    ranks: Ranks,
    room: int,
    told: Callable[[str], None],
) -> Recomputed:
    """What a run computes again: what the recipe says, what the run has decided, or a decision.

    All processes call; the first decides for all.

    Args:
        recipe: The run's recipe.
        base: Its base.
        encoder: The run's, with features where they are kept.
        plan: What is trained.
        rows: The training split.
        folder: The run's.
        ranks: The processes.
        room: Bytes that were there before the weights.
        told: Called with a decision that somebody should know of.
    """
    said = stated(recipe)
    if said is not None:
        return said
    found: dict[str, Any] | None = None
    if ranks.first:
        if not folder.recomputed.exists():
            room = max(0, room - _kept(recipe, encoder))
            decision = _decision(recipe, base, encoder, plan, rows, ranks.count, room)
            (logger.info if decision.recomputed == "nothing" else told)(str(decision))
            write_json(folder.recomputed, asdict(decision))
        found = json.loads(folder.recomputed.read_text(encoding="utf-8"))
    return cast("Recomputed", ranks.gather_json(found)[0]["recomputed"])


def _kept(recipe: Recipe, encoder: Encoder) -> int:
    """Bytes of image features that lie where the step's tensors will."""
    if not isinstance(encoder, CachingEncoder) or place_of(recipe)[0].type == "cuda":
        return 0
    return encoder.cache.store.bytes if isinstance(encoder.cache.store, MemoryStore) else 0


def _decision(
    recipe: Recipe,
    base: BaseSource,
    encoder: Encoder,
    plan: Plan,
    rows: Rows,
    processes: int,
    room: int,
) -> Decision:
    taken = cut(plan)
    packs = dict.fromkeys((taken.longest, taken.largest))
    tower, model = encoder.family.facts.vision_tower, empty_model(base.folder)
    rough = 0
    for pack in packs:
        encoded = encoder.encode_together([rows[index] for index in pack])
        inputs = [each for row in encoded for each in row.vision.values()]
        pixels = sum(each.numel() for each in inputs if each.is_floating_point())
        tokens = int(plan.lengths[list(pack)].sum())
        rough = max(rough, rough_peak(model, recipe, tower, pixels, tokens))
    if rough <= PLAINLY * room:
        return Decision("nothing", {"nothing": rough}, room)
    from vlmtune.verbs.tracing import Tracing  # what traces is loaded where something is traced

    gpu = place_of(recipe)[0].type == "cuda"
    tracing = Tracing(recipe, base, encoder, rows, gpu, processes)
    try:
        return choose(tracing, packs, room, several=taken.most > processes)
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        # A class whose forward asks for what shapes do not tell trains all the same.
        part: Recomputed = (
            "all" if rough > room and model.supports_gradient_checkpointing else "nothing"
        )
        logger.warning(
            "training.gradient_checkpointing=auto: a step's memory cannot be forecast (%s: %s); by "
            "the widths of the layers, %s is computed again",
            type(error).__name__,
            str(error).split("\n", maxsplit=1)[0][:200],
            part,
        )
        return Decision(part, {"nothing": rough}, room)
