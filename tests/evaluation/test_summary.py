import csv
import json
import shlex
import shutil

import pytest

from report_samples import Page
from tiny_world import lines
from vlmtune.data.dataset import PreparedDataset
from vlmtune.evaluation.intervals import score, score_differences
from vlmtune.evaluation.metrics import row_scores
from vlmtune.evaluation.run import Evaluation, Prediction
from vlmtune.files import append_lines, write_json, write_text
from vlmtune.runs.folder import RunFolder
from vlmtune.training.summary import account, report_content, totals, write_summary

METRICS = ("exact_match", "cer")
TRUTHS = [f"formula {n}" for n in range(8)]


def evaluated(ids, texts) -> Evaluation:
    """An evaluation as a model that says these texts leaves it."""
    truths = [[TRUTHS[ids.index(row)]] for row in ids]
    alone = row_scores(METRICS, texts, truths)
    predictions = tuple(
        Prediction(row, "Read.", text, tuple(truth), True, 9, 3, {m: alone[m][n] for m in METRICS})
        for n, (row, text, truth) in enumerate(zip(ids, texts, truths, strict=True))
    )
    return Evaluation(score(METRICS, texts, truths), predictions, 12)


@pytest.fixture
def finished(tmp_path, tiny_data):
    """The folder of a run that was never trained: only what a summary reads."""
    dataset = PreparedDataset.open(tiny_data)
    folder = RunFolder(tmp_path / "my runs" / "one")
    folder.path.mkdir(parents=True)
    recipe = (
        "name: one\nmodel: {base: models/base}\ntuning: {method: lora}\n"
        f"evaluation: {{metrics: [{', '.join(METRICS)}]}}\n"
    )
    write_text(folder.recipe, recipe)
    write_json(folder.environment, {"python": "3.11"})
    write_json(folder.contract, {"base": {"id": "/home/models/base"}})
    facts = {"path": str(tiny_data), "fingerprint": dataset.fingerprint}
    facts |= {"splits": {"train": 24, "validation": 8}, "quarantined": {}}
    write_json(folder.data, facts)
    ids = dataset.split("validation").ids
    evaluated(ids, ["nothing"] * 8).write(folder.evaluation("before"))
    evaluated(ids, TRUTHS).write(folder.evaluation("after"))
    figures = {"samples": 5, "tokens": 500, "labels": 100, "seconds": 2.0, "loss": 1.0}
    append_lines(folder.metrics, [{"step": step, **figures} for step in (1, 2)])
    return folder


def changed_facts(folder: RunFolder, **changes) -> None:
    write_json(folder.data, {**json.loads(folder.data.read_text(encoding="utf-8")), **changes})


# The account of rows


def accounted(folder: RunFolder) -> bool:
    found = dict(account(folder))
    came = found.pop("in")
    parts = [part.values() if isinstance(part, dict) else [part] for part in found.values()]
    counts = [count for part in parts for count in part]
    return came == sum(counts) and min(counts) >= 0


