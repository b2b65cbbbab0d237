"""Answers drawn by seed: what is trained is what the ledger says, however often it is asked."""

from __future__ import annotations

import csv
import itertools
import json
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tiny_rows import SMALL, asked, encoder_of, trained_text, turn
from tiny_world import MakeRecipe, fingerprint, lines, tiny_recipe
from vlmtune.batching import planner
from vlmtune.data.answers import acceptable_answers, answering, drawn_answer
from vlmtune.data.conversation import Box, Conversation
from vlmtune.data.dataset import PreparedDataset
from vlmtune.data.prepare import PrepareOptions, prepare
from vlmtune.errors import RefusedError
from vlmtune.recipe import Recipe
from vlmtune.training.config import TrainingConfig
from vlmtune.training.loader import Loader
from vlmtune.training.loop import StepReport, StoppedError
from vlmtune.training.prepare_rows import Measured, measure, plan_rows
from vlmtune.verbs.observer import Observer
from vlmtune.verbs.train import train


@pytest.fixture(scope="session")
def answers_data(tmp_path_factory: pytest.TempPathFactory, formula_table: Path) -> Path:
    """A prepared dataset whose rows have three, two or one acceptable answer, of other lengths."""
    with formula_table.open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    table = formula_table.with_name("answers.jsonl")
    with table.open("w", encoding="utf-8") as stream:
        for number, row in enumerate(rows):
            image, text = list(row.values())[:2]
            answers = [text, f"{text} \\quad {text}", "x"][: 3 - number % 3]
            stream.write(json.dumps({"image": image, "answers": answers}) + "\n")
    out = tmp_path_factory.mktemp("answers") / "data"
    prepare(table, out, PrepareOptions(validation=8))
    return out


@pytest.fixture
def drawing(tiny_base: Path, answers_data: Path) -> MakeRecipe:
    """Recipes that draw answers."""

    def make(**changes: Any) -> Recipe:
        return tiny_recipe(tiny_base, answers_data, **{"data__answers": "drawn", **changes})

    return make


def drawn(run: Path) -> list[list[int | None]]:
    return [each["answers"] for each in lines(run / "ledger.jsonl") if each["event"] == "trained"]


def batches(data: Path, base: Path, answers: str, workers: int = 0) -> Any:
    rows = PreparedDataset.open(data).split("train")
    encoder = encoder_of(base, SMALL)
    measured = measure(rows, encoder, lambda *_: None, answers)  # type: ignore[arg-type]
    config = TrainingConfig(batch_size=5, max_steps=60, seed=3)
    plan, _ = plan_rows(rows, measured, config, max_length=8192, too_long="drop", token_budget=200)
    steps = itertools.islice(Loader(rows, encoder, plan, workers).steps(0), 6)
    return rows, encoder, plan, list(steps)


@pytest.mark.parametrize("workers", [0, 3])
def test_the_labels_are_the_answer_that_the_step_names(answers_data, tiny_base, workers):
    rows, encoder, plan, steps = batches(answers_data, tiny_base, "drawn", workers)
    tokenizer = encoder.family.parts.tokenizer
    end = tokenizer.decode([encoder.end_id])
    seen = Counter()
    for step, packs in steps:
        assert len(step.answers) == len(step.rows)
        named = dict(zip(step.rows, step.answers, strict=True))
        by_id = {rows.ids[index]: index for index in step.rows}
        for pack in packs:
            texts = tokenizer.decode(pack.targets.tolist()).split(end)[:-1]
            assert len(texts) == len(pack.ids)
            for identity, text in zip(pack.ids, texts, strict=True):
                row = rows[by_id[identity]]
                number = named[by_id[identity]]
                assert (number is None) == (len(row.references) < 2)
                assert text == (row.answer if number is None else row.references[number])
                seen[number] += 1
            assert pack.tokens <= sum(plan.lengths[by_id[identity]] for identity in pack.ids)
    assert {None, 0, 1, 2} <= seen.keys()


def test_each_time_another_one(answers_data, tiny_base):
    """Over many steps each of three answers comes about equally often, and rows differ."""
    counts = Counter(drawn_answer(7, step, 4, 3) for step in range(1, 3001))
    assert max(counts.values()) - min(counts.values()) < 200
    plan = batches(answers_data, tiny_base, "drawn")[2]
    steps = [plan.step(number) for number in range(1, 61)]
    of_row: dict[int, set[int | None]] = {}
    for step in steps:
        for row, number in zip(step.rows, step.answers, strict=True):
            of_row.setdefault(row, set()).add(number)
    assert {len(numbers) for numbers in of_row.values()} == {1, 2, 3}
    assert [plan.step(9)] == [plan.step(9)]  # asked again, in any order


def test_fixed_answers_are_those_in_the_rows(answers_data, tiny_base):
    rows, encoder, plan, steps = batches(answers_data, tiny_base, "fixed")
    assert plan.choices is None
    lengths = [len(encoder.tokens(row)) for row in rows]
    assert plan.lengths.tolist() == lengths
    tokenizer = encoder.family.parts.tokenizer
    for step, packs in steps:
        assert step.answers == ()
        said = "".join(tokenizer.decode(pack.targets.tolist()) for pack in packs)
        assert all(rows[index].answer in said for index in step.rows)


