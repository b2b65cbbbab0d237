"""Checkpoints: whole or not at all, verified before they are read, pruned without surprises."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
from pathlib import Path

import pytest
import torch
from torch import nn

from tiny_world import MakeRecipe, copied, fingerprint
from vlmtune.errors import CheckpointError
from vlmtune.runs.checkpoints import MANIFEST, checkpoints, faults, newest_good
from vlmtune.training.checkpoint import TEMPORARY, State, load_state, prune
from vlmtune.training.distributed.ranks import Ranks
from vlmtune.training.distributed.strategy import Strategy
from vlmtune.training.saving import Saver
from vlmtune.verbs.train import train

FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "contract.json",
    MANIFEST,
    "optimizer.safetensors",
    "random.safetensors",
    "state.json",
)


@pytest.fixture
def good(lora_run: Path, tmp_path: Path) -> Path:
    """A copy of an undamaged checkpoint."""
    return copied(lora_run / "checkpoints/step-000006", tmp_path / "step-000006")


@pytest.fixture
def run(lora_run: Path, tmp_path: Path) -> Path:
    """A copy of a finished run, made unfinished, with checkpoints 2, 4 and 6."""
    folder = copied(lora_run, tmp_path / "run")
    (folder / "result.json").unlink()
    return folder


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def test_a_checkpoint_holds_these_files_and_nothing_is_wrong(good):
    assert sorted(path.name for path in good.iterdir()) == sorted(FILES)
    listed = json.loads((good / MANIFEST).read_text(encoding="utf-8"))["files"]
    assert listed.keys() == set(FILES) - {MANIFEST}
    assert faults(good) == []


@pytest.mark.parametrize("name", [name for name in FILES if name != MANIFEST])
def test_every_kind_of_damage_is_found(name, good):
    path = good / name
    content, rng = path.read_bytes(), random.Random(name)
    for _ in range(25):
        flip(path, rng.randrange(8 * len(content)))
        assert [fault.split(":")[0] for fault in faults(good)] == [name]
        path.write_bytes(content)
        assert faults(good) == []
    for part in range(10):
        path.write_bytes(content[: len(content) * part // 10])
        assert [fault.split(":")[0] for fault in faults(good)] == [name]
    path.write_bytes(content + b"\0")
    assert [fault.split(":")[0] for fault in faults(good)] == [name]
    path.unlink()
    assert faults(good) == [f"{name}: missing"]


def test_a_damaged_manifest_is_found(good):
    """A flip in the manifest breaks its JSON, a name, a size or a hash."""
    path = good / MANIFEST
    content, rng = path.read_bytes(), random.Random(5)
    end = content.index(b'"format"')  # what lies behind is no statement about a file
    for _ in range(60):
        flip(path, rng.randrange(8 * end))
        if json_or_none(path) != json.loads(content):
            assert faults(good), path.read_bytes()
        path.write_bytes(content)
    for part in range(10):
        path.write_bytes(content[: len(content) * part // 10])
        assert faults(good)
    path.unlink()
    assert faults(good)


def json_or_none(path: Path) -> object:
    try:
        return json.loads(path.read_bytes())
    except ValueError:
        return None


def test_safetensors_alone_would_not_notice(good):
    """Why there is a manifest: a flipped bit loads silently as another weight."""
    from safetensors.torch import load_file

    path = good / "adapter_model.safetensors"
    before = {name: tensor.clone() for name, tensor in load_file(path).items()}  # else mapped
    flip(path, 8 * (path.stat().st_size - 1))
    after = load_file(path)
    assert any(not torch.equal(after[name], tensor) for name, tensor in before.items())


def test_the_newest_good_one_is_taken(run, caplog):
    folder = run / "checkpoints"
    assert newest_good(folder).name == "step-000006"
    flip(folder / "step-000006/optimizer.safetensors", 12_345)
    with caplog.at_level(logging.WARNING):
        assert newest_good(folder).name == "step-000004"
    assert "step-000006" in caplog.text
    assert "optimizer.safetensors" in caplog.text


def test_a_run_continues_from_the_one_before_to_the_same_end(run, lora_run, make_recipe, caplog):
    flip(run / "checkpoints/step-000006/adapter_model.safetensors", 99_999)
    (run / "checkpoints/step-000004/random.safetensors").unlink()
    (run / "checkpoints" / f"{TEMPORARY}step-000006-123").mkdir()
    with caplog.at_level(logging.WARNING):
        train(make_recipe(), run_dir=run, resume=True)
    assert "adapter_model.safetensors" in caplog.text
    assert "random.safetensors: missing" in caplog.text
    assert fingerprint(run) == fingerprint(lora_run)
    assert [faults(path) for path in checkpoints(run / "checkpoints")] == [[], [], []]
    assert list((run / "checkpoints").glob(f"{TEMPORARY}*")) == []


def test_all_damaged_is_no_fresh_start(run, make_recipe):
    for path in checkpoints(run / "checkpoints"):
        flip(path / "state.json", 77)
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match=r"all 3 checkpoints in .* are damaged"):
        train(make_recipe(), run_dir=run, resume=True)
    assert (run / "metrics.jsonl").read_bytes() == before


def test_none_at_all_is_none(tmp_path):
    assert newest_good(tmp_path / "nowhere") is None
    assert checkpoints(tmp_path) == []


# Writing and pruning, on a model of one layer


class World:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        torch.manual_seed(0)
        self.model = nn.Linear(4, 2)
        self.parameters = dict(self.model.named_parameters())
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.model(torch.ones(1, 4)).sum().backward()
        self.optimizer.step()

    def save(self, step: int, fail: bool = False) -> Path:
        def write(out: Path) -> None:
            (out / "weights.bin").write_bytes(b"w" * 100)
            if fail:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        saver = Saver(
            self.folder, self.strategy, dict, lambda out, _: write(out), keep=99, behind=False
        )
        saver.save(State(step=step))
        return self.folder / f"step-{step:06d}"

    @property
    def strategy(self) -> Strategy:
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        place = torch.device("cpu")
        return Strategy(
            ranks=Ranks(),
            module=self.model,
            parameters=self.parameters,
            optimizer=self.optimizer,
            scaler=scaler,
            device=place,
        )


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "checkpoints")


def names(world: World) -> list[str]:
    return sorted(path.name for path in world.folder.iterdir())


def test_state_and_optimizer_come_back(world):
    path = world.save(3)
    again = World(world.folder)
    again.optimizer.state.clear()
    torch.manual_seed(1)
    drawn = torch.rand(3)
    state = load_state(path, again.strategy)
    assert state == State(step=3)
    for name, parameter in world.parameters.items():
        mine, theirs = world.optimizer.state[parameter], again.optimizer.state
        assert mine.keys() == theirs[again.parameters[name]].keys()
        for key, value in mine.items():
            assert torch.equal(value, theirs[again.parameters[name]][key])
    load_state(path, again.strategy)
    first = torch.rand(3)
    load_state(path, again.strategy)
    assert torch.equal(first, torch.rand(3))
    assert not torch.equal(first, drawn)


def test_an_optimizer_of_other_parameters_is_refused(world):
    path = world.save(1)
    world.parameters = {"other": world.model.weight}
    with pytest.raises(CheckpointError, match="2 parameters that do not train now"):
        load_state(path, world.strategy)


def test_the_newest_and_the_best_stay(world):
    for step in (2, 4, 6, 8, 10):
        world.save(step)
    prune(world.folder, keep=2, best_step=4)
    assert names(world) == ["step-000004", "step-000008", "step-000010"]
    prune(world.folder, keep=2, best_step=None)
    assert names(world) == ["step-000008", "step-000010"]


def test_leftovers_of_kills_are_removed(world):
    world.save(2)
    (world.folder / f"{TEMPORARY}step-000004-123").mkdir()
    (world.folder / f"{TEMPORARY}step-000004-123" / "optimizer.safetensors").write_bytes(b"half")
    (world.folder / f"{TEMPORARY}step-000001-old").mkdir()
    assert newest_good(world.folder).name == "step-000002"
    prune(world.folder, keep=1, best_step=None)
    assert names(world) == ["step-000002"]


def test_a_full_disk_leaves_the_earlier_one_and_no_half_of_a_new_one(world):
    world.save(2)
    with pytest.raises(CheckpointError, match=r"could not be written: .*No space left.*--resume"):
        world.save(4, fail=True)
    assert names(world) == ["step-000002"]
    assert faults(world.folder / "step-000002") == []


def test_a_damaged_one_of_the_same_step_is_replaced(world):
    world.save(2)
    flip(world.folder / "step-000002/weights.bin", 3)
    world.save(2)
    assert faults(world.folder / "step-000002") == []


def test_a_million_steps_sort_after_the_others(world):
    for step in (999_999, 1_000_000):
        world.save(step)
    assert newest_good(world.folder).name == "step-1000000"


def test_files_are_durable_before_they_get_their_name(world, monkeypatch):
    """After a power cut a checkpoint by its name is whole: all of it was synced before."""
    synced: list[str] = []
    renamed_after: list[int] = []
    sync, rename = os.fsync, Path.rename

    def note(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        sync(descriptor)

    def note_rename(self: Path, target: Path) -> Path:
        renamed_after.append(len(synced))
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(Path, "rename", note_rename)
    path = world.save(5)
    (before,) = renamed_after
    listed = {entry.name for entry in path.iterdir()}
    assert listed <= set(synced[:before])
    assert synced[:before].index(MANIFEST) > synced.index("optimizer.safetensors")
    assert synced[before - 1].startswith(TEMPORARY)  # the folder's own entries
    assert synced[before:] == ["checkpoints"]  # and the new name


def test_the_best_probe_is_never_a_nan(make_recipe: MakeRecipe, tmp_path, monkeypatch):
    from vlmtune.training import loop

    measured = iter([float("nan"), 2.5, float("inf")])
    monkeypatch.setattr(loop, "mean_loss", lambda *_: next(measured))
    train(make_recipe(), run_dir=tmp_path / "run")
    state = json.loads((tmp_path / "run/checkpoints/step-000006/state.json").read_text("utf-8"))
    assert (state["best_step"], state["best_value"]) == (4, 2.5)
