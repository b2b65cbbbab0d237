"""``training.gradient_checkpointing: auto``: where memory needs it, decided once a run."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import pytest
import yaml

from tiny_world import lines
from vlmtune.errors import RecipeError
from vlmtune.forecast.devices import DEVICES
from vlmtune.models.empty import empty_model
from vlmtune.runs.folder import RunFolder
from vlmtune.training.distributed.ranks import Ranks
from vlmtune.verbs import plan as plan_module
from vlmtune.verbs import recomputing, tracing
from vlmtune.verbs import train as train_module
from vlmtune.verbs.observer import Observer
from vlmtune.verbs.plan import plan
from vlmtune.verbs.recomputing import choose, decide
from vlmtune.verbs.run_facts import recipe_changes
from vlmtune.verbs.start import recompute_activations
from vlmtune.verbs.tracing import Tracing
from vlmtune.verbs.train import train

# Long enough that activations outweigh what else a model this small holds.
LONG = {"training__token_budget": 4096}
MUCH = 10 * 2**30


class Broken(Observer):
    """Breaks off behind a step, as a power cut would; notes what it was told."""

    def __init__(self):
        self.told = []

    def stage(self, text):
        self.told.append(text)

    def step(self, report):
        if report.step == 3:
            raise KeyboardInterrupt


@pytest.fixture
def there(monkeypatch):
    """Sets the memory that there is."""
    return lambda room: monkeypatch.setattr(train_module, "room_here", lambda *_: room)


def device_with(memory):
    return replace(DEVICES["t4"], gpu=False, memory=memory)


@pytest.fixture(scope="module")
def planned(make_recipe):
    """The forecast for a machine with hardly any memory: all parts were looked at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "device_named", lambda _: device_with(1))
        return plan(make_recipe(**LONG))


@pytest.fixture(scope="module")
def peaks(planned):
    """What the run is forecast to need, by what is computed again."""
    return planned["recomputed"]["peaks"]


@pytest.fixture(scope="module")
def decision(make_recipe):
    """Decides for a run in a folder, as ``train`` does."""
    recipe = make_recipe(**LONG)
    forecast = plan_module._Forecast(recipe, device_with(1), 1, 0.4, Observer())

    def made(folder, room, told=print):
        folder.mkdir(exist_ok=True)
        run, encoder = RunFolder(folder), forecast.seen.encoder(forecast.encoder)
        given = (recipe, forecast.base, encoder, forecast.made, forecast.rows, run)
        with pytest.MonkeyPatch.context() as patch:  # each step is traced once for all tests
            patch.setattr(tracing, "Tracing", lambda *_: forecast.tracing)
            return decide(*given, Ranks(), room, told)

    return made


def decided(run):
    return json.loads((run / "recomputed.json").read_text(encoding="utf-8"))


def figures(run):
    return [(step["loss"], step["gradient_norm"]) for step in lines(run / "metrics.jsonl")]


def test_a_run_decides_once_and_its_result_does_not_depend_on_it(
    make_recipe, tmp_path, there, planned, peaks
):
    assert peaks["language"] < peaks["nothing"]
    there(MUCH)
    train(make_recipe(**LONG), run_dir=tmp_path / "large")
    assert decided(tmp_path / "large")["recomputed"] == "nothing"
    little = (peaks["language"] + peaks["nothing"]) // 2
    there(little + planned["vision_cache"]["feature_bytes"])
    broken = Broken()
    with pytest.raises(KeyboardInterrupt):
        train(make_recipe(**LONG), run_dir=tmp_path / "small", observer=broken)
    before = decided(tmp_path / "small")
    # To the byte what ``plan`` forecasts, features that are kept included.
    assert before == {"recomputed": "language", "peaks": peaks, "room": little}
    (told,) = [text for text in broken.told if "gradient_checkpointing" in text]
    assert "auto: language is computed again (peak by what is: nothing 0.0" in told
    # Continued where there is more: as it was decided.
    there(MUCH)
    train(make_recipe(**LONG), run_dir=tmp_path / "small", resume=True)
    assert decided(tmp_path / "small") == before
    for found, expected in zip(
        figures(tmp_path / "small"), figures(tmp_path / "large"), strict=True
    ):
        assert found == pytest.approx(expected, rel=1e-5)


def test_what_is_decided_by_the_room_there_is(tmp_path, decision, peaks, monkeypatch):
    told = []
    fit = peaks["nothing"]
    assert decision(tmp_path / "exactly", fit, told.append) == "nothing"
    assert told == []
    assert decision(tmp_path / "less", fit - 1, told.append) == "language"
    assert decision(tmp_path / "tiny", 1, told.append) == "language"
    assert len(told) == 2
    # It stands in the folder; a run that began before there was a decision has none yet.
    assert decision(tmp_path / "less", MUCH) == "language"
    (tmp_path / "less" / "recomputed.json").unlink()
    monkeypatch.setattr(Tracing, "trace", None)  # what plainly fits is not traced
    assert decision(tmp_path / "less", MUCH) == "nothing"
    (bound,) = decided(tmp_path / "less")["peaks"].values()
    assert fit < bound


