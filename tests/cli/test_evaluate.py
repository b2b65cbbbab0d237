"""``vlmtune eval`` of several models and of predictions made elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tiny_world import lines
from vlmtune.verbs.evaluate import evaluate

SHORT = ("--limit", 4, "--max-new-tokens", 4, "--metrics", "edit_similarity,cer")


@pytest.fixture(scope="module")
def evaluated(lora_run: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory):
    """One model's predictions."""
    out = tmp_path_factory.mktemp("evaluated") / "run"
    return evaluate(
        lora_run, tiny_data, metrics=["edit_similarity", "cer"], limit=4, max_new_tokens=4, out=out
    )


def test_models_side_by_side(command, lora_run, tiny_base, tiny_data, evaluated, tmp_path):
    out = tmp_path / "out"
    both = ("eval", lora_run, tiny_base, "--data", tiny_data, *SHORT, "--out", out)
    done = command(*both, "--max-pixels", 6272, "--json")
    assert done.status == 0, done.err
    result = done.json
    # The keys of a single model stay, and are the first's.
    assert result["metrics"] == evaluated["metrics"]
    assert result["samples"] == evaluated["samples"] == 4
    first, second = result["models"]
    assert [first["model"], second["model"]] == [str(lora_run), str(tiny_base)]
    assert first["metrics"] == result["metrics"]
    assert "differences" not in first
    assert second["differences"].keys() == {"edit_similarity", "cer"}
    for name, change in second["differences"].items():
        assert change.keys() == {"value", "low", "high", "probability", "changed", "verdict"}
        gained = second["metrics"][name]["value"] - first["metrics"][name]["value"]
        assert change["value"] == pytest.approx(gained)
    for each in (first, second):
        assert Path(each["report"]).is_file()
        assert len(lines(Path(each["predictions"]))) == 4
    assert {Path(each["report"]).parent.parent for each in (first, second)} == {out}

    people = command(*both[:-1], tmp_path / "people")
    table = people.out.splitlines()
    assert table[0] == f"A: {lora_run}"
    assert table[1] == f"B: {tiny_base}"
    place = next(n for n, line in enumerate(table) if line.startswith("cer"))
    assert f"{first['metrics']['cer']['value']:.3f}" in table[place]
    assert "no claim" in table[place]
    assert table[place + 1].split()[:2] == ["(lower)", f"[{first['metrics']['cer']['low']:.3f},"]
    assert "p better 0." in table[place + 2]
    assert max(map(len, table[2 : place + 3])) <= 80
    assert "differences are paired" in people.out


def test_predictions_are_scored_without_a_model(command, tiny_data, evaluated, tmp_path):
    file = evaluated["predictions"]
    done = command(
        "eval", "--predictions", file, "--data", tiny_data, *SHORT, "--out", tmp_path / "again",
        "--json",
    )  # fmt: skip
    assert done.status == 0, done.err
    assert done.json["metrics"] == evaluated["metrics"]
    assert lines(tmp_path / "again/predictions.jsonl") == lines(Path(file))
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == [
        "metrics.json", "predictions.jsonl", "report.html",
    ]  # fmt: skip


def test_a_model_beside_another_engine_s_predictions(
    command, lora_run, tiny_data, evaluated, tmp_path
):
    truth = {each["id"]: each["references"][0] for each in lines(Path(evaluated["predictions"]))}
    table = tmp_path / "engine.csv"
    said = [f'{name},"{text}"' for name, text in truth.items()]
    table.write_text("\n".join(["id,prediction", *said]) + "\n", encoding="utf-8")
    done = command(
        "eval", lora_run, "--data", tiny_data, *SHORT, "--predictions", table,
        "--out", tmp_path / "out", "--json",
    )  # fmt: skip
    assert done.status == 0, done.err
    ours, theirs = done.json["models"]
    assert ours["metrics"] == evaluated["metrics"]
    assert theirs["metrics"]["edit_similarity"]["value"] == 1.0
    assert theirs["metrics"]["cer"]["value"] == 0.0
    assert theirs["differences"]["cer"]["value"] == -ours["metrics"]["cer"]["value"]
    assert theirs["cut_at_limit"] is None


def test_answers_that_were_cut_are_counted(command, lora_run, tiny_data, tmp_path):
    out = tmp_path / "out"
    short = ("--limit", 3, "--max-new-tokens", 1, "--metrics", "cer", "--out", out)
    done = command("eval", lora_run, "--data", tiny_data, *short)
    assert "3 of 3 answers were cut at 1 tokens" in done.out
    summary = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    assert (summary["cut_at_limit"], summary["max_new_tokens"]) == (3, 1)


@pytest.fixture(scope="module")
def engine(evaluated, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another engine's predictions: the truth without blanks, and more and more of it missing."""
    file = tmp_path_factory.mktemp("engine") / "said.jsonl"
    rows = lines(Path(evaluated["predictions"]))
    said = [
        {"id": each["id"], "prediction": each["references"][0].replace(" ", "")[: 40 - 9 * n]}
        for n, each in enumerate(rows)
    ]
    file.write_text("".join(json.dumps(each) + "\n" for each in said), encoding="utf-8")
    return file


def test_one_spelling_on_request(command, tiny_data, engine, tmp_path):
    options = ("--predictions", engine, "--data", tiny_data, *SHORT)
    raw = command("eval", *options, "--out", tmp_path / "raw", "--json").json
    one = command(
        "eval", *options, "--normalise", "latex", "--out", tmp_path / "one", "--json"
    ).json
    assert (raw["normalise"], one["normalise"]) == ("none", "latex")
    name = "edit_similarity"
    assert one["metrics"][name]["value"] > raw["metrics"][name]["value"] + 0.05
    wrong = command("eval", *options, "--normalise", "tex", "--out", tmp_path / "x")
    assert wrong.status == 2
    assert wrong.message == "--normalise: found 'tex', expected none or latex"


def test_the_seed_is_the_intervals(command, tiny_data, engine, tmp_path):
    options = ("--predictions", engine, "--data", tiny_data, *SHORT)
    first, second, third = (
        command("eval", *options, "--seed", seed, "--out", tmp_path / f"{n}", "--json").json[
            "metrics"
        ]["edit_similarity"]
        for n, seed in enumerate((0, 1, 1))
    )
    assert second == third
    assert first["value"] == second["value"]
    assert first != second


def test_nothing_to_evaluate(command, tiny_data):
    done = command("eval", "--data", tiny_data)
    assert done.status == 2
    assert "name a model, a run or an adapter, or give --predictions FILE" in done.message


def test_rows_that_do_not_meet_are_refused_before_a_model_is_loaded(command, tiny_data, tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('{"id": "nobody", "prediction": "x"}\n', encoding="utf-8")
    done = command("eval", tmp_path, "--predictions", file, "--data", tiny_data, *SHORT)
    assert done.status == 4
    assert "rows that the data does not have: nobody" in done.message
