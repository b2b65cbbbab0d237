"""The proof that what should train does: planted failures stop the run before anything is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from planted import write_dataset
from tiny_rows import asked, picture
from tiny_world import MakeRecipe, lines
from vlmtune.cli.progress import Lines
from vlmtune.data.conversation import Conversation
from vlmtune.models.families import load_family
from vlmtune.models.load import load_model
from vlmtune.runs.checkpoints import checkpoints
from vlmtune.training.distributed.strategy import norms_of
from vlmtune.training.trainability import PartGradient, TrainabilityError, TrainabilityProof
from vlmtune.tuning.apply import apply_tuning
from vlmtune.tuning.config import PARTS, TuningConfig
from vlmtune.tuning.parts import count_parts
from vlmtune.verbs import train as verb
from vlmtune.verbs.observer import Observer
from vlmtune.verbs.train import train

EVERYWHERE = {"targets": "all-linear", "train": list(PARTS), "rank": 2, "dropout": 0.0}


class Keep(Observer):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.tables: list[list[PartGradient]] = []

    def trainability(self, rows: Any) -> None:
        self.tables.append(list(rows))


def go(make_recipe: MakeRecipe, folder: Path, tuning: dict[str, Any], **changes: Any) -> Keep:
    observer = Keep()
    settings = {"training__max_steps": 2, "evaluation__probe": 0, **changes}
    train(make_recipe(tuning=tuning, **settings), run_dir=folder, observer=observer)
    return observer


def event(folder: Path) -> dict[str, Any]:
    (found,) = [r for r in lines(folder / "ledger.jsonl") if r["event"] == "trainability"]
    return found


def test_every_part_is_shown_with_its_gradient(make_recipe, tmp_path):
    """Adapters everywhere: the norms are those of the step's own gradient, cut by parts."""
    (table,) = go(make_recipe, tmp_path / "run", EVERYWHERE, training__clip=0).tables
    assert [row.part for row in table] == [*PARTS]
    assert all(row.trainable > 0 and row.gradient_norm > 0 and row.step == 1 for row in table)
    whole = sum(row.gradient_norm**2 for row in table) ** 0.5
    first = lines(tmp_path / "run/metrics.jsonl")[0]
    assert whole == pytest.approx(first["gradient_norm"], rel=1e-5)
    assert event(tmp_path / "run")["parts"] == [vars(row) for row in table]
    # B is zero at first, and so is the gradient of A: no tensor counts as left out.
    assert [row.without_gradient for row in table] == [0, 0, 0]


def test_frozen_parts_are_shown_as_frozen(make_recipe, tmp_path, tiny_base, capsys):
    (table,) = go(make_recipe, tmp_path / "run", {"rank": 2}).tables
    model = load_model(tiny_base, dtype=torch.float32, device=torch.device("cpu"))
    counts = count_parts(model, load_family(str(tiny_base)).facts, trainable=False)
    trained = {row.part: row.trainable for row in table}
    assert trained["vision"] == trained["projector"] == 0 < trained["language"]
    for row in table:
        assert row.parameters == counts[row.part] + row.trainable
        assert (row.gradient_norm is None) == (row.trainable == 0)
    Lines(10).trainability(table)
    shown = capsys.readouterr().err
    assert "without gradient" in shown
    assert shown.count("frozen") == 2
    assert f"{trained['language']:,}" in shown


# Planted failures


def cut(module: Any, inputs: Any, output: Any) -> Any:  # noqa: ARG001
    """A forward hook after which nothing of the module reaches the graph."""
    return output.detach()


def detach(job: Any) -> None:
    """The features of the tower leave the graph, as a no_grad around a cache would make them."""
    job.model.model.visual.blocks[-1].register_forward_hook(cut)


def switch_off(job: Any, *words: str) -> None:
    for name, parameter in job.strategy.parameters.items():
        if any(word in name for word in words):
            parameter.requires_grad_(False)


def thaw(job: Any, *words: str) -> None:
    for name, parameter in job.model.named_parameters():
        if all(word in name for word in words):
            parameter.requires_grad_(True)


