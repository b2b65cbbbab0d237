"""Kill a run anywhere: what is continued is, bit for bit, the run that was never killed."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tiny_world import fingerprint, lines
from vlmtune.files import read_lines
from vlmtune.runs.checkpoints import checkpoints, faults, newest_good, step_of

pytestmark = pytest.mark.faults

SAVE_STEPS = 2
CHANGES = {
    "training__keep": 1,  # so that every save prunes
    "training__workers": 2,
    "evaluation__before": True,
    "evaluation__after": True,
    "evaluation__limit": 1,
    "evaluation__max_new_tokens": 1,
}
IN_SAVE = ("save", "prune")


@dataclass
class World:
    """Runs jobs on the shared base and data, and compares what they leave with the reference."""

    zygote: Callable[..., list[Any]]
    base: Path
    data: Path
    folder: Path
    reference: dict[str, Any]
    events: list[str]
    seconds: float

    def job(self, run: Path, **job: Any) -> dict[str, Any]:
        common = {"base": str(self.base), "data": str(self.data), "changes": CHANGES}
        return {**common, "run": str(run), **job}

    def run(self, folder: Path, **job: Any) -> Any:
        (ended,) = self.zygote(self.job(folder, **job))
        return ended


@pytest.fixture(scope="module")
def world(zygote, tiny_base, tiny_data, tmp_path_factory) -> World:
    """The reference, three times: without this control the rest would mean nothing."""
    folder = tmp_path_factory.mktemp("reference")
    world = World(zygote, tiny_base, tiny_data, folder, {}, [], 0.0)
    found = []
    for number in range(3):
        ended = world.run(folder / str(number))
        assert ended.status == 0, ended.said
        found.append(everything(folder / str(number)))
        world.events, world.seconds = ended.events, ended.seconds
    assert found[0] == found[1] == found[2]
    world.reference = found[0]
    return world


def everything(run: Path) -> dict[str, Any]:
    """The fingerprint, the answers before and after, and what the run says of itself."""
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    answers = {
        when: (run / "evaluation" / when / "predictions.jsonl").read_bytes()
        for when in ("before", "after")
    }
    told = {name: result[name] for name in ("steps", "samples", "loss", "before", "after", "best")}
    return {**fingerprint(run), "answers": answers, "result": told}


def leftovers(run: Path) -> list[str]:
    return [path.name for path in run.rglob(".*") if path.name != ".lock"]


def check_wreck(run: Path) -> int:
    """After a kill: whatever is called a checkpoint is one. Returns the step to go on from."""
    named = checkpoints(run / "checkpoints")
    assert [fault for path in named for fault in faults(path)] == []
    newest = newest_good(run / "checkpoints")
    reached = step_of(newest) if newest else 0
    done = len(list(read_lines(run / "metrics.jsonl")))  # a last line may be torn
    assert reached <= done <= reached + SAVE_STEPS  # no more than that is done again
    return reached


def resume_and_compare(world: World, run: Path) -> None:
    ended = world.run(run, resume=True)
    assert ended.status == 0, ended.said
    assert everything(run) == world.reference
    assert leftovers(run) == []
    shutil.rmtree(run)


def chosen(world: World, count: int, parts: tuple[str, ...], seed: int) -> list[int]:
    """Events of some parts of a run, spread over the kinds of event."""
    kinds: dict[str, list[int]] = {}
    for index, name in enumerate(world.events):
        if name.split(":")[0] in parts:
            kinds.setdefault(name, []).append(index)
    rng = random.Random(seed)
    picked: list[int] = []
    while len(picked) < count:
        for places in kinds.values():
            index = rng.choice(places)
            if index not in picked and len(picked) < count:
                picked.append(index)
    return picked


def test_the_places_to_strike_are_where_they_should_be(world):
    parts = Counter(name.split(":")[0] for name in world.events)
    assert parts.keys() == {"start", "loop", "save", "prune", "summary"}
    names = set(world.events)
    for name in (
        "half written",
        "fsync:before",
        "rename:before",
        "rename:after",
        "write_text:after",
    ):
        assert f"save:{name}" in names
    assert {"loop:half a line", "loop:append_lines:after"} <= names
    assert {"prune:rename:after", "prune:rmtree:before"} <= names
    assert world.reference["state"]["step"] == 6


def test_killed_inside_a_save(world, tmp_path):
    """40 seeded places: half written files, around each sync and rename, amid pruning."""
    steps = Counter()
    for index in chosen(world, 40, IN_SAVE, seed=1):
        run = tmp_path / f"event-{index}"
        ended = world.run(run, event=index)
        assert ended.status == -signal.SIGKILL, (world.events[index], ended.said)
        steps[check_wreck(run)] += 1
        resume_and_compare(world, run)
    assert len(steps) == 4, steps  # before the first save, at each, after the last


def test_killed_at_any_other_write(world, tmp_path):
    """30 seeded places: while the run begins, is evaluated, is summed up."""
    for index in chosen(world, 30, ("start", "loop", "summary"), seed=2):
        run = tmp_path / f"event-{index}"
        ended = world.run(run, event=index)
        assert ended.status == -signal.SIGKILL, (world.events[index], ended.said)
        check_wreck(run)
        resume_and_compare(world, run)


def test_killed_at_any_time(world, tmp_path):
    """30 seeded times from the first moment to the last."""
    rng = random.Random(3)
    for number in range(30):
        run = tmp_path / f"time-{number}"
        after = world.seconds * (number + rng.random()) / 30
        ended = world.run(run, signal=signal.SIGKILL, after=after)
        assert ended.status in (-signal.SIGKILL, 0), ended.said  # 0: it was quicker this time
        check_wreck(run)
        resume_and_compare(world, run)


def test_killed_while_it_resumes(world, tmp_path):
    """Again and again, at seeded events; each time nearer to the end."""
    rng = random.Random(4)
    for number in range(4):
        run = tmp_path / f"again-{number}"
        world.run(run, event=rng.randrange(len(world.events) // 2))
        for _ in range(2):
            world.run(run, resume=True, event=rng.randrange(5, 60))
            check_wreck(run)
        resume_and_compare(world, run)


def test_stopped_at_any_time(world, tmp_path):
    """22 seeded times, one signal or three: a checkpoint and 128 + signal, or nothing lost."""
    rng = random.Random(5)
    statuses = Counter()
    for number in range(22):
        run = tmp_path / f"signal-{number}"
        which = (signal.SIGTERM, signal.SIGINT)[number % 2]
        after = world.seconds * (number + rng.random()) / 22
        ended = world.run(run, signal=which, after=after, times=1 + 2 * (number % 3 == 0))
        statuses[ended.status] += 1
        # Saved and left; killed outside the loop (99: KeyboardInterrupt, which the command makes
        # 130); or done before the signal came.
        assert ended.status in (128 + which, -which, 99, 0), ended.said
        reached = check_wreck(run)
        if ended.status == 128 + which:
            assert reached == len(lines(run / "metrics.jsonl")) > 0
        resume_and_compare(world, run)
    # How many of these times lie in the loop depends on the machine; these places do.
    for number, index in enumerate(chosen(world, 8, ("loop",), seed=7)):
        run = tmp_path / f"stopped-{number}"
        ended = world.run(run, event=index, by="signal", signal=signal.SIGTERM)
        statuses[ended.status] += 1
        check_wreck(run)
        resume_and_compare(world, run)
    assert statuses[143] + statuses[130] >= 3, statuses


def test_a_full_disk_inside_a_save(world, tmp_path):
    """20 seeded places: one sentence, status 1, nothing half written; with room it goes on."""
    writes = [i for i in chosen(world, 40, ("save",), seed=6) if "rmtree" not in world.events[i]]
    assert len(writes) >= 20
    for index in writes[:20]:
        run = tmp_path / f"full-{index}"
        ended = world.run(run, event=index, by="full")
        assert ended.status == 1, (world.events[index], ended.said)
        assert ended.said.count("No space left on device") == 1
        assert "--resume" in ended.said
        check_wreck(run)
        assert leftovers(run) == []
        resume_and_compare(world, run)


def test_a_disk_that_fills_up(world, tmp_path):
    """20 real file systems, with room for 5 to 100 % of what the run needs."""
    needed = sum(path.stat().st_blocks * 512 for path in (world.folder / "0").rglob("*"))
    told = Counter()
    for level in range(5, 101, 5):
        run, disk = tmp_path / f"level-{level}", tmp_path / f"disk-{level}"
        disk.mkdir()
        ended = world.run(run, disk=str(disk), bytes=needed * level // 100)
        if "PermissionError" in ended.said or "unshare" in ended.said:
            pytest.skip("no file systems of one's own here (unshare, mount)")
        assert ended.status == 0, (level, ended.said)
        found = json.loads(ended.said)
        assert found["wrong"] == [], level
        assert found["left"] == [], level
        if found["status"]:
            assert re.search("No space left|room", found["told"]), found
        told[found["status"]] += 1
        assert everything(run) == world.reference
        assert leftovers(run) == []
        shutil.rmtree(run)
    assert told[1] >= 12, told


def test_a_state_that_is_not_put_back_is_seen(world, tmp_path):
    """Negative controls: dropout, rows, rates or moments as if the run began anew are seen."""
    second = [i for i, name in enumerate(world.events) if name == "save:rename:after"][1]
    for forget in (None, "random", "sampler", "schedule", "optimizer"):
        run = tmp_path / f"forget-{forget}"
        assert world.run(run, event=second).status == -signal.SIGKILL
        assert check_wreck(run) == 4
        assert world.run(run, resume=True, forget=forget).status == 0
        assert (everything(run) == world.reference) is (forget is None), forget


# Several processes on one run


def test_of_many_at_once_one_runs(world, tmp_path):
    run = tmp_path / "run"
    ended = world.zygote(*[world.job(run, resume=True) for _ in range(6)])
    winners = [process for process in ended if process.status == 0]
    refused = [process for process in ended if process.status == 4]
    assert (len(winners), len(refused)) == (1, 5), [process.said for process in ended]
    for process in refused:
        assert f"is in use by process {winners[0].pid} on " in process.said
        assert process.seconds < 2
    assert everything(run) == world.reference
    # The holder of a lock is killed: the next one takes it without a human hand.
    shutil.rmtree(run)
    assert world.run(run, event=40).status == -signal.SIGKILL
    assert (run / ".lock").exists()
    resume_and_compare(world, run)


# Merging


def test_a_killed_merge_publishes_nothing_or_all(world, lora_run, tmp_path):
    job = {"merge": str(lora_run), "out": str(tmp_path / "whole/model")}
    (tmp_path / "whole").mkdir()
    (whole,) = world.zygote(job)
    assert whole.status == 0, whole.said
    expected = contents(tmp_path / "whole/model")
    rng = random.Random(7)
    for number in range(5):
        folder = tmp_path / f"merge-{number}"
        folder.mkdir()
        again = {**job, "out": str(folder / "model")}
        (ended,) = world.zygote({**again, "event": rng.randrange(len(whole.events))})
        assert ended.status == -signal.SIGKILL, ended.said
        if (folder / "model").exists():
            assert contents(folder / "model") == expected
            continue
        (ended,) = world.zygote(again)
        assert ended.status == 0, ended.said
        assert contents(folder / "model") == expected
        assert [path.name for path in folder.iterdir()] == ["model"]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