def test_a_row_s_length_is_that_of_its_longest_answer(tiny_base):
    encoder = encoder_of(tiny_base, SMALL)
    short, long = "a cat", "a cat that sits on a mat, and another one that does not"
    row = asked("What?", short)
    row = Conversation(row.id, row.messages, row.images, (short, long, "  "))
    fixed = measure([row], encoder, lambda *_: None)
    found = measure([row], encoder, lambda *_: None, "drawn")
    longest = len(encoder.tokens(answering(row, long)))
    assert fixed == Measured([len(encoder.tokens(row))], None, [], visual=[0])
    assert found == Measured([longest], [2], [], visual=[0])  # a blank one is no answer
    assert longest > fixed.lengths[0]


def test_too_long_is_judged_by_the_longest_answer(answers_data, tiny_base):
    rows = PreparedDataset.open(answers_data).split("train")
    encoder = encoder_of(tiny_base, SMALL)
    config = TrainingConfig(batch_size=5)
    fixed = measure(rows, encoder, lambda *_: None)
    measured = measure(rows, encoder, lambda *_: None, "drawn")
    limit = sorted(measured.lengths)[len(rows) // 2]
    longer = [rows.ids[n] for n, length in enumerate(measured.lengths) if length > limit]
    alone = [rows.ids[n] for n, length in enumerate(fixed.lengths) if length > limit]
    assert set(alone) < set(longer)
    options = {"max_length": limit, "token_budget": 200}
    plan, dropped = plan_rows(rows, measured, config, too_long="drop", **options)
    assert [row.id for row in dropped] == longer
    assert any("with its longest answer" in row.message for row in dropped)
    assert len(plan.kept) == len(rows) - len(longer)
    assert [
        row.id for row in plan_rows(rows, fixed, config, too_long="drop", **options)[1]
    ] == alone
    with pytest.raises(RefusedError, match=f"{len(longer)} rows are too long"):
        plan_rows(rows, measured, config, too_long="error", **options)


def test_what_has_no_choice():
    row = asked("What?", "a cat")
    assert acceptable_answers(row) == ()
    many = Conversation(row.id, row.messages, row.images, ("a cat", "", "cat"))
    assert acceptable_answers(many) == ("a cat", "cat")
    assert acceptable_answers(many.prompt()) == ()
    box = turn("assistant", Box(0, "cat", (0, 0, 1, 1)))
    assert acceptable_answers(Conversation("x", (row.messages[0], box), (), ("a", "b"))) == ()
    assert acceptable_answers(Conversation("x", (), (), ("a", "b"))) == ()
    assert answering(many, "cat").answer == "cat"
    assert answering(many, "cat").references == many.references


def test_the_trained_text_is_the_drawn_one(tiny_base):
    encoder = encoder_of(tiny_base, SMALL)
    row = asked("What?", "a cat")
    end = encoder.family.parts.tokenizer.decode([encoder.end_id])
    assert trained_text(encoder, answering(row, "two dogs")) == f"two dogs{end}"


# Runs


class Stop(Observer):
    """Sends this process a signal after the third of six steps, where nothing would be saved."""

    def step(self, report: StepReport) -> None:
        if report.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)


def stopped_run(recipe: Recipe, folder: Path) -> Path:
    with pytest.raises(StoppedError):
        train(recipe, run_dir=folder, observer=Stop())
    return folder


@pytest.fixture(scope="module")
def whole(tiny_base: Path, answers_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawn") / "whole"
    train(tiny_recipe(tiny_base, answers_data, data__answers="drawn"), run_dir=folder)
    return folder


def test_stopped_and_resumed_is_uninterrupted(drawing, whole, tmp_path):
    recipe = drawing(training__workers=2)
    run = stopped_run(recipe, tmp_path / "run")
    train(recipe, run_dir=run, resume=True)
    assert fingerprint(run) == fingerprint(whole)
    assert drawn(run) == drawn(whole)
    assert len({number for step in drawn(run) for number in step}) == 4


def test_an_answer_that_depends_on_the_process_is_seen(answers_data, tiny_base, monkeypatch):
    """Negative control: drawn by what was drawn before, a plan resumed at step 4 is another."""
    plan = batches(answers_data, tiny_base, "drawn")[2]

    def from_step(first: int) -> list[tuple[int | None, ...]]:
        return [plan.step(number).answers for number in range(first, 7)]

    assert from_step(1)[3:] == from_step(4)
    turns = itertools.count()
    monkeypatch.setattr(planner, "drawn_answer", lambda *given: next(turns) % given[-1])
    assert from_step(1)[3:] != from_step(4)


def test_the_ledger_of_fixed_answers_names_none(lora_run):
    trained = [each for each in lines(lora_run / "ledger.jsonl") if each["event"] == "trained"]
    assert trained
    assert all("answers" not in each for each in trained)
