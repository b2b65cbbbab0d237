"""One process, two and four end in the same weights, however the processes hold them."""

from __future__ import annotations

import shutil

import pytest
import torch

from distributed.mixed import TUNINGS, distance, figures, trained, weights
from distributed.processes import together
from vlmtune.errors import CheckpointError
from vlmtune.runs.checkpoints import checkpoints
from vlmtune.training import checkpoint, saving
from vlmtune.training.distributed.strategy import Strategy, whole
from vlmtune.verbs.train import train

LONG = 20
STRATEGIES = ("ddp", "fsdp2")
KINDS = ("lora", "full")


SMALL_STEPS = {"training__batch_size": 4, "training__token_budget": 200}  # two or three forwards


@pytest.fixture(scope="session")
def alone(make, tmp_path_factory):
    """A run of one process in float64, by kind; its options are those of ``check_same``."""
    made = {}

    def of(kind, **changes):
        key = (kind, *changes.items())
        if key not in made:
            folder = tmp_path_factory.mktemp("alone") / "run"
            made[key] = trained(make(tuning=TUNINGS[kind], **changes), folder, double=True)
        return made[key]

    return of


def check_figures(run, one):
    """The loss that is shown is summed up in fp32, whatever the model counts in."""
    found, expected = figures(run), figures(one)
    torch.testing.assert_close(found[:, 0], expected[:, 0], rtol=1e-6, atol=0)
    torch.testing.assert_close(found[:, 1:], expected[:, 1:], rtol=1e-10, atol=1e-12)


def check_same(make, alone, run, kind, strategy, count, **changes):
    recipe = make(tuning=TUNINGS[kind], distributed__strategy=strategy, **changes)
    trained(recipe, run, count, double=True)
    one = alone(kind, **changes)
    assert next(iter(weights(run).values())).dtype == torch.float64
    check_figures(run, one)
    assert distance(run, one) <= 1e-10


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_are_one(make, alone, tmp_path, strategy):
    check_same(make, alone, tmp_path / "run", "lora", strategy, 2)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", KINDS)
def test_twenty_steps_of_several_are_those_of_one(make, alone, tmp_path, kind, strategy, count):
    changes = {**SMALL_STEPS, "training__max_steps": LONG}
    check_same(make, alone, tmp_path / "run", kind, strategy, count, **changes)


def gradients_of_the_first_step(recipe, run, count):
    """In fp32, whole, as the first process sees them before they are clipped."""

    class SeenError(Exception):
        """Enough was seen."""

    def work(ranks):
        found = {}

        def move(self, limit, *, finite):  # noqa: ARG001
            for name, parameter in self.parameters.items():
                if parameter.grad is not None:
                    found[name] = whole(parameter.grad).tolist()
            raise SeenError

        Strategy.move = move
        try:
            train(recipe, run_dir=run)
        except SeenError:
            return found if ranks.first else {}
        return "no step"

    return {name: torch.tensor(each) for name, each in together(count, work)[0].items()}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_in_fp32(make, tmp_path, kind, strategy):
    def found(count, **more):
        recipe = make(tuning=TUNINGS[kind], distributed__strategy=strategy, **more)
        return gradients_of_the_first_step(recipe, tmp_path / str(len(more) + count), count)

    one, two = found(1), found(2)
    assert one.keys() == two.keys()
    norm = torch.linalg.vector_norm(torch.cat([each.reshape(-1) for each in one.values()]))
    for name, gradient in one.items():
        apart = torch.linalg.vector_norm(two[name] - gradient)
        assert apart <= 1e-5 * max(torch.linalg.vector_norm(gradient), 1e-3 * norm), name
    other = found(2, training__batch_size=5)  # the control: a row less is seen
    assert any((other[name] - one[name]).abs().max() > 1e-3 * norm for name in one)


RESUMED = [("fsdp2", (1, 2, 1)), ("fsdp2", (2, 4)), ("ddp", (1, 2, 1)), ("ddp", (2, 4))]
SIX = {**SMALL_STEPS, "training__max_steps": 6}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("strategy", "counts"), RESUMED)
def test_a_run_goes_on_with_another_number_of_processes(make, alone, tmp_path, strategy, counts):
    """To the same weights: nothing is trained twice, left out, or begun anew."""
    recipe = make(tuning=TUNINGS["full"], distributed__strategy=strategy, **SIX)
    for place, count in enumerate(counts):
        trained(recipe, tmp_path / "run", count, cut=place < len(counts) - 1, double=True)
    one = alone("full", **SIX)
    check_figures(tmp_path / "run", one)
    assert distance(tmp_path / "run", one) <= 1e-10


@pytest.mark.slow
def test_a_run_that_forgets_its_optimizer_goes_elsewhere(make, alone, tmp_path, monkeypatch):
    """The control of the one above."""
    recipe = make(tuning=TUNINGS["full"], distributed__strategy="fsdp2", **SIX)
    trained(recipe, tmp_path / "run", 2, cut=True, double=True)
    monkeypatch.setattr(Strategy, "restore", lambda *_: None)
    trained(recipe, tmp_path / "run", 2, double=True)
    assert distance(tmp_path / "run", alone("full", **SIX)) > 1e-6


@pytest.mark.slow
def test_no_room_is_told_to_all(make, tmp_path):
    """What all have to write counts; the others do not wait for a process that gave up."""
    recipe = make(tuning=TUNINGS["full"], distributed__strategy="fsdp2", **SIX)
    asked = []

    def work(_):
        room = shutil.disk_usage(tmp_path)
        shutil.disk_usage = lambda _: room._replace(free=10**5)
        original = checkpoint.require_room
        saving.require_room = lambda folder, size: asked.append(size) or original(folder, size)
        with pytest.raises(CheckpointError) as caught:
            train(recipe, run_dir=tmp_path / "run")
        return str(caught.value), asked

    found = together(2, work)
    assert "free for it; there are 0.10 MB" in found[0][0]
    assert found[1] == ("the first process could not begin a checkpoint", [])
    one = trained(make(tuning=TUNINGS["full"], **SIX), tmp_path / "one")
    last = checkpoints(one / "checkpoints")[-1]
    written = [last / "model.safetensors", last / "optimizer.safetensors"]
    assert found[0][1] == [pytest.approx(sum(file.stat().st_size for file in written), rel=0.05)]
