"""FSDP2: every process holds a slice of each weight, its gradient and its optimizer's state.

A layer's weights are put together by all processes when it is passed through, and cut again behind
it, forward and backward; gradients are summed and cut on their way. So all processes forward
equally often and through the same layers, see ``dealing.deal_in_step``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vlmtune.errors import ModelError
from vlmtune.models.family import FamilyFacts
from vlmtune.models.quantize import within
from vlmtune.training.distributed.parts import Slices, write_parts
from vlmtune.training.distributed.ranks import Ranks
from vlmtune.training.distributed.strategy import Snapshot, Strategy, size_of

if TYPE_CHECKING:
    from torch.distributed.fsdp import MixedPrecisionPolicy


def shard(
    model: nn.Module, facts: FamilyFacts, ranks: Ranks, *, compute: torch.dtype, offload: bool
) -> None:
    """Cut a model's weights among all processes, in place. Its parameters are other objects then.

    Layer by layer, so that a model in the memory of the CPU need never fit on a GPU.

    Args:
        model: The model with its adapters.
        facts: Its family's facts.
        ranks: The processes.
        compute: Number format of the products, in which the weights of a layer travel.
        offload: Keep the slices in the memory of the CPU; without a GPU they are there anyway.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard

    gpu = torch.cuda.is_available()
    options: dict[str, Any] = {
        "mesh": init_device_mesh("cuda" if gpu else "cpu", (ranks.count,)),
        "mp_policy": _mixed(compute),
        "offload_policy": CPUOffloadPolicy() if gpu and offload else OffloadPolicy(),
    }
    for unit in units(model, facts):
        fully_shard(unit, **options)
    fully_shard(model, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # the loss is divided by all labels already
            module.set_force_sum_reduction_for_comms(enable=True)  # gloo knows no other
    _require_sharded(model)


def units(model: nn.Module, facts: FamilyFacts) -> list[nn.Module]:
    """The layers that are put together one at a time, the vision tower's and the language model's.

    They are the members of the outermost lists of modules in the parts that the facts name.

    Raises:
        ModelError: If there are none.
    """
    parts = (facts.vision_tower, *facts.projector, *facts.language_model)
    lists: list[str] = []
    found: list[nn.Module] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or not within(name, parts) or within(name, lists):
            continue
        lists.append(name)
        found += [layer for layer in module if next(layer.parameters(), None) is not None]
    if not found:
        raise ModelError(
            f"distributed.strategy: the model has no list of layers in {', '.join(parts)} to cut "
            "among the processes; use ddp"
        )
    return found


@dataclass
class Sharded(Strategy):
    """Every process holds a slice of everything."""

    in_step: ClassVar[bool] = True
    cuts_weights: ClassVar[bool] = True

    def __post_init__(self) -> None:
        # Connections of their own: slices are written while training goes on.
        self._writers = dist.new_group(backend="gloo")

    def add_up(self) -> None:
        """The gradients were added up on their way; only fp16's scale is taken out."""
        if self._moves:
            self.scaler.unscale_(self.optimizer)

    def snapshot(self) -> Snapshot:
        """Copy this process's slices now; each process writes its own later."""
        tensors = self.optimizer_tensors()
        slices = Slices.of(tensors, self._writers)
        return Snapshot(size_of(tensors), lambda folder: write_parts(slices, folder))

    def _put(self, saved: Mapping[str, Tensor]) -> None:
        from torch.distributed.tensor import DTensor, distribute_tensor

        cut = {}
        for key, value in saved.items():
            parameter = self.parameters.get(key.rsplit("::", 1)[0])
            if isinstance(parameter, DTensor) and not isinstance(value, DTensor) and value.dim():
                # Each process has read the whole and keeps its own slice: nothing is sent.
                value = distribute_tensor(
                    value.to(parameter.device),
                    parameter.device_mesh,
                    parameter.placements,
                    src_data_rank=None,
                )
            cut[key] = value
        super()._put(cut)


def _mixed(compute: torch.dtype) -> MixedPrecisionPolicy:
    """Weights travel as they are multiplied; gradients are summed in fp32.

    What a layer is given is left as it is: autocast decides, as without slices.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy

    if compute not in (torch.float16, torch.bfloat16):
        return MixedPrecisionPolicy(cast_forward_inputs=False)
    return MixedPrecisionPolicy(
        param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False
    )


def _require_sharded(model: nn.Module) -> None:
    """A weight that is held whole would be trained by each process for itself, and silently."""
    from torch.distributed.tensor import DTensor

    strays = [name for name, each in model.named_parameters() if not isinstance(each, DTensor)]
    if strays:
        raise ModelError(
            f"distributed.strategy: {len(strays)} weights were not cut among the processes (first: "
            f"{strays[0]}); use ddp"
        )
