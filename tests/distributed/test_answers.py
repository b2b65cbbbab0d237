"""Measuring with several processes: each row is asked of one, and the answers are the same."""

from __future__ import annotations

import json

import pytest

from distributed.mixed import mixed_recipe, mixed_rows
from distributed.processes import together
from planted import write_dataset
from tiny_world import lines
from vlmtune.training.distributed import answering
from vlmtune.verbs.train import train

ROWS = 7  # no multiple of two or three
MEASURES = {
    "training__max_steps": 2,
    "training__save_steps": 9,
    "evaluation__before": True,
    "evaluation__after": True,
    "evaluation__generate_every": 1,
    "evaluation__probe": 3,
    "evaluation__max_new_tokens": 4,
    "evaluation__batch_rows": 2,
}
ASKED = {"before": ROWS, "step-000001": 3, "step-000002": 3, "after": ROWS}


@pytest.fixture(scope="module")
def recipe(tiny_base, tmp_path_factory):
    out = tmp_path_factory.mktemp("answers") / "data"
    data = write_dataset(out, mixed_rows("row", 6), mixed_rows("validation", ROWS))
    return lambda **changes: mixed_recipe(tiny_base, data, **{**MEASURES, **changes})


def questions_of(recipe, run, count):
    """The ids of the questions that each process answers, in their order."""

    def work(_):
        asked = []
        generate = answering.generate

        def counted(model, encoder, questions, **options):
            asked.append([question.id for question in questions])
            return generate(model, encoder, questions, **options)

        answering.generate = counted
        train(recipe, run_dir=run)
        return asked

    return together(count, work)


def answers(run, when):
    return [
        (record["id"], record["prediction"], record["scores"])
        for record in lines(run / "evaluation" / when / "predictions.jsonl")
    ]


@pytest.fixture(scope="module")
def one(recipe, tmp_path_factory):
    run = tmp_path_factory.mktemp("one") / "run"
    questions_of(recipe(), run, 1)
    return run


def check_asked_once(found, count):
    """Each measurement by each process its share, and together each row once."""
    for place, (when, rows) in enumerate(ASKED.items()):
        hands = [found[rank][place] for rank in range(count)]
        everything = sorted(row for hand in hands for row in hand)
        assert everything == [f"validation-{number}" for number in range(rows)], when
        assert all(hands), when


@pytest.mark.parametrize(
    ("strategy", "count"),
    [("ddp", 2), *[pytest.param(name, 3, marks=pytest.mark.slow) for name in ("ddp", "fsdp2")]],
)
def test_each_row_is_asked_once(recipe, one, tmp_path, strategy, count):
    run = tmp_path / "run"
    found = questions_of(recipe(distributed__strategy=strategy), run, count)
    check_asked_once(found, count)
    for when in ASKED:
        assert answers(run, when) == answers(one, when), when
    results = [json.loads((each / "result.json").read_text("utf-8")) for each in (run, one)]
    assert results[0]["before"] == results[1]["before"]
    assert results[0]["after"] == results[1]["after"]


@pytest.mark.slow
def test_asking_twice_is_seen(recipe, tmp_path, monkeypatch):
    """The control: where every process takes every question."""
    monkeypatch.setattr(answering, "deal", lambda loads, ranks: [list(range(len(loads)))] * ranks)
    found = questions_of(recipe(), tmp_path / "run", 2)
    with pytest.raises(AssertionError):
        check_asked_once(found, 2)
