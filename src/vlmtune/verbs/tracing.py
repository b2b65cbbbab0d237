"""A recipe's step over shapes: what ``plan`` tells, and what decides about checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor, nn

from vlmtune.batching.collate import pack
from vlmtune.data.dataset import Rows
from vlmtune.forecast.needs import NF4_BYTES, Held, memory
from vlmtune.forecast.shadow import Traced, hollow, trace_look, trace_step
from vlmtune.models import attention
from vlmtune.models.empty import empty_model
from vlmtune.models.encode import Encoder
from vlmtune.models.gptq import is_gptq
from vlmtune.models.load import DTYPES, BaseSource
from vlmtune.models.products import speed_up
from vlmtune.models.quantize import plan_quantization, within
from vlmtune.recipe import Recipe
from vlmtune.training.distributed.sharding import units
from vlmtune.tuning.apply import Tuned
from vlmtune.verbs.start import Recomputed, place_of, tune


@dataclass
class Tracing:
    """Steps of one recipe on one kind of device.

    Attributes:
        recipe: The recipe.
        base: Its base model; no weight is read.
        encoder: The model's encoder.
        rows: The training split.
        gpu: Whether it is for a GPU.
        devices: Processes, one a device.
    """

    recipe: Recipe
    base: BaseSource
    encoder: Encoder
    rows: Rows
    gpu: bool
    devices: int = 1
    _traced: dict[tuple[tuple[int, ...], Recomputed, bool], Traced] = field(default_factory=dict)

    @cached_property
    def quantized(self) -> tuple[str, ...] | None:
        """What keeps its own weights where the rest is held in 4 bits; None: nothing is."""
        if is_gptq(self.base.folder):
            return ()
        if self.recipe.quantization is None:
            return None
        facts = self.encoder.family.facts
        return plan_quantization(self.base.folder, facts, self.recipe.quantization).kept

    def tuned(self, recomputed: Recomputed) -> Tuned:
        """The hollow model."""
        recipe = self.recipe
        model = empty_model(self.base.folder)
        model.set_attn_implementation(attention.register())
        speed_up(model)
        tuned = tune(model, recipe, self.encoder.family.facts, self.base, None, recomputed)
        hollow(model, place_of(recipe)[1])
        model.train()
        return tuned

    def trace(self, rows: Sequence[int], recomputed: Recomputed, *, several: bool) -> Traced:
        """One step over a pack of rows; ``several`` says whether a step has more packs."""
        asked = (tuple(rows), recomputed, several)
        if asked not in self._traced:
            self._traced[asked] = self._trace(*asked)
        return self._traced[asked]

    def _trace(self, rows: Sequence[int], recomputed: Recomputed, several: bool) -> Traced:
        encoded = self.encoder.encode_together([self.rows[index] for index in rows])
        batch = pack(self.encoder.family, encoded)
        return trace_step(
            self.tuned(recomputed),
            self.encoder.family,
            batch,
            self.recipe.training,
            several=several,
            gpu=self.gpu,
            cut=self.devices > 1 and self.recipe.distributed.cuts,
        )

    def look(self, rows: Sequence[int]) -> tuple[Traced, dict[str, Tensor]]:
        """The tower's look at the images of some rows, and its features: shapes alone."""
        family = self.encoder.family
        encoded = [self.encoder.encode(self.rows[index]) for index in rows]
        return trace_look(
            self.tuned("nothing").model,
            family,
            family.join_vision([each.vision for each in encoded]),
            sum(each.tokens.visual for each in encoded),
            self.recipe.training,
            gpu=self.gpu,
        )

    @cached_property
    def _held(self) -> Held:
        return self.held(self.tuned("nothing").model)

    def held(self, model: nn.Module) -> Held:
        """Bytes of the weights, as they are held and as they travel."""
        once = {id(each): each for each in (*model.parameters(), *model.buffers())}
        everything = sum(each.numel() * each.element_size() for each in once.values())
        compute = DTYPES[self.recipe.training.precision].itemsize
        gradients = sum(each.numel() * 4 for each in model.parameters() if each.requires_grad)
        few, largest = 0, 0
        for weight in [] if self.quantized is None else in_few_bits(model, self.quantized):
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

    def peak(
        self, packs: Iterable[Sequence[int]], recomputed: Recomputed, *, several: bool
    ) -> tuple[int, float]:
        """The highest memory of a process over some packs, and FLOPs that are done twice."""
        traced = [self.trace(rows, recomputed, several=several) for rows in packs]
        shares = self.recipe.distributed
        peaks = [sum(memory(each, self._held, shares, self.devices).values()) for each in traced]
        return max(peaks), sum(sum(each.work.again.values()) for each in traced)


def in_few_bits(model: nn.Module, kept: tuple[str, ...]) -> list[Tensor]:
    """Weights that are held in 4 bits, where all linear layers are but those that are kept."""
    return [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and not module.weight.requires_grad
        and not within(name.removesuffix(".base_layer"), kept)
    ]
