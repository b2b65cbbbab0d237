"""``doctor``: whether this machine can do the work, how it does it best, and what to mend.

Every judgement is a function of a ``Machine``: machines that nobody has here can be judged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement
from packaging.version import Version

from vlmtune.verbs.machine import Gpu, Machine, read_machine

State = Literal["ok", "note", "fault"]

GIB = 2**30
# A model of 2B weights is 4.4 GB, and a run's checkpoints lie beside it.
LITTLE_DISK = {"fault": GIB, "note": 20 * GIB}
LITTLE_MEMORY = 4 * GIB

# What is asked for by name when it is missing (see pyproject): package -> extra and purpose.
EXTRAS = {
    "bitsandbytes": ("quant", "qlora, --quantization"),
    "deepspeed": ("deepspeed", "distributed.strategy zero2, zero3"),
    "fastapi": ("serve", "serve"),
    "gradio": ("ui", "ui"),
    "swanlab": ("swanlab", "tracking.to swanlab"),
    "wandb": ("wandb", "tracking.to wandb"),
    "tensorboard": ("tensorboard", "tracking.to tensorboard"),
    "trackio": ("trackio", "tracking.to trackio"),
    "modelscope": ("modelscope", "model.hub modelscope"),
}


@dataclass(frozen=True)
class Finding:
    """One line of the answer.

    Attributes:
        name: What was looked at.
        state: ``ok``, ``note`` (works, but know this) or ``fault`` (does not work).
        found: What there is.
        advice: What to do; empty where nothing is.
    """

    name: str
    state: State
    found: str
    advice: str = ""


@dataclass(frozen=True)
class Trap:
    """Versions that are known to break something, where no requirement says so.

    Attributes:
        package: The package.
        versions: Which, as in a requirement.
        beside: Another package (a requirement) without which there is no harm.
        breaks: What goes wrong.
        advice: The way out.
    """

    package: str
    versions: str
    beside: str
    breaks: str
    advice: str


TRAPS = (
    Trap(
        "torch",
        ">=2.14",
        "",
        "newer than what the tests run with (2.11 to 2.13)",
        "pip install -c constraints.txt torch",
    ),
    Trap(
        "swanboard",
        ">0",
        "rich>=14",
        "the local mode of swanlab needs rich<14 and fails beside a newer one",
        "pip install 'rich<14', or tracking.mode=offline",
    ),
    Trap(
        "datasets",
        "<=4.8.4",
        "modelscope",
        "modelscope[datasets] holds datasets at 4.8.4; our readers need 5.2",
        "install modelscope without its extras: pip install 'vlmtune[modelscope]'",
    ),
    Trap(
        "torchao",
        ">0",
        "",
        "peft and transformers import it wherever it is installed, with warnings of its own",
        "nothing of ours needs it",
    ),
)


def doctor(folder: str | Path = "runs", *, network: bool = False) -> dict[str, Any]:
    """Look at this machine.

    Args:
        folder: Where runs are going to be written.
        network: Whether to ask the hubs for an answer; nothing is opened otherwise.

    Returns:
        ``ok``, ``findings`` and the facts they rest on.
    """
    from vlmtune.hub.reach import hub_cache

    machine = read_machine(Path(folder), Path(hub_cache()))
    findings = [*judge(machine), *_network(asked=network)]
    facts = {
        **{name: value for name, value in asdict(machine).items() if name != "requires"},
        "packages": {name: machine.packages.get(name) for name in _named(machine)},
        "precision": precision(machine)[0],
    }
    return {
        "ok": not any(finding.state == "fault" for finding in findings),
        "findings": [asdict(finding) for finding in findings],
        **facts,
    }


def judge(machine: Machine) -> list[Finding]:
    """All findings about a machine, in the order in which they are shown."""
    looks: tuple[Callable[[Machine], Iterator[Finding]], ...] = (
        _python,
        _packages,
        _traps,
        _torch,
        _gpus,
        _precision,
        _torchvision,
        _memory,
        _disks,
        _locks,
        _extras,
    )
    return [finding for look in looks for finding in look(machine)]


def precision(machine: Machine) -> tuple[str, str]:
    """The ``training.precision`` that suits the weakest device, and why."""
    if machine.gpus:
        weakest = min(machine.gpus, key=lambda gpu: gpu.capability)
        return _precision_of(weakest)
    if machine.bf16:
        return "bf16", "the processor multiplies bf16 itself; fp32 is exact and about half as fast"
    return "fp32", "the processor has no bf16 of its own and would emulate it, slower than fp32"


def _precision_of(gpu: Gpu) -> tuple[str, str]:
    major, minor = gpu.capability
    level = f"compute capability {major}.{minor}"
    if major >= 8:
        return "bf16", f"{level} multiplies bf16 itself, and bf16 needs no loss scaling"
    if major == 7:
        return "fp16", (
            f"{level} has no bf16 (torch would emulate it, many times slower); fp16 is scaled, and "
            "overflowing steps are left out"
        )
    return "fp32", f"{level} has no fast half precision; expect it to be slow"


def _python(machine: Machine) -> Iterator[Finding]:
    found = f"{machine.python} on {machine.platform}, {machine.cpus} cores"
    if Version(machine.python) < Version("3.11"):
        yield Finding("python", "fault", found, "3.11 or newer is needed")
    else:
        yield Finding("python", "ok", found)


def _packages(machine: Machine) -> Iterator[Finding]:
    """What the installed packages of the stack ask of each other."""
    faults = []
    for owner, texts in machine.requires.items():
        for requirement in map(Requirement, texts):
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
                continue
            name = requirement.name.lower().replace("_", "-").replace(".", "-")
            version = machine.packages.get(name)
            if version is None:
                faults.append(f"{owner} needs {requirement.name}, which is not installed")
            elif not requirement.specifier.contains(version, prereleases=True):
                faults.append(
                    f"{owner} needs {requirement.name}{requirement.specifier}, found {version}"
                )
    shown = ", ".join(
        f"{name} {machine.packages[name]}"
        for name in ("transformers", "peft", "datasets")
        if name in machine.packages
    )
    if not faults:
        yield Finding("packages", "ok", f"{shown}; all that they ask of each other is there")
    for fault in faults:
        yield Finding("packages", "fault", fault, "pip install -c constraints.txt vlmtune")


def _traps(machine: Machine) -> Iterator[Finding]:
    for trap in TRAPS:
        version = machine.packages.get(trap.package)
        if version is None or not Requirement(f"x{trap.versions}").specifier.contains(
            Version(version).public, prereleases=True
        ):
            continue
        if trap.beside and not _installed(machine, Requirement(trap.beside)):
            continue
        yield Finding(trap.package, "note", f"{version}: {trap.breaks}", trap.advice)


def _installed(machine: Machine, wanted: Requirement) -> bool:
    version = machine.packages.get(wanted.name)
    return version is not None and wanted.specifier.contains(version, prereleases=True)


def _torch(machine: Machine) -> Iterator[Finding]:
    build = f"CUDA {machine.cuda}" if machine.cuda else "without CUDA"
    found = f"{machine.torch} ({build}), {machine.threads} threads"
    if machine.cuda_fault:
        advice = (
            "the driver is there: it may be older than this CUDA, or no device be given to this "
            "process (nvidia-smi shows both)"
            if machine.driver
            else "on a machine without a GPU the CPU build is smaller: pip install torch==2.13.0"
        )
        yield Finding(
            "torch",
            "fault" if machine.driver else "note",
            f"{found}; no GPU can be used: {machine.cuda_fault}",
            advice,
        )
    elif machine.driver and machine.cuda is None:
        yield Finding(
            "torch",
            "fault",
            f"{found}, and this machine has an NVIDIA driver",
            "install a CUDA build of torch, or the GPU stays idle",
        )
    else:
        yield Finding("torch", "ok", found)


def _gpus(machine: Machine) -> Iterator[Finding]:
    if not machine.gpus:
        yield Finding("gpu", "note", "none; everything runs on the CPU, at its speed")
    for index, gpu in enumerate(machine.gpus):
        found = f"{index}: {gpu.name}, {size(gpu.free)} of {size(gpu.memory)} free"
        if gpu.free < gpu.memory / 2:
            yield Finding("gpu", "note", found, "another process holds most of it (nvidia-smi)")
        else:
            yield Finding("gpu", "ok", found)
    if len({gpu.name for gpu in machine.gpus}) > 1:
        yield Finding(
            "gpu",
            "note",
            "not all alike: together they go at the pace of the slowest",
            "choose equal ones with CUDA_VISIBLE_DEVICES",
        )


def _precision(machine: Machine) -> Iterator[Finding]:
    name, why = precision(machine)
    yield Finding("precision", "ok", f"training.precision={name}: {why}")


def _torchvision(machine: Machine) -> Iterator[Finding]:
    if machine.torchvision_fault is not None:
        yield Finding(
            "torchvision",
            "note",
            f"installed and broken ({machine.torchvision_fault}); it is hidden from transformers",
            "nothing needs it unless model.backend=torchvision; reinstall it from where this torch "
            "came from, or pip uninstall torchvision",
        )


def _memory(machine: Machine) -> Iterator[Finding]:
    found = f"{size(machine.free)} of {size(machine.memory)} free"
    if machine.free < LITTLE_MEMORY:
        yield Finding(
            "memory", "note", found, "a real model needs more; close what else runs, or ask plan"
        )
    else:
        yield Finding("memory", "ok", found)


def _disks(machine: Machine) -> Iterator[Finding]:
    for disk in machine.disks:
        found = f"{disk.what}: {size(disk.free)} free in {disk.path}"
        if not disk.writable:
            yield Finding("disk", "fault", f"{found}, which cannot be written", "choose another")
        elif disk.free < LITTLE_DISK["fault"]:
            yield Finding("disk", "fault", found, "no checkpoint fits; make room")
        elif disk.free < LITTLE_DISK["note"]:
            yield Finding("disk", "note", found, "little for real weights; training.keep=1 helps")
        else:
            yield Finding("disk", "ok", found)


def _locks(machine: Machine) -> Iterator[Finding]:
    for lock in machine.stale_locks:
        yield Finding(
            "deepspeed",
            "fault",
            f"{lock}: left by a compilation that was killed; the next one waits for it for ever",
            "delete it, unless a compilation runs right now",
        )


def _extras(machine: Machine) -> Iterator[Finding]:
    there = [name for name in EXTRAS if name in machine.packages]
    missing = {extra: use for name, (extra, use) in EXTRAS.items() if name not in machine.packages}
    yield Finding("extras", "ok", "installed: " + (", ".join(there) or "none"))
    if missing:
        uses = "; ".join(f"{extra} ({use})" for extra, use in missing.items())
        line = f"pip install 'vlmtune[{','.join(missing)}]'"
        yield Finding("extras", "ok", f"not installed: {uses}", f"where one is needed: {line}")


def _network(*, asked: bool) -> Iterator[Finding]:
    from vlmtune.hub.reach import is_offline, reach_hubs, uses_proxy

    proxy = ", through a proxy" if uses_proxy() else ""
    if is_offline():
        yield Finding("network", "note", "offline mode is set: models come from disk alone")
        return
    if not asked:
        yield Finding("network", "ok", f"not asked (--network does){proxy}")
        return
    for each in reach_hubs():
        found = f"{each.hub} at {each.place}{proxy}: "
        if each.reached:
            yield Finding("network", "ok", f"{found}answers in {each.seconds:.1f} s")
        else:
            yield Finding(
                "network",
                "note",
                f"{found}no answer ({each.why})",
                "models must be on this disk (model.base=DIR), or set the hub's mirror or a proxy",
            )


def _named(machine: Machine) -> list[str]:
    """Packages worth telling: our own requirements, extras and traps."""
    asked = map(Requirement, machine.requires.get("vlmtune", ()))
    own = [each.name.lower() for each in asked if each.marker is None]
    names = {"vlmtune", *own, *EXTRAS, *(trap.package for trap in TRAPS)}
    return sorted(name for name in names if name in machine.packages)


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit != "GB" else f"{count:.1f} GB"
        count /= 1000
    return f"{count:.1f} TB"
