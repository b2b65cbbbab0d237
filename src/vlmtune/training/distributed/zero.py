"""ZeRO through DeepSpeed (Rajbhandari et al. 2020): an extra, and an engine of its own.

Its engine adds gradients up, clips and steps. What a checkpoint needs is asked of it tensor by
tensor, so that nothing of its own form, which is pickled, is ever written or read.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vlmtune.errors import MissingExtraError
from vlmtune.training.distributed.strategy import Strategy, check_names

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Stage:
    """How much is cut among the processes.

    Attributes:
        cuts_weights: Stage 3: the weights too. Stage 2: gradients and optimizer.
        offload: Keep what is cut in the memory of the CPU.
    """

    cuts_weights: bool
    offload: bool = False

    @property
    def number(self) -> int:
        """As DeepSpeed calls it."""
        return 3 if self.cuts_weights else 2


def start_zero(held: Mapping[str, Any], stage: Stage, *, clip: float, compute: torch.dtype) -> Zero:
    """Give the model to DeepSpeed.

    Args:
        held: What every strategy holds.
        stage: How much is cut.
        clip: Largest norm of a step's gradient; 0: any.
        compute: Number format of the products. In bf16 the model is held in it, and fp32 copies of
            what trains are cut among the processes.

    Raises:
        MissingExtraError: If DeepSpeed is not installed.
    """
    deepspeed = _deepspeed()
    model: nn.Module = held["module"]
    parameters: dict[str, nn.Parameter] = held["parameters"]
    half = compute is torch.bfloat16
    precise = {name: each.detach().float().cpu() for name, each in parameters.items()}
    config = _config(stage, clip=clip, half=half)
    if stage.cuts_weights:
        for parameter in model.parameters():
            if half and parameter.is_floating_point():
                parameter.data = parameter.data.to(compute)
        for buffer in model.buffers():
            buffer.data = buffer.data.to(held["device"])
        deepspeed.zero.Init(module=model, config_dict_or_path=config, dtype=compute)
    engine, optimizer, _, _ = deepspeed.initialize(
        model=model, optimizer=held["optimizer"], config=config, dist_init_required=False
    )
    strategy = (Zero3 if stage.cuts_weights else Zero)(
        **{**held, "module": engine}, engine=engine, cut=optimizer
    )
    strategy.put_weights(precise)
    return strategy


def _config(stage: Stage, *, clip: float, half: bool) -> dict[str, Any]:
    place = {"device": "cpu"}
    zero: dict[str, Any] = {"stage": stage.number}
    if stage.offload:
        zero["offload_optimizer"] = place
        if stage.cuts_weights:
            zero["offload_param"] = place
    return {
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # torch's AdamW, the same as without DeepSpeed
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": clip,
        "bf16": {"enabled": half},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        # How many forwards make a step is the planner's business, and changes from step to step.
        "managed_gradient_accumulation": False,
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 2**31,
    }


@dataclass
class Zero(Strategy):
    """Stage 2: every process holds all weights, and a part of gradients and optimizer.

    Attributes:
        engine: DeepSpeed's.
        cut: Its optimizer, around ours.
    """

    engine: Any = None
    cut: Any = None
    in_step: ClassVar[bool] = True
    _squares: dict[str, float] = field(default_factory=dict, init=False)
    _touched: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self._hooks = [
            parameter.register_hook(self._note(name)) for name, parameter in self.parameters.items()
        ]

    def backward(self, loss: Tensor) -> None:
        """The engine takes the mean over the processes, and we want the sum."""
        if loss.requires_grad:
            self.engine.backward(loss * self.ranks.count, scale_wrt_gas=False)
            self._touched = True

    def add_up(self) -> None:
        """The engine adds the gradients up on their way."""

    def norms(self) -> dict[str, float]:
        """Norms of each process's own gradients, as it passed them on: their sum is cut already."""
        names = list(self.parameters)
        totals = self.ranks.total(*(self._squares.get(name, 0.0) for name in names))
        self._squares.clear()
        return {
            name: math.sqrt(total) / self.ranks.count
            for name, total in zip(names, totals, strict=True)
        }

    def stop_watching(self) -> None:
        """Take the hooks out."""
        for hook in self._hooks:
            hook.remove()

    def move(self, limit: float, *, finite: bool) -> float:  # noqa: ARG002
        """The engine clips to the limit that it was given, and leaves out what is not finite."""
        if not self._touched:
            return 0.0
        self._touched = False
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def gathered(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole copies, in fp32 of what trains; see ``Strategy``."""
        from deepspeed.utils import safe_get_full_fp32_param

        trained = {id(parameter) for parameter in self.parameters.values()}
        copies: dict[int, Tensor] = {}
        for tensor in tensors.values():
            if id(tensor) not in copies:
                precise = id(tensor) in trained
                value = safe_get_full_fp32_param(tensor) if precise else self._whole(tensor)
                kept = value.detach() if self.ranks.first else value.new_empty(0)
                copies[id(tensor)] = kept.to("cpu", copy=True).contiguous()
        if not self.ranks.first:
            return {}
        return {name: copies[id(tensor)] for name, tensor in tensors.items()}

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """Put together from all processes."""
        from deepspeed.utils import safe_get_full_optimizer_state

        counts = [state["step"] for state in self.optimizer.state.values() if "step" in state]
        if not counts:
            return {}
        self._link()
        found = {}
        for name, parameter in self.parameters.items():
            for moment in MOMENTS:
                value = safe_get_full_optimizer_state(parameter, moment)
                found[f"{name}::{moment}"] = value.to("cpu") if self.ranks.first else value[:0]
            found[f"{name}::step"] = counts[0].detach().clone()
        return found

    def put_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Set the fp32 copies of what trains: they were made of rounded weights."""
        from deepspeed.utils import safe_set_full_fp32_param

        for name, value in weights.items():
            safe_set_full_fp32_param(self.parameters[name], value.to(self.device))

    def _put(self, saved: Mapping[str, Tensor]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        check_names(saved, self.parameters)
        counts = [value for key, value in saved.items() if key.endswith("::step")]
        if not counts:
            return
        for flat in self._flat():
            moments = {moment: torch.zeros_like(flat) for moment in MOMENTS}
            self.optimizer.state[flat] = {"step": counts[0].clone(), **moments}
        self._link()
        for key, value in saved.items():
            name, entry = key.rsplit("::", 1)
            if entry in MOMENTS:
                value = value.to(self.device)
                safe_set_full_optimizer_state(self.parameters[name], value, entry)

    def _flat(self) -> list[Tensor]:
        """This process's parts of what trains, as the optimizer knows them."""
        return list(self.cut.single_partition_of_fp32_groups)

    def _link(self) -> None:
        """Tell each parameter where in the optimizer's state it lies.

        DeepSpeed 0.19 does so in its first step, when only the first group of parameters has one.
        """
        self.cut._hp_optimizer_states_linked = False
        self.cut._lazy_init_hp_params_optimizer_state()

    def _whole(self, tensor: Tensor) -> Tensor:
        return tensor

    def _note(self, name: str) -> Callable[[Tensor], None]:
        def note(gradient: Tensor) -> None:
            norm = float(torch.linalg.vector_norm(gradient.float()))
            self._squares[name] = self._squares.get(name, 0.0) + norm**2

        return note


@dataclass
class Zero3(Zero):
    """Stage 3: the weights are cut too, and put together layer by layer."""

    cuts_weights: ClassVar[bool] = True

    def _flat(self) -> list[Tensor]:
        return list(self.cut.fp32_partitioned_groups_flat)

    def _link(self) -> None:
        """Each parameter knows its place."""

    def _whole(self, tensor: Tensor) -> Tensor:
        from deepspeed.runtime.zero import GatheredParameters

        if not isinstance(tensor, nn.Parameter):
            return tensor  # buffers are whole
        with GatheredParameters([tensor]):
            return tensor.detach().clone()


def require_deepspeed() -> None:
    """Say what is missing before anything that takes long.

    Raises:
        MissingExtraError: If DeepSpeed is not installed.
    """
    if find_spec("deepspeed") is None:
        raise MissingExtraError("deepspeed", "deepspeed", "distributed.strategy zero2 or zero3")


def _deepspeed() -> Any:
    require_deepspeed()
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Sums in shared memory on a CPU: compiled in a minute at the first use, and a build that was
    # interrupted would be waited for without end.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
