"""Devices by name: how fast they multiply and what they hold, from their makers' data sheets."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from vlmtune.errors import UsageError
from vlmtune.training.config import Precision

TERA = 10**12
GIGA = 10**9
NETWORK = 50 * GIGA  # bytes a second and GPU between machines: 400 Gbit/s
LAUNCH_S = 7e-6  # of a kernel from eager PyTorch: 6 to 8 µs
CONTEXT_BYTES = 600 * 10**6  # what CUDA itself holds on a GPU
PROCESS_BYTES = 10**9  # on a CPU: Python, torch, and the kernels that its products keep
USABLE = 0.95  # of what is left: the allocator's rounding and gaps


@dataclass(frozen=True)
class Device:
    """A device.

    Attributes:
        name: As it is asked for.
        half: Dense multiplications and additions a second in bf16 (fp16 where there is no bf16),
            twice counted as usual.
        single: The same in fp32, without TF32, as torch multiplies by default.
        memory: Bytes.
        link: Bytes a second and direction to its neighbours in one machine.
        measured: Whether ``half`` and ``single`` were measured here just now.
        gpu: Whether kernels are launched on it, and its memory is its own.
    """

    name: str
    half: float
    single: float
    memory: int
    link: float
    measured: bool = False
    gpu: bool = True

    def rate(self, precision: Precision) -> float:
        """FLOPs a second at best."""
        return self.single if precision == "fp32" else self.half

    @property
    def room(self) -> int:
        """Bytes that tensors may take."""
        if self.gpu:
            return int((self.memory - CONTEXT_BYTES) * USABLE)
        return self.memory - PROCESS_BYTES


def _device(name: str, half: float, single: float, memory: int, link: float) -> Device:
    return Device(name, half * TERA, single * TERA, memory * GIGA, link * GIGA)


# TFLOP/s in half and single precision, GB, GB/s to the neighbours (NVLink, else PCIe).
DEVICES: Mapping[str, Device] = {
    device.name: device
    for device in (
        _device("b200", 2250, 75, 180, 900),
        _device("h200", 989, 67, 141, 450),
        _device("h100", 989, 67, 80, 450),
        _device("a100", 312, 19.5, 80, 300),
        _device("a100-40", 312, 19.5, 40, 300),
        _device("l40s", 362, 91.6, 48, 25),
        _device("l4", 121, 30, 24, 25),
        _device("a10", 125, 31, 24, 25),
        _device("rtx4090", 165, 82, 24, 25),
        _device("rtx3090", 71, 35, 24, 25),
        _device("v100", 125, 15.7, 32, 150),
        _device("t4", 65, 8.1, 16, 12),
    )
}
HERE = "here"


def device_named(name: str) -> Device:
    """A device by name; ``here`` is measured.

    Raises:
        UsageError: If nobody knows it.
    """
    if name == HERE:
        return measured_device()
    if name not in DEVICES:
        raise UsageError(
            f"--device: {name!r} is not known; expected {HERE} (measured now) or one of "
            f"{', '.join(DEVICES)}"
        )
    return DEVICES[name]


def measured_device(seconds: float = 0.3) -> Device:
    """This machine's device, its products measured for a moment."""
    if torch.cuda.is_available():
        place, side = torch.device("cuda"), 8192
        name, memory = torch.cuda.get_device_name(), torch.cuda.mem_get_info()[1]
    else:
        import os

        place, side, name = torch.device("cpu"), 1024, "cpu"
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    gpu = place.type == "cuda"
    half = _measure(place, torch.bfloat16, side, seconds)
    single = _measure(place, torch.float32, side, seconds)
    return Device(name, half, single, memory, 25 * GIGA, measured=True, gpu=gpu)


def _measure(place: torch.device, dtype: torch.dtype, side: int, seconds: float) -> float:
    first = torch.randn(side, side, device=place).to(dtype)
    torch.mm(first, first)
    best, ends = 0.0, time.perf_counter() + seconds
    while True:
        started = time.perf_counter()
        torch.mm(first, first)
        if place.type == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * side**3 / (time.perf_counter() - started))
        if time.perf_counter() > ends:
            return best
