"""A model whose weights are shapes alone, and one training step through it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vlmtune.batching.collate import PackedBatch
from vlmtune.forecast.tally import Phase, Tally
from vlmtune.forecast.work import HEAD, VISION, Work
from vlmtune.models.family import Family
from vlmtune.models.features import image_features
from vlmtune.models.head import CHUNK
from vlmtune.models.products import Linear
from vlmtune.training.config import TrainingConfig
from vlmtune.training.distributed.ranks import Ranks
from vlmtune.training.distributed.sharding import units
from vlmtune.training.distributed.strategy import Strategy
from vlmtune.training.loss import summed_loss
from vlmtune.training.optim import autocast, make_optimizer, make_scaler
from vlmtune.tuning.apply import Tuned
from vlmtune.tuning.parts import part_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CPU = torch.device("cpu")  # of shapes; where a real step would run does not matter to them


@dataclass(frozen=True)
class Traced:
    """One step of one process over one pack, as it would have been.

    Attributes:
        live: Bytes by part at the moment of the peak: ``weights``, ``gradients``, ``optimizer``,
            ``logits``, ``vision`` (activations of tower and projector), ``activations`` (of the
            language model), ``backward`` (what the backward pass needs for a moment).
        peak: Most bytes at once.
        kernels: Operations of forward and backward.
        work: Multiplications and additions.
    """

    live: Mapping[str, int]
    peak: int
    kernels: int
    work: Work


def hollow(model: nn.Module, dtype: torch.dtype) -> None:
    """Put fake tensors in the place of a model's parameters and buffers; what is shared stays so.

    Args:
        model: On the meta device.
        dtype: Number format of what does not train.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    parameters: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in parameters:
                trains = parameter.requires_grad
                plain = not parameter.is_floating_point() or trains
                with mode:
                    fake = torch.empty(parameter.shape, dtype=parameter.dtype if plain else dtype)
                parameters[id(parameter)] = nn.Parameter(fake, requires_grad=trains)
                parameters[id(parameters[id(parameter)])] = parameters[id(parameter)]
            module._parameters[name] = parameters[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                with mode:
                    module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def trace_step(
    tuned: Tuned,
    family: Family,
    batch: PackedBatch,
    config: TrainingConfig,
    *,
    several: bool,
    gpu: bool,
    cut: bool = False,
) -> Traced:
    """Run one step through a hollow model, behind others: gradients and optimizer are there.

    Args:
        tuned: The hollow model with what trains in it.
        family: Its family.
        batch: The heaviest pack of the plan.
        config: The recipe's ``training``.
        several: Whether a step has several packs, so that gradients wait while one is computed.
        gpu: Whether it is forecast for a GPU, which has none of the CPU's own products.
        cut: Whether processes hold slices, and the optimizer is not fused.
    """
    model, parameters = tuned.model, tuned.trainable()
    head = model.get_output_embeddings()
    vocabulary = int(head.weight.shape[0])
    whose = _parts(model, family)
    tally = Tally(
        lambda tensor, tag: _kind(tensor, tag, vocabulary),
        {tuple(each.shape): part for each, part in whose if each.requires_grad},
    )
    strategy = _strategy(model, parameters, config, fused=not cut)
    for tensor in (*model.parameters(), *model.buffers()):
        tally.note(tensor)
    for weight, part in whose:
        tally.belongs(weight, part)
    _begin(strategy, tally, several=several)
    with ExitStack() as stack:
        for handle in _hooks(model, family, tally, parameters):
            stack.callback(handle.remove)
        stack.enter_context(_as_on_gpu(model) if gpu else nullcontext())
        stack.enter_context(tally)
        before = tally.kernels
        with autocast(config, CPU):
            loss = summed_loss(model, family, batch) / max(1, batch.labels)
        tally.tag, tally.phase = "backward", "backward"
        strategy.backward(loss)
        del loss
        kernels = tally.kernels - before
        strategy.add_up()
        strategy.move(config.clip, finite=True)
    return Traced(dict(tally.at_peak), tally.peak, kernels, tally.work)


def trace_look(
    model: PreTrainedModel,
    family: Family,
    vision: Mapping[str, Tensor],
    tokens: int,
    config: TrainingConfig,
    *,
    gpu: bool,
) -> tuple[Traced, dict[str, Tensor]]:
    """Show images to a hollow tower, as it is done once for a whole run.

    Args:
        model: The hollow model.
        family: Its family.
        vision: The images' vision tensors, joined as in a batch.
        tokens: Their visual tokens, of all.
        config: The recipe's ``training``.
        gpu: Whether it is forecast for a GPU.

    Returns:
        What that takes, and the features: shapes without contents, ``(tokens, width)`` each.
    """
    tally = Tally(lambda _, tag: tag, {})
    for tensor in (*model.parameters(), *model.buffers()):
        tally.note(tensor)
    for weight, part in _parts(model, family):
        tally.belongs(weight, part)
    tally.settle()
    tally.tag = VISION
    model.eval()
    with _as_on_gpu(model) if gpu else nullcontext(), tally, autocast(config, CPU):
        (features,) = image_features(model, family, vision, [tokens])
    return Traced(dict(tally.at_peak), tally.peak, tally.kernels, tally.work), features


@contextmanager
def _as_on_gpu(model: nn.Module) -> Iterator[None]:
    """The stock layers in the place of those that are for a CPU, and a GPU's share of logits."""
    # Only here: peft was imported when the adapters were put in, with bitsandbytes out of sight.
    from peft.tuners.lora.layer import Linear as LoraLinear

    from vlmtune.tuning.fused import FusedLora

    stock: dict[type, type] = {FusedLora: LoraLinear, Linear: nn.Linear}
    for module in model.modules():
        module.__class__ = stock.get(type(module), type(module))
    before, CHUNK["cpu"] = CHUNK["cpu"], CHUNK["cuda"]
    try:
        yield
    finally:
        CHUNK["cpu"] = before


def _strategy(
    model: nn.Module, parameters: dict[str, nn.Parameter], config: TrainingConfig, *, fused: bool
) -> Strategy:
    optimizer = make_optimizer(parameters, config, fused=fused)
    return Strategy(
        ranks=Ranks(),
        parameters=parameters,
        optimizer=optimizer,
        scaler=make_scaler(config, CPU),
        device=CPU,
        module=model,
    )


def _begin(strategy: Strategy, tally: Tally, *, several: bool) -> None:
    """As after an earlier step: the optimizer has its moments; gradients, if a pack went before."""
    for parameter in strategy.parameters.values():
        parameter.grad = torch.empty_like(parameter)
    with tally:
        tally.tag = "optimizer"
        strategy.optimizer.step()
        for state in strategy.optimizer.state.values():
            for value in state.values():
                tally.count_as(value, "optimizer")
    strategy.optimizer.zero_grad(set_to_none=True)
    if several:
        for parameter in strategy.parameters.values():
            parameter.grad = torch.empty_like(parameter)
            tally.count_as(parameter.grad, "gradients")
    tally.settle()
    tally.tag = "activations"


def _parts(model: nn.Module, family: Family) -> list[tuple[nn.Parameter, str]]:
    """Whose each weight is; the output layer stands for itself, shared or not."""
    head = model.get_output_embeddings().weight  # type: ignore[operator]
    return [
        (each, HEAD if each is head else part_of(name, family.facts))
        for name, each in model.named_parameters()
    ]


def _hooks(
    model: nn.Module, family: Family, tally: Tally, parameters: Mapping[str, nn.Parameter]
) -> Iterator[Any]:
    """Say what is counted as what; taken away behind the step."""
    facts = family.facts
    inside = (facts.vision_tower, *facts.projector)
    for name, module in model.named_modules():
        if name in inside:
            yield module.register_forward_pre_hook(lambda *_: _enter(tally))
            yield module.register_forward_hook(lambda *_: _leave(tally))
    # A layer's own hooks are outside of what is computed again; those of its parts are inside.
    for part in (part for layer in units(model, facts) for part in layer.children()):
        yield part.register_forward_pre_hook(lambda *_: _turn(tally, "backward", "again"))
        # It ends early where nothing more of it is needed.
        yield part.register_forward_hook(
            lambda *_: _turn(tally, "again", "backward"), always_call=True
        )
    for parameter in parameters.values():
        yield parameter.register_post_accumulate_grad_hook(
            lambda each: None if each.grad is None else tally.count_as(each.grad, "gradients")
        )


def _enter(tally: Tally) -> None:
    if tally.tag == "activations":  # not where the backward pass computes it again
        tally.tag = VISION


def _leave(tally: Tally) -> None:
    if tally.tag == VISION:
        tally.tag = "activations"


def _turn(tally: Tally, found: Phase, other: Phase) -> None:
    if tally.phase == found:
        tally.phase = other


def _kind(tensor: Tensor, tag: str, vocabulary: int) -> str:
    """Logits, and what is made of them, are known by their shape."""
    if tag != "weights" and tensor.dim() > 1 and tensor.shape[-1] == vocabulary:
        return "logits"
    return tag
