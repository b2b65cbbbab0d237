"""A base in 4 or 8 bits through bitsandbytes: what is quantised, what stays, and the way back.

NF4 is the 4-bit format of QLoRA (Dettmers et al. 2023, arXiv 2305.14314): blocks of 64 weights
share a scale, and the scales are quantised once more. int8 is LLM.int8() (Dettmers et al. 2022,
arXiv 2208.07339).
"""

from __future__ import annotations

import logging
import math
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import nn

from vlmtune.config import Config
from vlmtune.errors import MissingExtraError, ModelError
from vlmtune.models.empty import empty_model
from vlmtune.models.folder import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from vlmtune.models.family import FamilyFacts

QuantizationMethod = Literal["nf4", "int8"]


class Quantization(Config):
    """How a base is held in few bits; part of the contract of what was trained over it.

    Attributes:
        method: ``nf4`` (4 bits, double quantisation) or ``int8``.
        kept: Names of the modules that keep their own weights, with everything inside them: the
            vision tower, the projector and the output layer.
    """

    method: QuantizationMethod
    kept: tuple[str, ...]


def plan_quantization(folder: Path, facts: FamilyFacts, method: QuantizationMethod) -> Quantization:
    """What of a model folder is quantised: the language model's linear layers but for its head.

    An error in the tower or in the projector reaches every image token, and both are small beside
    the language model; the head's error reaches every logit.

    Raises:
        ModelError: If the folder's weights are quantised already.
    """
    if "quantization_config" in read_json(folder / "config.json"):
        raise ModelError(
            f"{folder}: its weights are quantised already, they cannot be quantised to {method}. "
            "Use the plain model"
        )
    model = empty_model(folder)
    head = model.get_output_embeddings()
    heads = [name for name, module in model.named_modules() if module is head]
    kept: list[str] = []
    for name in (facts.vision_tower, *facts.projector, *heads):
        if not within(name, kept):  # a projector may lie inside the tower
            kept.append(name)
    return Quantization(method=method, kept=tuple(kept))


def quantization_options(quantization: Quantization, compute: torch.dtype) -> Any:
    """The ``quantization_config`` of transformers' ``from_pretrained``.

    Args:
        quantization: What is meant.
        compute: Number format of the products.
    """
    import_bitsandbytes()
    from transformers import BitsAndBytesConfig

    # Expressions over full names. A bare name is compared with the end of the full one: "visual"
    # skips nothing, and naming anything at all takes the head off the list of what is skipped.
    skip = [re.escape(name) for name in quantization.kept]
    if quantization.method == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
        llm_int8_skip_modules=skip,
    )


def finish_quantized(
    model: PreTrainedModel, quantization: Quantization, dtype: torch.dtype, compute: torch.dtype
) -> None:
    """Check what a loaded model holds in few bits, and bring the rest to its number format.

    Args:
        model: Loaded in its own number format, so that what is quantised are its own weights.
        quantization: What was meant.
        dtype: Number format of what is not quantised.
        compute: Number format of the quantised layers' products.

    Raises:
        ModelError: If another layer is quantised than was meant.
    """
    layers = quantized_layers(model, quantization.method)
    _require_as_meant(model, quantization, layers)
    own = model.config.dtype
    for parameter in model.parameters():
        # What the model's class keeps in fp32 stays in fp32.
        if parameter.is_floating_point() and parameter.dtype == own:
            parameter.data = parameter.data.to(dtype)
    if quantization.method == "int8":
        return
    for layer in layers.values():
        if layer.bias is not None:
            layer.bias.data = layer.bias.data.to(compute)
        # On a CPU with AVX512-BF16 the first prediction would pack the weights anew, for products
        # in bf16 whatever the format asked for: not what was trained, and of no use afterwards.
        layer.support_avx512bf16_for_cpu = False
        layer.weight.quant_state.dtype = compute  # the backward pass multiplies in it


def quantized_layers(model: nn.Module, method: QuantizationMethod) -> dict[str, Any]:
    """The layers that hold their weights in few bits, by name."""
    bitsandbytes = import_bitsandbytes()
    kind = bitsandbytes.nn.Linear4bit if method == "nf4" else bitsandbytes.nn.Linear8bitLt
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


def dequantize(model: PreTrainedModel) -> None:
    """Turn quantised layers into plain ones that hold the same weights, in fp32."""
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        cast(Any, model).dequantize(dtype=torch.float32)
    finally:
        transformers_logging.set_verbosity(level)


def numel(parameter: nn.Parameter) -> int:
    """Number of weights of a parameter; two of NF4 share a byte."""
    if type(parameter).__name__ == "Params4bit":
        return math.prod(cast(Any, parameter).quant_state.shape)
    return parameter.numel()


def within(name: str, prefixes: tuple[str, ...] | list[str]) -> bool:
    """Whether a module or parameter is one of these modules or lies inside one."""
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def import_bitsandbytes() -> Any:
    """The package, without what it prints when it is imported.

    Raises:
        MissingExtraError: If it is not installed.
    """
    # It warns that a package for faster kernels is missing, and with int8 once a layer and token
    # that it multiplies in fp16. What it compiles makes torch warn of its own deprecated parts.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            import bitsandbytes
    except ImportError as error:
        raise MissingExtraError("bitsandbytes", "quant", "a quantised base") from error
    return bitsandbytes


@contextmanager
def bitsandbytes_unseen() -> Iterator[None]:
    """Keep peft from importing bitsandbytes, which it does wherever it is installed.

    A second of start and a line on standard error, for layers that are not there. Where a model is
    quantised the package is imported already, and nothing is hidden.
    """
    if "bitsandbytes" in sys.modules:
        yield
        return
    # None counts as not installed.
    cast("dict[str, Any]", sys.modules)["bitsandbytes"] = None
    try:
        yield
    finally:
        del sys.modules["bitsandbytes"]
        from peft import import_utils

        # peft remembers the answer; later a model in 4 bits may be opened.
        for answer in (import_utils.is_bnb_available, import_utils.is_bnb_4bit_available):
            cast(Any, answer).cache_clear()


def _require_as_meant(
    model: PreTrainedModel, quantization: Quantization, layers: dict[str, Any]
) -> None:
    wrong = [name for name in layers if within(name, quantization.kept)]
    missed = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name not in layers
        if not within(name, quantization.kept)
    ]
    if wrong or missed or not layers:
        raise ModelError(
            f"{quantization.method}: {len(layers)} layers are quantised, among them {len(wrong)} "
            f"that should keep their weights (first: {wrong[:2]}); {len(missed)} that should be "
            f"quantised are not (first: {missed[:2]}). The installed transformers or bitsandbytes "
            "chooses layers otherwise than this version of vlmtune knows"
        )
