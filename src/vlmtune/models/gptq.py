"""Weights packed in 4 bits by GPTQ (Frantar et al. 2022, arXiv 2210.17323), read in plain torch.

The layout is that of AutoGPTQ, in which such models are published. Eight values of 4 bits share an
int32, the first in its lowest bits. A weight is ``scale * (value - zero)``, scale and zero being
those of its group of inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlmtune.errors import ModelError
from vlmtune.models.folder import read_json
from vlmtune.models.gptq_kernels import unpacker
from vlmtune.models.weights import weight_files

BITS = 4
PER_INT32 = 32 // BITS
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Packing:
    """What of a folder is packed, and how.

    Attributes:
        group_size: Inputs that share a scale and a zero; -1: all of a layer.
        layers: Names of the packed layers, and whether the folder has a bias for each.
    """

    group_size: int
    layers: Mapping[str, bool]

    def groups(self, inputs: int) -> int:
        """Groups of a layer; the last one may be smaller."""
        return 1 if self.group_size == -1 else -(-inputs // self.group_size)


def is_gptq(folder: Path) -> bool:
    """Whether a model folder says that its weights are packed by GPTQ."""
    return _settings(folder).get("quant_method") == "gptq"


def find_packing(folder: Path) -> Packing | None:
    """How a folder is packed by GPTQ; None if it is not.

    Raises:
        ModelError: If it is packed in another way than is read here.
    """
    if not is_gptq(folder):
        return None
    settings = _settings(folder)
    expected = {"bits": BITS, "checkpoint_format": "gptq", "pack_dtype": "int32"}
    for name, value in expected.items():
        if settings.get(name, value) != value:
            raise ModelError(
                f"{folder}: its weights are packed by GPTQ with {name}={settings[name]!r}; "
                f"expected {value!r}. Use the plain model, with tuning.method=qlora"
            )
    group_size = settings.get("group_size")
    if not isinstance(group_size, int) or group_size == 0 or group_size < -1:
        raise ModelError(
            f"{folder}: quantization_config.group_size: found {group_size!r}, expected a number of "
            "inputs, or -1 for all"
        )
    names = _tensor_names(folder)
    layers = [name.removesuffix(".qweight") for name in names if name.endswith(".qweight")]
    return Packing(group_size, {layer: f"{layer}.bias" in names for layer in layers})


class GptqLinear(nn.Linear):
    """A linear layer whose weights stay packed; each product unpacks them and forgets them again.

    Args:
        inputs: Width of what goes in; a multiple of 8.
        outputs: Width of what comes out; a multiple of 8.
        groups: Groups of inputs.
        bias: Whether there is one.
        device: Where the buffers are made.

    Attributes:
        qweight: Values, ``(inputs / 8, outputs)``, int32.
        qzeros: Zeros less one, ``(groups, outputs / 8)``, int32.
        scales: ``(groups, outputs)``, float16 whatever the model's number format: the weights are
            what they were packed as.
        g_idx: The group of each input, ``(inputs,)``, int32. Groups need not be neighbours.
        weights_in_all: How many weights all packed layers of the model stand for.
    """

    weights_in_all = 0
    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor

    def __init__(
        self, inputs: int, outputs: int, groups: int, *, bias: bool, device: torch.device
    ) -> None:
        nn.Module.__init__(self)  # the one of nn.Linear would make the weights
        self.in_features, self.out_features = inputs, outputs
        shapes = {
            "qweight": (inputs // PER_INT32, outputs),
            "qzeros": (groups, outputs // PER_INT32),
            "scales": (groups, outputs),
            "g_idx": (inputs,),
            "bias": (outputs,),
        }
        for name, shape in shapes.items():
            kind = torch.float16 if name in ("scales", "bias") else torch.int32
            present = bias or name != "bias"
            empty = torch.empty(shape, dtype=kind, device=device) if present else None
            self.register_buffer(name, empty)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weights ``(outputs, inputs)``, float16, made anew each time; do not write to them."""
        return self.unpacked().t()

    def unpacked(self) -> Tensor:
        """The weights ``(inputs, outputs)``, float16."""
        unpack = unpacker(self.qweight.device, self.weights_in_all)
        return unpack(self.qweight, self.qzeros, self.scales, self.g_idx)

    def forward(self, input: Tensor) -> Tensor:
        """States ``(…, inputs)`` to ``(…, outputs)``, in the format of autocast or their own."""
        device = input.device.type
        autocast = torch.is_autocast_enabled(device)
        kind = torch.get_autocast_dtype(device) if autocast else input.dtype
        product: Tensor = _Product.apply(input.to(kind), self)
        return product


