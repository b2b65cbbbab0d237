"""What there is on this machine: asked once, so that ``doctor`` can judge any machine."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

# Of a container: its limit, and beside it what is taken and how much of that is given back at need.
LIMITS = (
    (Path("/sys/fs/cgroup/memory.max"), "memory.current", "inactive_file"),  # version 2
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),  # version 1
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
)
DRIVER = Path("/proc/driver/nvidia/version")
FLAGS = ("flags", "Features")  # of x86 and of Arm
NATIVE_BF16 = {"avx512_bf16", "amx_bf16", "bf16"}


@dataclass(frozen=True)
class Gpu:
    """One accelerator.

    Attributes:
        name: As its driver calls it.
        capability: CUDA compute capability, ``(8, 0)`` for an A100.
        memory: Bytes in all.
        free: Bytes that nobody uses now.
    """

    name: str
    capability: tuple[int, int]
    memory: int
    free: int


@dataclass(frozen=True)
class Disk:
    """Room in one place.

    Attributes:
        what: What it is for.
        path: Where.
        free: Bytes.
        writable: Whether we may write there.
    """

    what: str
    path: str
    free: int
    writable: bool


@dataclass(frozen=True)
class Machine:
    """All that ``doctor`` looks at, the network left aside.

    Attributes:
        python: Version.
        platform: Operating system.
        packages: Versions of everything installed, by normalised name.
        requires: Requirements of installed packages of the training stack, by name.
        torch: torch's own version, its build included.
        cuda: CUDA version torch was built for; None: without.
        cuda_fault: Why a GPU cannot be used although torch could; empty otherwise.
        driver: Whether an NVIDIA driver runs.
        gpus: The accelerators torch sees.
        cpus: Cores this process may use.
        threads: Threads of torch.
        bf16: Whether the processor multiplies bf16 itself.
        memory: Bytes this process may use: of the machine or of its container.
        free: Bytes of them that are free.
        disks: Room where runs and models go.
        torchvision_fault: Why torchvision cannot be imported; None if it can or is not installed.
        stale_locks: Locks that a killed compilation left behind; the next one waits for them.
    """

    python: str
    platform: str
    packages: Mapping[str, str]
    requires: Mapping[str, tuple[str, ...]]
    torch: str
    cuda: str | None
    cuda_fault: str
    driver: bool
    gpus: tuple[Gpu, ...]
    cpus: int
    threads: int
    bf16: bool
    memory: int
    free: int
    disks: tuple[Disk, ...]
    torchvision_fault: str | None = None
    stale_locks: tuple[str, ...] = field(default=())


STACK = ("vlmtune", "torch", "transformers", "peft", "accelerate", "datasets", "modelscope")


def read_machine(folder: Path, cache: Path) -> Machine:
    """Look at this machine.

    Args:
        folder: Where runs are going to be written.
        cache: Where models are kept.
    """
    from vlmtune.models.torchvision import torchvision_fault

    packages = {
        _normal(each.metadata["Name"]): each.version
        for each in metadata.distributions()
        if each.metadata["Name"]
    }
    fault = torchvision_fault() if "torchvision" in packages else None
    import torch

    cuda_fault = _cuda_fault()
    count = 0 if cuda_fault or torch.version.cuda is None else torch.cuda.device_count()
    memory, free = _memory()
    return Machine(
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        packages=packages,
        requires={name: tuple(metadata.requires(name) or ()) for name in STACK if name in packages},
        torch=torch.__version__,
        cuda=torch.version.cuda,
        cuda_fault=cuda_fault,
        driver=DRIVER.exists(),
        gpus=tuple(_gpu(index) for index in range(count)),
        cpus=len(os.sched_getaffinity(0)) if platform.system() == "Linux" else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        bf16=_has_bf16(),
        memory=memory,
        free=free,
        disks=(_disk("runs", folder), _disk("models", cache)),
        torchvision_fault=fault,
        stale_locks=_stale_locks() if "deepspeed" in packages else (),
    )


def _normal(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def _cuda_fault() -> str:
    import torch

    if torch.version.cuda is None or torch.cuda.is_available():
        return ""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return (str(error).splitlines() or ["unknown"])[0]
    return "no device is visible to this process"


def _gpu(index: int) -> Gpu:
    import torch

    facts = torch.cuda.get_device_properties(index)
    free, memory = torch.cuda.mem_get_info(index)
    return Gpu(facts.name, (facts.major, facts.minor), memory, free)


def _has_bf16() -> bool:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.machine() == "arm64"  # Apple's; what else has no such file is not known
    flags = next((line for line in lines if line.startswith(FLAGS)), "")
    return bool(NATIVE_BF16 & set(flags.split()))


def available_memory() -> int:
    """Bytes that this process may still take."""
    return _memory()[1]


def _memory() -> tuple[int, int]:
    """Bytes in all and free, of the container where that is less than the machine."""
    page = os.sysconf("SC_PAGE_SIZE")
    memory = page * os.sysconf("SC_PHYS_PAGES")
    free = memory
    if platform.system() == "Linux":
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
        free = 1024 * kilobytes.get("MemAvailable", kilobytes["MemFree"])
    for path, taken, given_back in LIMITS:
        limit = path.read_text(encoding="utf-8").strip() if path.exists() else ""
        if limit.isdigit():  # "max": no limit
            memory = min(memory, int(limit))
            used = _number(path.parent / taken) - _number(path.parent / "memory.stat", given_back)
            free = min(free, max(0, int(limit) - max(0, used)))
    return memory, free


def _number(path: Path, name: str | None = None) -> int:
    """The number in a file, or behind a name in it; 0 where there is none: not all kernels tell."""
    words = path.read_text(encoding="utf-8").split() if path.exists() else []
    place = 0 if name is None else words.index(name) + 1 if name in words else len(words)
    return int(words[place]) if place < len(words) else 0


def _disk(what: str, path: Path) -> Disk:
    """Room where a folder is, or will be made."""
    place = path.absolute()
    while not place.exists():
        place = place.parent
    return Disk(what, str(path), shutil.disk_usage(place).free, os.access(place, os.W_OK))


def _stale_locks() -> tuple[str, ...]:
    from torch.utils.cpp_extension import get_default_build_root

    return tuple(sorted(map(str, Path(get_default_build_root()).glob("*/*/lock"))))