FULL = {"method": "full"}
PLANTED = {
    "detached, adapters": (
        EVERYWHERE, detach, r"the vision part should train .* detached on the way, or unused"
    ),
    "detached, full": (FULL, detach, r"the vision part .* none of its tensors got a gradient"),
    "detached, nothing else trains": (
        {**FULL, "train": ["vision"]}, detach, r"the vision part .* none of its tensors"
    ),
    "requires_grad off, vision": (
        FULL, lambda job: switch_off(job, "visual.blocks", "patch_embed"),
        r"the vision part should train .*requires_grad is off since",
    ),
    "requires_grad off, everything": (
        {"rank": 2}, lambda job: switch_off(job, "lora_"),
        r"the language part should train .*tuning\.freeze=\[language\]",
    ),
    "a frozen tower thawed": (
        {"rank": 2}, lambda job: thaw(job, "visual.blocks.0", "weight"),
        r"tensors of the vision part got a gradient .* the part is frozen .*visual\.blocks\.0",
    ),
    "the base under the adapters thawed": (
        {"rank": 2}, lambda job: thaw(job, "layers.0.self_attn.q_proj.base_layer.weight"),
        r"1 tensors of the language part got a gradient .* beside what trains",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PLANTED)
def test_a_planted_failure_stops_the_run(case, make_recipe, tmp_path, monkeypatch):
    tuning, plant, message = PLANTED[case]
    run = verb.run
    monkeypatch.setattr(verb, "run", lambda job: (plant(job), run(job))[1])
    with pytest.raises(TrainabilityError, match=message) as caught:
        go(make_recipe, tmp_path / "run", tuning)
    assert "in step 1" in str(caught.value)
    assert "The step was not applied" in str(caught.value)
    assert checkpoints(tmp_path / "run/checkpoints") == []


# Steps without images


def words(number: int) -> Conversation:
    return Conversation(f"text-{number}", asked("Who?", f"Number {number}.").messages)


def sight(number: int) -> Conversation:
    row = asked("What?", f"Noise {number}.", picture((40, 40), seed=number))
    return Conversation(f"image-{number}", row.messages, row.images)


@pytest.fixture(scope="module")
def step_rows(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Any:
    """Recipes over rows of which each is a step, and the order in which they will be trained."""
    from tiny_world import tiny_recipe
    from vlmtune.batching.planner import make_plan

    def made(count: int, seeing: int) -> Any:
        """``count`` rows; the one trained in step ``seeing`` has an image."""
        options = {"batch_size": 1, "epochs": 1, "max_steps": None, "max_length": 99}
        plan = make_plan([9] * count, **options, token_budget=99, seed=42)
        order = [step.rows[0] for step in plan]
        images = {order[seeing - 1]} if seeing else set()
        rows = [sight(index) if index in images else words(index) for index in range(count)]
        data = tmp_path_factory.mktemp("steps") / "data"
        write_dataset(data, rows, [words(99)])

        def make(**changes: Any) -> Any:
            return tiny_recipe(tiny_base, data, training__batch_size=1, **changes)

        return make

    return made


def test_it_waits_for_an_image(step_rows, tmp_path):
    make = step_rows(4, seeing=3)
    (table,) = go(make, tmp_path / "run", EVERYWHERE, training__max_steps=4).tables
    assert {row.part: row.step for row in table} == {"vision": 3, "projector": 3, "language": 1}
    assert event(tmp_path / "run")["step"] == 3


def test_the_failure_is_found_when_the_image_comes(step_rows, tmp_path, monkeypatch):
    run = verb.run
    monkeypatch.setattr(verb, "run", lambda job: (detach(job), run(job))[1])
    with pytest.raises(TrainabilityError, match=r"vision part .* got a gradient in step 3"):
        go(step_rows(4, seeing=3), tmp_path / "run", EVERYWHERE, training__max_steps=4)
    assert len(lines(tmp_path / "run/metrics.jsonl")) == 2


def test_without_any_image_it_is_said_at_the_end(step_rows, tmp_path, caplog):
    (table,) = go(step_rows(3, seeing=0), tmp_path / "run", EVERYWHERE).tables
    assert {row.part: row.step for row in table} == {
        "vision": None,
        "projector": None,
        "language": 1,
    }
    assert "no step had an image: the vision part did not train" in caplog.text


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_step_that_moves_nothing_is_no_fault(precision, step_rows, tmp_path):
    """The vision tower alone trains, and two steps in three have no image."""
    tuning = {"method": "full", "train": ["vision"]}
    changes = {"training__max_steps": 3, "training__precision": precision}
    go(step_rows(3, seeing=2), tmp_path / "run", tuning, **changes)
    norms = [step["gradient_norm"] for step in lines(tmp_path / "run/metrics.jsonl")]
    assert norms[0] == norms[2] == 0 < norms[1]


# The proof itself


def test_an_overflow_shows_nothing(tiny_base):
    facts = load_family(str(tiny_base)).facts
    model = load_model(tiny_base, dtype=torch.float32, device=torch.device("cpu"))
    parameters = apply_tuning(model, TuningConfig(rank=2), facts, base_id="b").trainable()
    proof = TrainabilityProof(model, facts, parameters)
    for parameter in parameters.values():
        parameter.grad = torch.full_like(parameter, float("inf"))
    proof.observe(1, norms_of(parameters), images=True)
    assert not proof.complete
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    proof.observe(2, norms_of(parameters), images=True)
    assert proof.complete
    assert {row.part: row.step for row in proof.rows} == {
        "vision": 1,
        "projector": 1,
        "language": 2,
    }


def test_an_unused_layer_is_counted(make_recipe, tmp_path, monkeypatch):
    """A layer that the model skips (as LLaVA's last of the tower) is no fault of the part."""
    run = verb.run

    def skip_last(job: Any) -> Any:
        job.model.model.visual.blocks[1].mlp.register_forward_hook(cut)
        return run(job)

    monkeypatch.setattr(verb, "run", skip_last)
    (table,) = go(make_recipe, tmp_path / "run", EVERYWHERE).tables
    assert {row.part: row.without_gradient for row in table} == {
        "vision": 2,  # the second matrices of its two layers' adapters
        "projector": 0,
        "language": 0,
    }