class _Product(torch.autograd.Function):
    """States times unpacked weights; the backward pass unpacks them again.

    Kept from forward to backward, they would be the model in 16 bits.
    """

    @staticmethod
    def forward(context: Any, states: Tensor, layer: GptqLinear) -> Tensor:
        context.layer = layer
        kind = states.dtype
        bias = None if layer.bias is None else layer.bias.to(kind)
        return nn.functional.linear(states, layer.weight.to(kind), bias)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ context.layer.weight.to(gradient.dtype), None


def put_packed_layers(model: nn.Module, packing: Packing) -> None:
    """Put packed layers, still empty, into a model in the place of its own.

    Raises:
        ModelError: If the model has no such linear layer, or one cannot be packed.
    """
    modules = dict(model.named_modules())
    for name, bias in packing.layers.items():
        layer = modules.get(name)
        if type(layer) is not nn.Linear:
            raise ModelError(
                f"the folder packs a layer {name!r}, and the model has no linear layer of that "
                "name; the folder belongs to another model"
            )
        inputs, outputs = layer.in_features, layer.out_features
        if inputs % PER_INT32 or outputs % PER_INT32:
            raise ModelError(
                f"{name} has {inputs} inputs and {outputs} outputs; packed in {BITS} bits they are "
                f"multiples of {PER_INT32}. The folder belongs to another model"
            )
        parent, _, own = name.rpartition(".")
        groups, device = packing.groups(inputs), layer.weight.device
        packed = GptqLinear(inputs, outputs, groups, bias=bias, device=device)
        setattr(model.get_submodule(parent), own, packed)
    weights = sum(packed_sizes(model).values())
    for layer in model.modules():
        if isinstance(layer, GptqLinear):
            layer.weights_in_all = weights


def check_packed_layers(folder: Path, model: nn.Module) -> None:
    """Look at what was read for what unpacking would not notice, or only stumble over.

    Raises:
        ModelError: If an input belongs to a group that is not there.
    """
    for name, layer in model.named_modules():
        if not isinstance(layer, GptqLinear):
            continue
        lowest, highest = (int(value) for value in layer.g_idx.aminmax())
        if lowest < 0 or highest >= len(layer.scales):
            raise ModelError(
                f"{folder}: {name}.g_idx names the groups {lowest} to {highest}; expected 0 to "
                f"{len(layer.scales) - 1}. Fetch the model again"
            )


def packed_sizes(model: nn.Module) -> dict[str, int]:
    """How many weights each packed layer stands for, by the name that they would have."""
    return {
        f"{name}.weight": layer.in_features * layer.out_features
        for name, layer in model.named_modules()
        if isinstance(layer, GptqLinear)
    }


def _settings(folder: Path) -> dict[str, Any]:
    settings = read_json(folder / "config.json").get("quantization_config")
    return settings if isinstance(settings, dict) else {}


def _tensor_names(folder: Path) -> set[str]:
    """Names of all tensors of a folder, from its index or from the files' headers."""
    if (folder / INDEX).is_file():
        return set(read_json(folder / INDEX).get("weight_map", {}))
    from safetensors import safe_open

    names: set[str] = set()
    for path in weight_files(folder):
        with safe_open(path, "pt") as file:
            names |= set(file.keys())
    return names
