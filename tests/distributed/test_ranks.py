"""What processes tell each other: sums of gradients, whoever touched what, and nobody waits."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from distributed.processes import together
from vlmtune.training.distributed.dealing import deal
from vlmtune.training.distributed.ranks import Ranks, join, leave


def gradients(ranks: Ranks):
    """Process 0 touches the first two parameters, process 1 the last two; one stays untouched."""
    parameters = [nn.Parameter(torch.zeros(2)) for _ in range(3)] + [nn.Parameter(torch.zeros(1))]
    for place in (0, 1) if ranks.first else (1, 2):
        parameters[place].grad = torch.full((2,), 1.0 + ranks.rank)
    ranks.add_gradients(parameters)
    return [None if each.grad is None else each.grad.tolist() for each in parameters]


def test_gradients_add_up_whoever_touched_what():
    expected = [[1.0, 1.0], [3.0, 3.0], [2.0, 2.0], None]
    assert together(2, gradients) == {0: expected, 1: expected}


def test_a_single_process_sends_nothing():
    ranks = join()
    assert ranks == Ranks(0, 1)
    assert gradients(ranks) == [[1.0, 1.0], [1.0, 1.0], None, None]
    assert ranks.total(2.0, 3.0) == [2.0, 3.0]


def small_things(ranks: Ranks):
    tensor = torch.full((2,), float(ranks.rank + 5))
    gathered = [part.tolist() for part in ranks.gather(tensor)]
    ranks.from_first([tensor])
    ranks.wait()
    return ranks.total(1.0, ranks.rank), ranks.any(ranks.rank == 1), gathered, tensor.tolist()


def test_sums_flags_and_the_first_ones_word():
    expected = ([2.0, 1.0], True, [[5.0, 5.0], [6.0, 6.0]], [5.0, 5.0])
    assert together(2, small_things) == {0: expected, 1: expected}


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_every_pack_is_dealt_once_and_the_hands_are_even(ranks):
    loads = [int(1000 / (place + 1)) + 50 for place in range(40)]
    hands = deal(loads, ranks)
    assert sorted(index for hand in hands for index in hand) == list(range(40))
    weights = [sum(loads[index] for index in hand) for hand in hands]
    assert max(weights) - min(weights) <= max(loads)
    assert all(hand == sorted(hand) for hand in hands)


def test_more_processes_than_packs_leaves_some_without():
    assert deal([5, 7], 3) == [[1], [0], []]


FUNCTIONAL = "torch.distributed.nn.functional"


def threads_after(ranks: Ranks):
    """Those of the connections that are left when they are closed."""
    importlib.import_module(FUNCTIONAL)  # as transformers does, at any time
    ranks.wait()
    leave()
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if "gloo" in name]


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_closed_connections_leave_no_thread(monkeypatch):
    """A thread that drops a tensor while the interpreter ends aborts the process."""
    monkeypatch.delitem(sys.modules, FUNCTIONAL, raising=False)
    assert together(2, threads_after) == {0: [], 1: []}

    def imported_late(ranks: Ranks):
        importlib.reload(sys.modules[FUNCTIONAL])  # its defaults hold the group that is there now
        return threads_after(ranks)

    left = together(2, imported_late)
    assert all(left.values())
