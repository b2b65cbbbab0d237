"""Loading a base model: stock transformers classes, safetensors only, nobody's code."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError

from vlmtune.config import Config
from vlmtune.errors import ModelError, UsageError
from vlmtune.garbage import without_collecting
from vlmtune.hub import Hub
from vlmtune.models import attention
from vlmtune.models.classes import know_classes_of
from vlmtune.models.contract import BaseModelIdentity
from vlmtune.models.folder import read_json
from vlmtune.models.gptq import check_packed_layers, find_packing
from vlmtune.models.products import speed_up
from vlmtune.models.quantize import Quantization, finish_quantized, quantization_options
from vlmtune.models.torchvision import torchvision_fault
from vlmtune.models.weights import weight_files, weights_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
QUANTIZATIONS = ("nf4", "int8", "none")


@dataclass(frozen=True)
class BaseSource:
    """A base model on this disk.

    Attributes:
        folder: Where its files are.
        id: What the user called it: a hub id or a folder.
        hub: The hub it came from, or None.
        revision: The revision it was resolved to, or None.
    """

    folder: Path
    id: str
    hub: Hub | None = None
    revision: str | None = None

    def identity(self) -> BaseModelIdentity:
        """The identity that a contract records; hashes the weights."""
        return BaseModelIdentity(
            id=self.id,
            hub=self.hub,
            revision=self.revision,
            weights_sha256=weights_sha256(self.folder),
        )


class LoadingConfig(Config):
    """How weights are put on a device, for every verb that loads a model.

    Attributes:
        dtype: ``fp32``, ``bf16`` or ``fp16``; None takes bf16 on a GPU that has it, else fp32.
        device: A torch device; None takes the best there is.
        quantization: ``nf4`` or ``int8`` holds the language model in few bits, ``none`` opens what
            was trained over NF4 on the plain base; None holds the base as it was trained.
        device_map: ``auto`` spreads the layers over all GPUs; None takes one device.
    """

    dtype: str | None = None
    device: str | None = None
    quantization: str | None = None
    device_map: str | None = None

    def resolve(self) -> tuple[torch.device, torch.dtype]:
        """The device and dtype that these options mean on this machine.

        Raises:
            UsageError: If an option has no such value, or a device is named twice.
        """
        if self.quantization not in (None, *QUANTIZATIONS):
            raise UsageError(
                f"quantization: found {self.quantization!r}, expected one of "
                f"{', '.join(QUANTIZATIONS)}"
            )
        check_device_map(self.device_map, self.device)
        device = _device(self.device) if self.device else best_device()
        if self.dtype is None:
            bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
            return device, torch.bfloat16 if bf16 else torch.float32
        if self.dtype not in DTYPES:
            raise UsageError(f"dtype: found {self.dtype!r}, expected one of {', '.join(DTYPES)}")
        return device, DTYPES[self.dtype]


def check_device_map(device_map: str | None, device: str | None) -> None:
    """Refuse a device map that is none, or that a named device contradicts.

    Raises:
        UsageError: Naming the option.
    """
    if device_map not in (None, "auto"):
        raise UsageError(f"device_map: found {device_map!r}, expected auto")
    if device_map is not None and device is not None:
        raise UsageError(
            f"device_map: auto spreads the layers over all GPUs, device={device} puts them on one; "
            "give one of the two"
        )


def _device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"device: {name!r} cannot be used here: {reason}") from error


def best_device() -> torch.device:
    """A GPU if there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


@without_collecting()
def load_model(
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    quantization: Quantization | None = None,
    compute: torch.dtype | None = None,
    device_map: str | None = None,
) -> PreTrainedModel:
    """A model's weights, in evaluation mode.

    Args:
        folder: A local model folder.
        dtype: Number format of the weights; of those that are not quantised.
        device: Where they go, unless ``device_map``.
        quantization: Which layers hold their weights in few bits, and how.
        compute: Number format of the quantised layers' products; None: ``dtype``.
        device_map: ``"auto"``: all GPUs, as accelerate spreads them.

    Raises:
        ModelError: If weights are missing, left over, or of another shape.
        MissingExtraError: If quantised weights are asked for and bitsandbytes is not installed.
    """
    torchvision_fault()
    weight_files(folder)
    know_classes_of(read_json(folder / "config.json").get("model_type"))
    options: dict[str, Any] = {"dtype": dtype, "device_map": device_map}
    if quantization is not None:
        # Read in the folder's own number format: what is quantised are the weights themselves, not
        # what another format made of them.
        options = {
            "dtype": "auto",
            "device_map": device_map or {"": device},
            "quantization_config": quantization_options(quantization, compute or dtype),
        }
    model, report = _from_pretrained(folder, options | _packed_options(folder))
    wrong = {name: sorted(map(str, report[name])) for name in ("missing_keys", "mismatched_keys")}
    for name, keys in wrong.items():
        if keys:
            raise ModelError(
                f"{folder}: {len(keys)} {name.replace('_', ' ')} in its weights, first {keys[:3]}; "
                "the folder is incomplete or belongs to another version. Fetch the model again"
            )
    check_packed_layers(folder, model)
    if quantization is not None:
        finish_quantized(model, quantization, dtype, compute or dtype)
    elif device_map is None:
        model.to(device)
    speed_up(model)
    model.eval()
    return cast("PreTrainedModel", model)


def _packed_options(folder: Path) -> dict[str, Any]:
    """What the loader needs for a folder whose weights are packed by GPTQ."""
    packing = find_packing(folder)
    if packing is None:
        return {}
    from vlmtune.models.gptq_loading import loading_options

    return loading_options(folder, packing)


def _from_pretrained(folder: Path, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The stock model and what its loader has to report."""
    from transformers import AutoModelForImageTextToText
    from transformers.utils import logging

    # The bars of transformers would mix with ours; what matters of its warnings is checked later.
    logging.disable_progress_bar()
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            str(folder),
            attn_implementation=attention.register(),
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise ModelError(f"{folder} cannot be loaded: {error}") from error
    finally:
        logging.set_verbosity(level)
    return loaded
