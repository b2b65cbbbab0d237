"""``plan``: what a run will need, before it starts. No weight is read and nothing is trained."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from vlmtune.batching.planner import Plan
from vlmtune.data.dataset import PreparedDataset, Rows
from vlmtune.data.mixture import Dataset, open_sources
from vlmtune.errors import UsageError
from vlmtune.forecast.devices import HERE, Device, device_named
from vlmtune.forecast.needs import (
    NF4_BYTES,
    Held,
    Pace,
    exchanged,
    memory,
    pace,
    vision_work,
    whole_work,
)
from vlmtune.forecast.shadow import Traced
from vlmtune.forecast.survey import Cut, Survey, amounts, cut, survey
from vlmtune.models.contract import BaseModelIdentity, make_contract
from vlmtune.models.encode import Encoder
from vlmtune.models.families import load_family
from vlmtune.models.load import BaseSource
from vlmtune.models.quantize import plan_quantization, within
from vlmtune.recipe import Recipe, as_recipe
from vlmtune.runs.resolve import fetch_base
from vlmtune.training.fitting import TOKENS_PER_FORWARD
from vlmtune.training.prepare_rows import plan_rows
from vlmtune.tuning.parts import count_parts
from vlmtune.verbs.observer import Observer
from vlmtune.verbs.recomputing import MARGIN, Decision, choose, room_here
from vlmtune.verbs.sightings import Sightings, sightings
from vlmtune.verbs.start import Recomputed, place_of, stated
from vlmtune.verbs.tracing import Tracing, in_few_bits

MFU = (
    0.4  # the part of a device's best that is reached; the recipe page says when it is more or less
)


def plan(
    recipe: Recipe | str | Path,
    *,
    device: str = HERE,
    devices: int = 1,
    mfu: float = MFU,
    observer: Observer | None = None,
    **overrides: Any,
) -> dict[str, Any]:
    """Forecast a run: parameters, tokens, FLOPs, steps, memory, time.

    Args:
        recipe: A recipe, the name of a shipped one, or a YAML file.
        device: A device by name; ``here`` measures this machine's for a moment.
        devices: Processes, one a device; how they share is the recipe's ``distributed``.
        mfu: The part of the device's best that is reached.
        observer: Who is told how it goes.
        **overrides: Options with ``__`` for the dot: ``training__batch_size=8``.

    Returns:
        The keys of ``vlmtune plan --json``.

    Raises:
        UsageError: If the recipe names no data, or nobody knows the device.
        RefusedError: If no row of the data can be trained.
    """
    recipe = as_recipe(recipe, overrides)
    if devices < 1 or not 0 < mfu <= 1:
        raise UsageError("--devices: at least 1; --mfu: above 0, at most 1")
    observer = observer or Observer()
    target = device_named(device)
    return _Forecast(recipe, target, devices, mfu, observer).told()


@dataclass
class _Forecast:
    """One forecast on its way."""

    recipe: Recipe
    device: Device
    devices: int
    mfu: float
    observer: Observer
    recomputed: Recomputed = "nothing"

    @cached_property
    def base(self) -> BaseSource:
        model = self.recipe.model
        self.observer.stage("opening the model")
        return fetch_base(model.base, model.hub, model.revision)

    @cached_property
    def encoder(self) -> Encoder:
        data = self.recipe.data
        family = load_family(str(self.base.folder), self.recipe.model.backend)
        family = family.packing() or family  # which only loaded weights prove; most classes do
        contract = make_contract(
            family,
            # Nothing is compared with the weights here: hashing gigabytes would tell nothing.
            BaseModelIdentity(id=self.base.id, weights_sha256=""),
            self.recipe.image,
            system_prompt=data.system_prompt,
            prompt=data.prompt,
            instruction=data.instruction,
        )
        return Encoder(family, contract)

    @cached_property
    def dataset(self) -> Dataset:
        return _opened(self.recipe)

    @cached_property
    def rows(self) -> Rows:
        return self.dataset.split("train")

    @cached_property
    def found(self) -> Survey:
        self.observer.stage("measuring rows")
        answers = self.recipe.data.answers
        return survey(self.rows, self.encoder, self.observer.progress, answers)

    def plan_of(self, budget: int) -> Plan:
        data = self.recipe.data
        made, _ = plan_rows(
            self.rows,
            self.found.measured,
            self.recipe.training,
            max_length=data.max_length,
            too_long=data.too_long,
            token_budget=budget,
        )
        return made

    @cached_property
    def budget(self) -> int:
        kind = "cuda" if self.device.gpu else "cpu"
        return self.recipe.training.token_budget or TOKENS_PER_FORWARD[kind]

    @cached_property
    def made(self) -> Plan:
        return self.plan_of(self.budget)

    @cached_property
    def taken(self) -> Cut:
        return cut(self.made)

    @cached_property
    def seen(self) -> Sightings:
        """Whether images are looked at once for all."""
        plain = Tracing(
            self.recipe, self.base, self.encoder, self.rows, self.device.gpu, self.devices
        )
        # On a GPU as many go through the tower as a pack has, on a CPU those of a row.
        visual = np.array(self.found.measured.visual)[self.made.kept]
        most = (int(self.made.kept[np.argmax(visual)]),)
        some = self.taken.largest if self.device.gpu else most
        self.observer.stage("counting images")
        return sightings(plain, self.made, self.found, some, self.dataset.split("validation"))

    @cached_property
    def tracing(self) -> Tracing:
        encoder = self.seen.encoder(self.encoder)
        return Tracing(self.recipe, self.base, encoder, self.rows, self.device.gpu, self.devices)

    @cached_property
    def features(self) -> int:
        """Bytes of image features where the step's tensors are."""
        elsewhere = self.device.gpu or self.recipe.training.vision_cache == "disk"
        return 0 if elsewhere else self.seen.kept

    def told(self) -> dict[str, Any]:
        recipe, made, taken = self.recipe, self.made, self.taken
        # Of each step's packs a process gets its share.
        forwards = max(1.0, taken.forwards / self.devices)
        several = taken.most > self.devices
        self.observer.stage("forecasting")
        packs = dict.fromkeys((taken.longest, taken.largest))
        decision = self.decision(packs, several=several)
        recomputed = self.recomputed = decision.recomputed
        traced = [
            (
                self.tracing.trace(each, recomputed, several=several),
                amounts(self.found, made, each),
                int(self.found.images[list(each)].sum()),
            )
            for each in packs
        ]
        model, facts = self.tracing.tuned(recomputed).model, self.encoder.family.facts
        held = self.tracing.held(model)
        heaviest = max(traced, key=lambda each: each[0].peak)
        parts = self.memory(heaviest[0], held)
        run = amounts(self.found, made, taken.rows, taken.scale)
        layers = _tower_layers(model, facts.vision_tower)
        work, look = whole_work(traced, run, layers), self.seen.look
        if look is not None:
            work |= vision_work(look.traced, look.own, look.images, look.amounts, layers)
        flops = sum(work.values()) - work["again"]
        speed = self.speed(work, made, forwards, heaviest[0], held)
        all_of = count_parts(model, facts, trainable=False)
        training = count_parts(model, facts, trainable=True)
        peak = sum(parts.values())
        return {
            "peak_memory_bytes": peak,
            "flops": flops,
            "tokens": round(run.tokens),
            "steps": made.steps,
            "trainable_parameters": sum(training.values()),
            "parts": {
                name: {"parameters": count, "trainable": training[name]}
                for name, count in all_of.items()
            },
            "memory": parts,
            "recomputed": asdict(decision),
            "vision_cache": self.seen.told(),
            "flops_by_part": work,
            "samples": made.samples,
            "labels": round(run.labels),
            "rows": {"trained": len(made.kept), "left_out": len(made.lengths) - len(made.kept)},
            "forwards_per_step": taken.forwards,
            "token_budget": self.budget,
            "longest": self.longest(made, taken),
            "device": self.told_device(),
            "devices": self.devices,
            "strategy": recipe.distributed.strategy if self.devices > 1 else None,
            "seconds": speed.seconds,
            "time": {**vars(speed), "mfu_assumed": self.mfu},
            "fits": peak <= self.device.room,
            "advice": []
            if peak <= self.device.room
            else self.advice(peak, heaviest[0], taken, made),
        }

    def memory(self, step: Traced, held: Held) -> dict[str, int]:
        """Bytes at the peak, by what holds them: of a step, or of the look before them all."""
        looks = [step] if self.seen.look is None else [step, self.seen.look.traced]
        shares = self.recipe.distributed
        found = [memory(each, held, shares, self.devices) for each in looks]
        parts = max(found, key=lambda each: sum(each.values()))
        return parts | ({"image features": self.features} if self.features else {})

    def decision(self, packs: Iterable[Sequence[int]], *, several: bool) -> Decision:
        """What is computed again: as the recipe says, or as ``train`` would decide."""
        said, margin = stated(self.recipe), MARGIN["cuda" if self.device.gpu else "cpu"]
        room = int(self.device.room * margin)
        if self.device.measured:
            room = room_here(place_of(self.recipe)[0], self.devices)
        room = max(0, room - self.features)
        if said is not None:
            return Decision(said, {}, room)
        return choose(self.tracing, packs, room, several=several)

    def told_device(self) -> dict[str, Any]:
        device, precision = self.device, self.recipe.training.precision
        return {
            "name": device.name,
            "measured": device.measured,
            "flops_per_second": device.rate(precision),
            "memory_bytes": device.memory,
            "room_bytes": device.room,
        }

    def longest(self, made: Plan, taken: Cut) -> dict[str, Any]:
        """The packs that memory was forecast of."""
        return {
            name: {
                "rows": [self.rows.ids[index] for index in each[:8]],
                "tokens": int(made.lengths[list(each)].sum()),
                "pixels": round(float(self.found.areas[list(each)].sum())),
            }
            for name, each in (("tokens", taken.longest), ("pixels", taken.largest))
        }

    def speed(
        self, work: dict[str, float], made: Plan, forwards: float, traced: Traced, held: Held
    ) -> Pace:
        rate = self.device.rate(self.recipe.training.precision) * self.mfu
        shares = self.recipe.distributed
        return pace(
            sum(work.values()),
            rate,
            self.device,
            steps=made.steps,
            samples=made.samples,
            forwards=forwards,
            kernels=traced.kernels,
            exchanged=exchanged(held, shares, self.devices, forwards),
            processes=self.devices,
            once=0.0 if self.seen.look is None else self.seen.look.kernels,
        )

    def advice(self, peak: int, heaviest: Traced, taken: Cut, made: Plan) -> list[dict[str, Any]]:
        """What to change where the job does not fit, and the peak it would have then."""
        room, recipe = self.device.room, self.recipe
        found: list[tuple[str, int]] = []
        rows = taken.longest
        longest_row = int(made.lengths[made.kept].max())
        budget = max(longest_row, self.budget // 2)
        if len(rows) > 1 and budget < self.budget:
            smaller = cut(self.plan_of(budget))
            found.append((f"training.token_budget={budget}", self._peak(recipe, smaller.longest)))
        if stated(recipe) == "nothing":
            again, _ = self.tracing.peak([rows], "all", several=True)
            found.append(("training.gradient_checkpointing=true", again + self.features))
        if self.tracing.quantized is None and recipe.tuning.adapts:
            found.append(("tuning.method=qlora", peak - self._saved_by_qlora()))
        elif not recipe.tuning.adapts:
            tuning = recipe.tuning.model_copy(update={"method": "lora"})
            changed = recipe.model_copy(update={"tuning": tuning})
            found.append(("tuning.method=lora", self._peak(changed, rows)))
        if self.devices == 1 or not recipe.distributed.cuts_weights:
            found.append(("distributed.strategy=fsdp2 on more devices", self._sliced(heaviest)))
        if self.found.areas[list(taken.largest)].sum() > 0 and recipe.image.size is None:
            found.append(self._fewer_pixels(peak, heaviest, taken))
        return [
            {"change": change, "peak_memory_bytes": after, "fits": after <= room}
            for change, after in sorted(found, key=lambda each: each[1])
        ]

    def _peak(self, recipe: Recipe, rows: Sequence[int]) -> int:
        """The peak with other options, or over other rows."""
        other = replace(self.tracing, recipe=recipe, _traced={})
        return other.peak([rows], self.recomputed, several=True)[0] + self.features

    def _saved_by_qlora(self) -> int:
        kept = plan_quantization(self.base.folder, self.encoder.family.facts, "nf4").kept
        weights = in_few_bits(self.tracing.tuned("nothing").model, kept)
        return int(sum(each.numel() * (each.element_size() - NF4_BYTES) for each in weights))

    def _sliced(self, traced: Traced) -> int:
        """With weights, gradients and optimizer on eight devices."""
        whole = {"weights", "gradients", "optimizer"}
        return sum(
            count if name not in whole else count // 8 for name, count in traced.live.items()
        )

    def _fewer_pixels(self, peak: int, heaviest: Traced, taken: Cut) -> tuple[str, int]:
        """With half the pixels an image; what is kept of their tokens halves with them."""
        rows = list(taken.largest)
        most = int(self.found.areas[rows].sum() / max(1.0, self.found.images[rows].sum()))
        kept = sum(heaviest.live.get(name, 0) for name in ("activations", "vision", "backward"))
        return f"image.max_pixels={most // 2}", peak - kept // 2


def _opened(recipe: Recipe) -> Dataset:
    if recipe.data.sources:
        return open_sources(recipe.data.sources, recipe.training.seed)
    if recipe.data.path is None:
        raise UsageError(
            "data.path: missing; a forecast rests on the lengths of real rows. Prepare a data set "
            "(vlmtune prepare SOURCE --out DIR), then give data.path=DIR"
        )
    return PreparedDataset.open(recipe.data.path)


def _tower_layers(model: nn.Module, tower: str) -> int:
    """Layers of the vision tower that attend."""
    return max(
        (
            len(module)
            for name, module in model.named_modules()
            if isinstance(module, nn.ModuleList) and within(name, (tower,))
        ),
        default=0,
    )