def test_what_cannot_be_forecast_trains_all_the_same(tmp_path, decision, monkeypatch, caplog):
    def unknown(*_, **__):
        raise RuntimeError("data-dependent output\nand so on")

    monkeypatch.setattr(Tracing, "trace", unknown)
    with caplog.at_level(logging.WARNING):
        assert decision(tmp_path / "tiny", 1) == "all"
    assert "cannot be forecast (RuntimeError: data-dependent output); by" in caplog.text
    bound = decided(tmp_path / "tiny")["peaks"]["nothing"]
    assert decision(tmp_path / "bound", bound) == "nothing"


def test_a_class_without_checkpoints(tiny_base, tmp_path, decision, monkeypatch):
    model = empty_model(tiny_base)
    monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    assert decision(tmp_path / "tiny", 1) == "nothing"
    with pytest.raises(RecipeError, match=r"training\.gradient_checkpointing: found true, and Qw"):
        recompute_activations(model, model)


def test_plan_tells_the_decision(make_recipe, monkeypatch, planned, peaks):
    def shown(memory, **changes):
        monkeypatch.setattr(plan_module, "device_named", lambda _: device_with(memory))
        return plan(make_recipe(**LONG, **changes))

    features = planned["vision_cache"]["feature_bytes"]
    little = int((peaks["nothing"] + features) / recomputing.MARGIN["cpu"]) - 2
    assert planned["recomputed"]["recomputed"] == "language"
    assert planned["peak_memory_bytes"] == peaks["language"] + features
    assert shown(little)["recomputed"]["recomputed"] == "language"
    # Negative control: stated, it is not decided.
    stated = shown(little, training__gradient_checkpointing=False)
    assert stated["recomputed"]["recomputed"] == "nothing"
    assert stated["recomputed"]["peaks"] == {}
    assert stated["peak_memory_bytes"] == peaks["nothing"] + features


def test_a_statement_is_no_decision_and_changes_no_run(make_recipe, tmp_path):
    recipe = make_recipe()
    for said, expected in ((True, "all"), (False, "nothing")):
        stated = make_recipe(training__gradient_checkpointing=said)
        assert decide(stated, *[None] * 5, Ranks(), 1, print) == expected
        # As a run of before has it in its folder: it goes on, though the default is another now.
        (tmp_path / "recipe.yaml").write_text(stated.to_yaml(), encoding="utf-8")
        stored = yaml.safe_load(stated.to_yaml())
        assert stored["training"]["gradient_checkpointing"] is said
        assert recipe_changes(tmp_path / "recipe.yaml", recipe) == []
    with pytest.raises(
        RecipeError, match=r"training\.gradient_checkpointing: Input should be 'auto', True or"
    ):
        make_recipe(training__gradient_checkpointing="sometimes")


def test_the_first_process_decides_for_all(make_recipe):
    """Another one measures nothing, and reads no folder: it takes what it is told."""

    class Second(Ranks):
        def gather_json(self, value):
            assert value is None
            return [{"recomputed": "language"}, value]

    given = (*[None] * 5, Second(rank=1, count=2), 1, print)
    assert decide(make_recipe(), *given) == "language"
    assert decide(make_recipe(training__gradient_checkpointing=True), *given) == "all"


@pytest.mark.slow
def test_another_recipe_is_decided_anew(make_recipe, tmp_path, there):
    there(1)
    train(make_recipe(**LONG), run_dir=tmp_path / "run")
    assert decided(tmp_path / "run")["recomputed"] == "language"
    there(MUCH)
    changed = make_recipe(**LONG, training__learning_rate=2e-2)
    train(changed, run_dir=tmp_path / "run", resume=True, allow_change=True)
    assert decided(tmp_path / "run")["recomputed"] == "nothing"


@pytest.mark.slow
def test_the_part_that_costs_least_of_what_fits(make_recipe):
    recipe = make_recipe(tuning={"method": "full"}, **LONG)
    forecast = plan_module._Forecast(recipe, DEVICES["t4"], 1, 0.4, Observer())
    traces, rows = forecast.tracing, [range(12)]
    found = {
        part: traces.peak(rows, part, several=False)
        for part in ("nothing", "vision", "language", "all")
    }
    peaks = {part: peak for part, (peak, _) in found.items()}
    assert peaks["all"] < min(peaks["vision"], peaks["language"])
    assert max(peaks["vision"], peaks["language"]) < peaks["nothing"]
    assert found["all"][1] == pytest.approx(found["vision"][1] + found["language"][1], rel=0.01)
    cheap = min(("vision", "language"), key=lambda part: found[part][1])
    for room, expected in (
        (peaks["nothing"], "nothing"),
        (max(peaks["vision"], peaks["language"]), cheap),
        (peaks["all"], "all"),
        (1, "all"),
    ):
        assert choose(traces, rows, room, several=False).recomputed == expected
    # A frozen tower has nothing to compute again: it is not looked at.
    frozen = replace(traces, recipe=make_recipe(**LONG), _traced={})
    assert set(choose(frozen, rows, 1, several=False).peaks) == {"nothing", "language"}
