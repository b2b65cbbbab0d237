"""``plan``: what a run will need, before it starts. No weight is read and nothing is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vlmtune.batching.collate import pack
from vlmtune.batching.planner import Plan
from vlmtune.data.dataset import PreparedDataset, Rows
from vlmtune.data.mixture import Dataset, open_sources
from vlmtune.errors import UsageError
from vlmtune.forecast.devices import HERE, Device, device_named
from vlmtune.forecast.needs import NF4_BYTES, Held, Pace, exchanged, memory, pace, whole_work
from vlmtune.forecast.shadow import Traced, hollow, trace_step
from vlmtune.forecast.survey import Cut, Survey, amounts, cut, survey
from vlmtune.models import attention
from vlmtune.models.contract import BaseModelIdentity, make_contract
from vlmtune.models.empty import empty_model
from vlmtune.models.encode import Encoder
from vlmtune.models.families import load_family
from vlmtune.models.gptq import is_gptq
from vlmtune.models.load import DTYPES, BaseSource
from vlmtune.models.products import speed_up
from vlmtune.models.quantize import plan_quantization, within
from vlmtune.recipe import Recipe, as_recipe
from vlmtune.runs.resolve import fetch_base
from vlmtune.training.distributed.sharding import units
from vlmtune.training.prepare_rows import plan_rows
from vlmtune.tuning.apply import Tuned
from vlmtune.tuning.parts import count_parts
from vlmtune.verbs.observer import Observer
from vlmtune.verbs.start import place_of, tune
from vlmtune.verbs.train import TOKENS_PER_FORWARD

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

    @cached_property
    def base(self) -> BaseSource:
        model = self.recipe.model
        self.observer.stage("opening the model")
        return fetch_base(model.base, model.hub, model.revision)

    @cached_property
    def encoder(self) -> Encoder:
        data = self.recipe.data
        family = load_family(str(self.base.folder), self.recipe.model.backend)
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
    def rows(self) -> Rows:
        return _opened(self.recipe).split("train")

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
    def quantized(self) -> tuple[str, ...] | None:
        """What keeps its own weights where the rest is held in 4 bits; None: nothing is."""
        if is_gptq(self.base.folder):
            return ()
        if self.recipe.quantization is None:
            return None
        facts = self.encoder.family.facts
        return plan_quantization(self.base.folder, facts, self.recipe.quantization).kept

    def tuned(self, recipe: Recipe) -> Tuned:
        """The hollow model of a recipe."""
        model = empty_model(self.base.folder)
        model.set_attn_implementation(attention.register())
        speed_up(model)
        tuned = tune(model, recipe, self.encoder.family.facts, self.base, None)
        hollow(model, place_of(recipe)[1])
        model.train()
        return tuned

    def trace(self, recipe: Recipe, pack_of: Sequence[int], *, several: bool) -> Traced:
        """One step over some rows."""
        batch = pack(self.encoder.family, [self.encoder.encode(self.rows[i]) for i in pack_of])
        return trace_step(
            self.tuned(recipe),
            self.encoder.family,
            batch,
            recipe.training,
            several=several,
            gpu=self.device.gpu,
            cut=self.devices > 1 and recipe.distributed.cuts,
        )

    def told(self) -> dict[str, Any]:
        recipe, made = self.recipe, self.plan_of(self.budget)
        taken = cut(self.found, made)
        # Of each step's packs a process gets its share.
        forwards = max(1.0, taken.forwards / self.devices)
        several = taken.most > self.devices
        self.observer.stage("forecasting")
        packs = dict.fromkeys((taken.longest, taken.largest))
        traced = [
            (
                self.trace(recipe, each, several=several),
                amounts(self.found, made, each),
                int(self.found.images[list(each)].sum()),
            )
            for each in packs
        ]
        tuned = self.tuned(recipe)
        model, facts = tuned.model, self.encoder.family.facts
        held = self.held(model)
        heaviest = max(traced, key=lambda each: each[0].peak)
        parts = memory(heaviest[0], held, recipe.distributed, self.devices)
        run = amounts(self.found, made, taken.rows, taken.scale)
        work = whole_work(traced, run, _tower_layers(model, facts.vision_tower))
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

    def held(self, model: nn.Module) -> Held:
        """Bytes of the weights, as they are held and as they travel."""
        once = {id(each): each for each in (*model.parameters(), *model.buffers())}
        everything = sum(each.numel() * each.element_size() for each in once.values())
        compute = DTYPES[self.recipe.training.precision].itemsize
        gradients = sum(each.numel() * 4 for each in model.parameters() if each.requires_grad)
        few, largest = 0, 0
        for weight in [] if self.quantized is None else _in_few_bits(model, self.quantized):
            few += int(weight.numel() * (weight.element_size() - NF4_BYTES))
            largest = max(largest, weight.numel() * compute)
        if self.devices > 1 and self.recipe.distributed.cuts_weights:
            facts = self.encoder.family.facts
            largest = max(
                compute * sum(each.numel() for each in unit.parameters())
                for unit in units(model, facts)
            )
        sent = compute * sum(each.numel() for each in once.values())
        return Held(everything, few, largest, gradients, sent)

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
        )

    def advice(self, peak: int, heaviest: Traced, taken: Cut, made: Plan) -> list[dict[str, Any]]:
        """What to change where the job does not fit, and the peak it would have then."""
        room, recipe = self.device.room, self.recipe
        found: list[tuple[str, int]] = []
        rows = taken.longest
        longest_row = int(made.lengths[made.kept].max())
        budget = max(longest_row, self.budget // 2)
        if len(rows) > 1 and budget < self.budget:
            smaller = cut(self.found, self.plan_of(budget))
            found.append((f"training.token_budget={budget}", self._peak(recipe, smaller.longest)))
        training = recipe.training
        if not training.gradient_checkpointing:
            again = training.model_copy(update={"gradient_checkpointing": True})
            changed = recipe.model_copy(update={"training": again})
            found.append(("training.gradient_checkpointing=true", self._peak(changed, rows)))
        if self.quantized is None and recipe.tuning.adapts:
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
        other = replace(self, recipe=recipe)
        other.__dict__.update({name: vars(self)[name] for name in ("base", "encoder", "rows")})
        traced = other.trace(recipe, rows, several=True)
        held = other.held(other.tuned(recipe).model)
        return sum(memory(traced, held, recipe.distributed, self.devices).values())

    def _saved_by_qlora(self) -> int:
        kept = plan_quantization(self.base.folder, self.encoder.family.facts, "nf4").kept
        weights = _in_few_bits(self.tuned(self.recipe).model, kept)
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


def _in_few_bits(model: nn.Module, kept: tuple[str, ...]) -> list[Tensor]:
    """Weights that are held in 4 bits, where all linear layers are but those that are kept."""
    return [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and not module.weight.requires_grad
        and not within(name.removesuffix(".base_layer"), kept)
    ]
