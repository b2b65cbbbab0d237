"""Packing weights in 4 bits by the rules of AutoGPTQ's format, value by value."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

LAYERS = ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj")


def pack_rows(values: Tensor) -> Tensor:
    """Values 0 … 15 ``(rows, columns)`` as int32 ``(rows / 8, columns)``: eight rows in one."""
    packed = torch.zeros(len(values) // 8, values.shape[1], dtype=torch.int64)
    for row, line in enumerate(values.long()):
        packed[row // 8] |= line << (4 * (row % 8))
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def packed_layer(
    values: Tensor, zeros: Tensor, scales: Tensor, groups: Tensor, bias: Tensor | None = None
) -> dict[str, Tensor]:
    """The tensors of a layer.

    Args:
        values: 0 … 15, ``(inputs, outputs)``.
        zeros: 1 … 16, ``(groups, outputs)``; they are stored less one.
        scales: ``(groups, outputs)``.
        groups: Of each input.
        bias: As it is.
    """
    return {
        "qweight": pack_rows(values),
        "qzeros": pack_rows(zeros.t() - 1).t().contiguous(),
        "scales": scales.to(torch.float16),
        "g_idx": groups.to(torch.int32),
        "bias": torch.zeros(values.shape[1], dtype=torch.float16) if bias is None else bias.half(),
    }


def rounded(weight: Tensor, group_size: int, *, act_order: bool = False) -> tuple[Tensor, ...]:
    """Round a weight ``(outputs, inputs)`` to the nearest of 16 levels; no calibration.

    Returns:
        Values, zeros, scales and groups as ``packed_layer`` takes them.
    """
    inputs = weight.shape[1]
    groups = torch.arange(inputs) // group_size
    if act_order:
        groups = groups[torch.randperm(inputs, generator=torch.Generator().manual_seed(1))]
    count = int(groups.max()) + 1
    zeros = torch.full((count, weight.shape[0]), 8)
    scales = torch.zeros(count, weight.shape[0])
    for group in range(count):
        scales[group] = weight[:, groups == group].abs().amax(dim=1).clamp(min=1e-4) / 7
    scales = scales.half().float()
    values = (weight.t() / scales[groups] + zeros[groups]).round().clamp(0, 15).long()
    return values, zeros, scales, groups


def packed_copy(folder: Path, out: Path, *, group_size: int = 32, **settings: Any) -> Path:
    """A model folder with the language model's layers packed, as the published Int4 folder is."""
    shutil.copytree(folder, out)
    tensors = load_file(folder / "model.safetensors")
    written: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layer, _, kind = name.rpartition(".")
        if ".h." not in name or not layer.endswith(LAYERS):
            written[name] = tensor.half()
        elif kind == "weight":
            parts = packed_layer(
                *rounded(tensor.float(), group_size, act_order=settings.get("desc_act", False)),
                tensors.get(f"{layer}.bias"),
            )
            written |= {f"{layer}.{part}": value for part, value in parts.items()}
    save_file(written, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    config |= {"fp16": True, "fp32": False, "torch_dtype": "float16"}
    config["quantization_config"] = {
        "bits": 4,
        "group_size": group_size,
        "damp_percent": 0.01,
        "desc_act": False,
        "static_groups": False,
        "sym": True,
        "true_sequential": True,
        "model_name_or_path": None,
        "model_file_base_name": "model",
        "quant_method": "gptq",
        **settings,
    }
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return out
