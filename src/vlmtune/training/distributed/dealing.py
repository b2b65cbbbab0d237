"""Who trains which pack of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlmtune.training.distributed.ranks import Ranks


@dataclass(frozen=True, slots=True)
class Share:
    """One forward of one process.

    Attributes:
        pack: Which pack, as an index into the step's.
        stands_in: Whether another process trains the pack, and this forward counts nothing.
    """

    pack: int
    stands_in: bool = False


def share_out(
    loads: Sequence[int], sees: Sequence[bool], ranks: Ranks, *, in_step: bool
) -> list[Share]:
    """What this process forwards of some packs.

    Args:
        loads: Tokens of each pack.
        sees: Whether each pack holds an image.
        ranks: The processes.
        in_step: Whether all of them must forward equally often.
    """
    if in_step:
        return deal_in_step(loads, sees, ranks.count)[ranks.rank]
    return [Share(pack) for pack in deal(loads, ranks.count)[ranks.rank]]


def deal(loads: Sequence[int], ranks: int) -> list[list[int]]:
    """Deal packs so that the heaviest hand is light: the heaviest pack first, to the lightest hand.

    Args:
        loads: Tokens of each pack.
        ranks: Number of processes.

    Returns:
        Indices into ``loads``, one list a process, each in the order of ``loads``.
    """
    hands: list[list[int]] = [[] for _ in range(ranks)]
    weights = [0] * ranks
    for index in sorted(range(len(loads)), key=lambda index: (-loads[index], index)):
        lightest = min(range(ranks), key=lambda rank: (weights[rank], rank))
        hands[lightest].append(index)
        weights[lightest] += loads[index]
    return [sorted(hand) for hand in hands]


def deal_in_step(loads: Sequence[int], sees: Sequence[bool], ranks: int) -> list[list[Share]]:
    """Deal packs so that all processes forward equally often, and alike each time.

    Sharded weights are put together for each forward by all processes at once, layer by layer: in
    each round all go through the vision tower, or none does. Packs of like weight make a round, for
    the round takes as long as its heaviest. Where the packs do not go round, the lightest stands
    in: it passes through the same layers and counts nothing.

    Args:
        loads: Tokens of each pack.
        sees: Whether each pack holds an image.
        ranks: Number of processes.

    Returns:
        As many shares for each process, one list a process.
    """
    hands: list[list[Share]] = [[] for _ in range(ranks)]
    for images in (True, False):
        packs = sorted(
            (index for index, seeing in enumerate(sees) if seeing is images),
            key=lambda index: (-loads[index], index),
        )
        for start in range(0, len(packs), ranks):
            chosen = packs[start : start + ranks]
            missing = ranks - len(chosen)
            shares = [Share(pack) for pack in chosen]
            shares += [Share(packs[-1], stands_in=True)] * missing
            # Every other round is dealt the other way about, so that no process gets all the heavy.
            shares = shares[::-1] if start // ranks % 2 else shares
            for hand, share in zip(hands, shares, strict=True):
                hand.append(share)
    return hands
