"""ZeRO through DeepSpeed: the weights of one process; any number goes on from its checkpoints."""

from __future__ import annotations

from importlib import import_module

import pytest

from distributed.mixed import TUNINGS, distance, figures, trained
from vlmtune.errors import MissingExtraError
from vlmtune.runs.checkpoints import checkpoints
from vlmtune.training.distributed import zero
from vlmtune.training.distributed.launcher import Launch
from vlmtune.training.distributed.strategy import Strategy
from vlmtune.verbs.launch import train_together

# DeepSpeed uses deprecated parts of torch, and tells of its own at length.
pytestmark = pytest.mark.filterwarnings("ignore")
STAGES = ("zero2", "zero3")
CLOSE = {"lora": 1e-5, "full": 1e-4}  # Adam magnifies rounding
SHORT = {"training__batch_size": 4, "training__token_budget": 200, "training__max_steps": 6}
LONG = {**SHORT, "training__max_steps": 20}


@pytest.fixture(scope="module")
def deepspeed():
    """Imported before the processes are forked, with what it would import at its first use."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is an extra; make test-deepspeed")
    import_module("deepspeed.runtime.zero.muon.muon_optimizer")


@pytest.fixture(scope="module")
def alone(make, tmp_path_factory):
    """A run of one process, by kind."""
    made = {}

    def of(kind, **changes):
        key = (kind, *changes.items())
        if key not in made:
            folder = tmp_path_factory.mktemp("alone") / "run"
            made[key] = trained(make(tuning=TUNINGS[kind], **changes), folder)
        return made[key]

    return of


def check_same(run, one, most):
    found, expected = figures(run), figures(one)
    assert ((found - expected).abs() <= 1e-4 * expected.abs()).all()
    assert distance(run, one) <= most


@pytest.mark.parametrize("kind", TUNINGS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.usefixtures("deepspeed")
def test_twenty_steps_of_two_are_those_of_one(make, alone, tmp_path, kind, stage):
    recipe = make(tuning=TUNINGS[kind], distributed__strategy=stage, **LONG)
    run = trained(recipe, tmp_path / "run", 2)
    check_same(run, alone(kind, **LONG), CLOSE[kind])
    for path in checkpoints(run / "checkpoints")[-1].rglob("*"):
        assert path.suffix in (".safetensors", ".json", ".jinja"), path  # none of DeepSpeed's own


@pytest.mark.parametrize("counts", [(2, 2), (1, 2), (2, 1)])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.usefixtures("deepspeed")
def test_a_run_goes_on(make, alone, tmp_path, stage, counts):
    recipe = make(tuning=TUNINGS["full"], distributed__strategy=stage, **SHORT)
    for place, count in enumerate(counts):
        trained(recipe, tmp_path / "run", count, cut=place == 0)
    check_same(tmp_path / "run", alone("full", **SHORT), CLOSE["full"])


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.usefixtures("deepspeed")
def test_a_run_that_forgets_its_optimizer_goes_elsewhere(make, alone, tmp_path, monkeypatch, stage):
    """The control of the one above."""
    recipe = make(tuning=TUNINGS["full"], distributed__strategy=stage, **SHORT)
    trained(recipe, tmp_path / "run", 2, cut=True)
    monkeypatch.setattr(Strategy, "restore", lambda *_: None)
    trained(recipe, tmp_path / "run", 2)
    assert distance(tmp_path / "run", alone("full", **SHORT)) > CLOSE["full"]


def test_where_it_is_not_installed_it_is_said_before_anything_starts(make, tmp_path, monkeypatch):
    monkeypatch.setattr(zero, "find_spec", lambda _: None)
    recipe = make(distributed__strategy="zero3")
    with pytest.raises(MissingExtraError, match=r"pip install 'vlmtune\[deepspeed\]'"):
        train_together(recipe, Launch(2), "no_module", run_dir=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
