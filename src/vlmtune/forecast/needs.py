"""From one traced step to a whole run: FLOPs, memory of each process, time on a device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from vlmtune.forecast.devices import LAUNCH_S, NETWORK, Device
from vlmtune.forecast.shadow import Traced
from vlmtune.forecast.survey import Amounts
from vlmtune.forecast.work import (
    HEAD,
    LANGUAGE,
    LANGUAGE_ATTENTION,
    PROJECTOR,
    VISION,
    VISION_ATTENTION,
)
from vlmtune.training.distributed.config import DistributedConfig

IN_A_MACHINE = 8  # GPUs
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # a weight, its block's scale, that scale's own


@dataclass(frozen=True)
class Held:
    """Weights of the model, in bytes.

    Attributes:
        all: Of all of it, as it is held.
        few: What ``all`` has too much, where layers are held in 4 bits.
        layer: Of the largest layer that is put together, or unpacked, at a time.
        gradients: Of what trains.
        sent: Of all of it, as it travels between processes that hold slices.
    """

    all: int
    few: int
    layer: int
    gradients: int
    sent: int


def memory(traced: Traced, held: Held, shares: DistributedConfig, processes: int) -> dict[str, int]:
    """Bytes of one process at the peak, by what holds them; they add up to the peak."""
    parts = Counter({name: count for name, count in traced.live.items() if count})
    parts["weights"] -= held.few
    if held.few:
        parts["unpacked layer"] = held.layer
    if processes > 1 and shares.cuts:
        for name in ("gradients", "optimizer"):
            parts[name] = -(-parts[name] // processes)
        if shares.cuts_weights:
            parts["weights"] = -(-parts["weights"] // processes)
            # One layer is computed with while the next one arrives.
            parts["gathered layers"] = 2 * held.layer
    return dict(sorted(parts.items(), key=lambda item: -item[1]))


def whole_work(
    traced: Sequence[tuple[Traced, Amounts, int]], run: Amounts, tower_layers: int
) -> dict[str, float]:
    """FLOPs of a run by part, from those of single packs.

    Args:
        traced: Traced packs, each with its amounts and its number of images.
        run: The amounts of the whole run.
        tower_layers: Layers of the vision tower.

    Returns:
        FLOPs of the model (``again``, what checkpointing computes twice, apart).
    """
    plain, own, _ = max(traced, key=lambda each: each[1].tokens)
    ratios = {
        LANGUAGE: run.tokens / own.tokens,
        LANGUAGE_ATTENTION: run.token_squares / own.token_squares,
        HEAD: run.labels / max(1.0, own.labels),
    }
    total = {part: plain.work.total[part] * ratio for part, ratio in ratios.items()}
    again = sum(plain.work.again.values()) * run.tokens / own.tokens
    seeing = max(traced, key=lambda each: each[1].area)
    return {**total, **vision_work(*seeing, run, tower_layers), "again": again}


def vision_work(
    traced: Traced, own: Amounts, images: int, run: Amounts, tower_layers: int
) -> dict[str, float]:
    """FLOPs of tower and projector.

    Args:
        traced: A step, or a look, at some images.
        own: The amounts of these.
        images: Their number.
        run: The amounts of all that is looked at.
        tower_layers: Layers of the vision tower.
    """
    whole_images = traced.work.sequences[VISION_ATTENTION] == images * tower_layers
    by_area = run.area / max(1.0, own.area)
    # Tiles and windows are many short sequences: then it grows as the pixels do.
    by_squares = run.area_squares / max(1.0, own.area_squares) if whole_images else by_area
    ratios = {VISION: by_area, PROJECTOR: by_area, VISION_ATTENTION: by_squares}
    return {part: traced.work.total[part] * ratio for part, ratio in ratios.items()}


@dataclass(frozen=True)
class Pace:
    """How long a run takes, and what of it.

    Attributes:
        compute_s: If only products took time.
        launch_s: If only the launching of kernels did; the two overlap.
        exchange_s: Sending weights and gradients, as if nothing of it overlapped.
        samples_per_second: Of all processes together.
    """

    compute_s: float
    launch_s: float
    exchange_s: float
    samples_per_second: float

    @property
    def seconds(self) -> float:
        """The longer of computing and launching, and the exchange behind it."""
        return max(self.compute_s, self.launch_s) + self.exchange_s


def pace(  # noqa: PLR0913
    flops: float,
    rate: float,
    device: Device,
    *,
    steps: int,
    samples: int,
    forwards: float,
    kernels: int,
    exchanged: float,
    processes: int,
    once: float = 0.0,
) -> Pace:
    """Time of a run.

    Args:
        flops: Of the run, what is computed twice included.
        rate: FLOPs a second and device that are really reached.
        device: The device.
        steps: Optimizer steps.
        samples: Rows trained.
        forwards: Forwards of one process in a step.
        kernels: Of one forward and its backward pass.
        exchanged: Bytes that one process sends in a step.
        processes: Devices.
        once: Kernels before the first step.
    """
    compute = flops / rate / processes
    launch = (steps * forwards * kernels + once) * LAUNCH_S if device.gpu else 0.0
    link = device.link if processes <= IN_A_MACHINE else min(device.link, NETWORK)
    exchange = steps * exchanged / link if processes > 1 else 0.0
    seconds = max(compute, launch) + exchange
    return Pace(compute, launch, exchange, samples / seconds)


def exchanged(held: Held, shares: DistributedConfig, processes: int, forwards: float) -> float:
    """Bytes that one process sends in a step, each collective as a ring.

    ``ddp`` sums gradients (twice their size); ``zero2`` scatters them and gathers what moved;
    ``fsdp2`` and ``zero3`` gather the weights forward and backward, in every forward of the step,
    and scatter gradients as often.
    """
    share = (processes - 1) / processes
    if not shares.cuts_weights:
        return 2 * held.gradients * share
    return (2 * held.sent + held.gradients) * share * forwards