def test_a_run_with_rows_that_are_bad_and_too_long_adds_up(formula_table, make_recipe, tmp_path):
    from vlmtune.data.prepare import PrepareOptions, prepare
    from vlmtune.verbs.train import train

    source = tmp_path / "source"
    shutil.copytree(formula_table.parent, source)
    table = source / formula_table.name
    with table.open(encoding="utf-8", newline="") as stream:
        _, *records = csv.reader(stream)
    image = next(n for n, cell in enumerate(records[0]) if (source / cell).is_file())
    (source / records[3][image]).write_bytes(b"no picture")
    (source / records[5][image]).unlink()
    prepare(table, tmp_path / "data", PrepareOptions(validation=4, max_bad=0.5))
    recipe = make_recipe(
        data__path=str(tmp_path / "data"), data__max_length=85, training__max_steps=2
    )
    train(recipe, run_dir=tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    found = account(folder)
    assert found["in"] == len(records) == 32
    assert sum(found["quarantined"].values()) == 2
    assert 0 < found["dropped"]["too_long"] < 26
    assert found["validation"] == 4
    trained = {row for r in lines(folder.ledger) if r["event"] == "trained" for row in r["ids"]}
    assert found["trained"] == len(trained) > 0
    assert accounted(folder)
    page = Page(folder.report.read_text(encoding="utf-8"))
    assert "32 = " in page.text
    assert page.of("p", **{"class": "holds"})


def ledger(folder: RunFolder, *records: dict) -> None:
    append_lines(folder.ledger, records)


def test_a_row_is_counted_once_whatever_happened_to_it(finished):
    changed_facts(finished, quarantined={"image_truncated": 3})
    ledger(
        finished,
        {"step": 0, "event": "dropped", "id": "a", "code": "too_long", "message": ""},
        {"step": 0, "event": "dropped", "id": "b", "code": "too_long", "message": ""},
        {"step": 0, "event": "dropped", "id": "c", "code": "no_labels", "message": ""},
        {"step": 1, "event": "trained", "ids": ["b", "d", "e"]},  # b: before a changed plan
        {"step": 2, "event": "skipped_step", "ids": ["e", "f", "g"]},
        {"step": 3, "event": "trained", "ids": ["d", "f"]},
        {"step": 3, "event": "resumed", "commit": None},
        {"event": "changed", "changes": []},
    )
    assert account(finished) == {
        "in": 35,
        "trained": 4,
        "skipped": 1,
        "not_reached": 24 - 4 - 1 - 2,
        "validation": 8,
        "dropped": {"too_long": 1, "no_labels": 1},
        "quarantined": {"image_truncated": 3},
    }
    assert accounted(finished)


def test_rows_from_nowhere_do_not_add_up(finished):
    ledger(finished, {"step": 1, "event": "trained", "ids": [str(n) for n in range(30)]})
    assert not accounted(finished)
    write_summary(finished)
    page = Page(finished.report.read_text(encoding="utf-8"))
    assert "6 are too many" in page.text
    assert page.of("p", **{"class": "fails"})


def test_totals_are_sums_of_the_steps(finished):
    found = totals(finished)
    assert found["steps"] == 2
    assert found["samples"] == 10
    assert found["label_tokens"] == 200
    assert found["samples_per_second"] == 10 / 4
    finished.metrics.unlink()
    assert totals(finished)["samples_per_second"] == 0.0  # a run that was just begun
    write_summary(finished)


# The report


def test_the_report_of_a_run(finished, tiny_data):
    content = write_summary(finished)
    assert content.verdict == "better"
    assert content.title == "one"
    assert content.base_model == "/home/models/base"
    assert [shlex.split(line, comments=True) for line in content.reproduce.splitlines()] == [
        [],
        ["vlmtune", "reproduce", str(finished)],
        [],
        ["vlmtune", "train", str(finished.recipe), "--run", f"{finished.path}-again"],
    ]
    ids = PreparedDataset.open(tiny_data).split("validation").ids
    assert [row.id for row in content.rows] == ids
    assert {row.score_before for row in content.rows} == {0.0}
    assert {row.score_after for row in content.rows} == {1.0}
    page = Page(finished.report.read_text(encoding="utf-8"))
    assert len(page.of("img")) == 8
    assert (page.strangers, page.open) == ([], [])
    assert "base_model" not in finished.card.read_text(encoding="utf-8")
    first = finished.report.read_bytes(), finished.card.read_bytes()
    write_summary(finished)
    assert first == (finished.report.read_bytes(), finished.card.read_bytes())


def moved(finished, data):
    changed_facts(finished, path=str(data) + "-elsewhere")


def incomplete(_, data):
    next(data.glob("data/validation*")).unlink()


def other_data(finished, _):
    changed_facts(finished, fingerprint="0" * 64)


@pytest.mark.parametrize("happened", [moved, incomplete, other_data])
def test_a_report_is_written_without_its_data(finished, tiny_data, tmp_path, happened):
    copy = tmp_path / "data"
    shutil.copytree(tiny_data, copy)
    changed_facts(finished, path=str(copy))
    write_summary(finished)
    assert Page(finished.report.read_text(encoding="utf-8")).of("img")  # negative control
    happened(finished, copy)
    write_summary(finished)
    page = Page(finished.report.read_text(encoding="utf-8"))
    assert page.of("img") == []
    assert len(page.of("article")) == 8


def test_differences_pair_rows_by_id(finished, tiny_data):
    ids = PreparedDataset.open(tiny_data).split("validation").ids
    texts = [truth if n % 2 else "nothing" for n, truth in enumerate(TRUTHS)]
    forwards = evaluated(ids, texts)
    forwards.write(finished.evaluation("before"))
    evaluated(ids, texts).write(finished.evaluation("after"))
    assert report_content(finished).differences["exact_match"].changed == 0
    backwards = Evaluation(forwards.metrics, forwards.predictions[::-1], 12)
    backwards.write(finished.evaluation("after"))
    content = report_content(finished)
    assert {name: found.changed for name, found in content.differences.items()} == {
        "exact_match": 0,
        "cer": 0,
    }
    for row in content.rows:
        assert row.before == row.after
    # Negative control: paired by place, rows with a right answer meet others with a wrong one.
    truths = [p.references for p in forwards.predictions]
    by_place = score_differences(["exact_match"], texts, texts[::-1], truths)
    assert by_place["exact_match"].changed == 4


def test_only_rows_that_both_answered_are_compared(finished, tiny_data):
    ids = PreparedDataset.open(tiny_data).split("validation").ids
    evaluated(ids, TRUTHS).write(finished.evaluation("after"))
    few = evaluated(ids[:7], ["nothing"] * 7)
    few.write(finished.evaluation("before"))
    content = report_content(finished)
    assert content.differences["exact_match"].changed == 7
    assert [row.before for row in content.rows] == ["nothing"] * 7 + [None]
    shutil.rmtree(finished.evaluation("before"))
    content = report_content(finished)
    assert (content.differences, content.verdict) == (None, "untested")
    shutil.rmtree(finished.evaluation("after"))
    content = write_summary(finished)
    assert (content.rows, content.metrics) == ([], [])
    assert "The model was not evaluated" in finished.report.read_text(encoding="utf-8")


def test_what_happened_on_the_way_is_said(finished):
    assert report_content(finished).history == []
    ledger(
        finished,
        {"event": "changed", "changes": ["training.epochs: 1 is now 2"]},
        {"event": "resumed", "step": 1200, "commit": None},
        {"event": "stopped_early", "step": 1400, "best_step": 1300, "cer": 0.1},
    )
    assert report_content(finished).history == [
        "went on although something changed: training.epochs: 1 is now 2",
        "stopped and resumed after step 1,200",
        "ended early after step 1,400: nothing was gained any more",
    ]
