"""Predictions made elsewhere: every form of file, and every fault named."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from vlmtune.data.conversation import Box, Conversation, Message, Text
from vlmtune.errors import DataError, RefusedError, UsageError
from vlmtune.evaluation.prediction_files import read_predictions
from vlmtune.evaluation.run import Evaluation, scored

TEXTS = ["cer", "exact_match"]
ANSWERS = {"a": "one", "b": "two", "c": 'three, "quoted"\u2028 and split'}


def row(name: str, *answer: Text | Box, references: tuple[str, ...] = ()) -> Conversation:
    question = Message("user", (Text("What?"),))
    return Conversation(name, (question, Message("assistant", answer)), references=references)


ROWS = [row(name, Text(text)) for name, text in ANSWERS.items()]
KNOWN = {*ANSWERS, "beyond the limit"}
BOX = Box(0, "cat", (1.0, 2.0, 30.0, 40.0))
BOXED = [row("a", BOX), row("b", Text("here "), BOX)]


def write(path: Path, records: list[dict[str, object]]) -> Path:
    if path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as stream:
            table = csv.DictWriter(stream, ["id", "prediction"])
            table.writeheader()
            table.writerows(records)
    elif path.suffix == ".json":
        path.write_text(json.dumps(records), encoding="utf-8")
    else:
        lines = [json.dumps(each, ensure_ascii=False) + "\n" for each in records]
        path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["p.jsonl", "p.json", "p.csv", "p.txt"])
def test_plain_predictions(name, tmp_path):
    records = [{"id": key, "prediction": text.upper()} for key, text in ANSWERS.items()]
    records.append({"id": "beyond the limit", "prediction": "not asked for"})
    found = read_predictions(write(tmp_path / name, records[::-1]), ROWS, KNOWN, TEXTS)
    assert [each.id for each in found] == list(ANSWERS)
    assert [each.prediction for each in found] == [text.upper() for text in ANSWERS.values()]
    assert [each.references for each in found] == [(text,) for text in ANSWERS.values()]
    assert {each.question for each in found} == {"What?"}
    assert {each.finished for each in found} == {None}
    evaluation = scored(found, TEXTS, None)
    assert evaluation.cut_at_limit is None
    evaluation.write(tmp_path / "out")
    assert Evaluation.read(tmp_path / "out") == evaluation


def test_a_table_written_by_a_spreadsheet(tmp_path):
    path = tmp_path / "p.csv"
    path.write_bytes("\ufeffid,prediction,note\r\na,1,x\r\nb,2,y\r\nc,3,z\r\n".encode())
    found = read_predictions(path, ROWS, KNOWN, TEXTS)
    assert [each.prediction for each in found] == ["1", "2", "3"]


def test_our_own_predictions_score_as_they_did(tmp_path):
    records = [{"id": key, "prediction": text[:3]} for key, text in ANSWERS.items()]
    first = read_predictions(write(tmp_path / "p.jsonl", records), ROWS, KNOWN, TEXTS)
    first = [
        type(each)(**{**vars(each), "finished": each.id != "b", "completion_tokens": 7})
        for each in first
    ]
    stored = scored(first, TEXTS, 9)
    assert stored.cut_at_limit == 1
    stored.write(tmp_path / "out")
    again = read_predictions(tmp_path / "out" / "predictions.jsonl", ROWS, KNOWN, TEXTS)
    assert scored(again, TEXTS, 9) == stored


def test_numbers_are_ids_too(tmp_path):
    path = write(tmp_path / "p.jsonl", [{"id": 7, "prediction": "x"}])
    assert read_predictions(path, [row("7", Text("x"))], {"7"}, TEXTS)[0].id == "7"


def test_missing_and_unknown_rows_are_named(tmp_path):
    records = [{"id": f"new-{n:02d}", "prediction": ""} for n in range(12)]
    path = write(tmp_path / "p.jsonl", [{"id": "b", "prediction": "two"}, *records])
    with pytest.raises(RefusedError) as caught:
        read_predictions(path, ROWS, KNOWN, TEXTS)
    message = str(caught.value)
    assert "has no prediction for a, c;" in message
    assert "rows that the data does not have: new-00, new-01" in message
    assert "new-09 and 2 more" in message
    assert "new-10" not in message


def test_a_row_said_twice_is_refused(tmp_path):
    records = [{"id": key, "prediction": "x"} for key in ("a", "b", "c", "a")]
    with pytest.raises(RefusedError, match=r"more than one prediction for a$"):
        read_predictions(write(tmp_path / "p.jsonl", records), ROWS, KNOWN, TEXTS)


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("p.jsonl", '{"id": "a", "prediction": "x"}\n{"id": "b"', "p.jsonl:2: found no JSON"),
        ("p.jsonl", '["a", "x"]\n', "p.jsonl:1: found list"),
        ("p.jsonl", '{"id": "a", "answer": "x"}\n', "found the keys id, answer"),
        ("p.jsonl", '{"id": "a", "prediction": null}\n', "found the keys id, prediction"),
        ("p.json", "{", "p.json: found no JSON"),
        ("p.csv", "key,prediction\na,x\n", "p.csv:2: found the keys key, prediction"),
        ("p.csv", b"id,prediction\na,\xff\n", "found no UTF-8 text"),
    ],
)
def test_what_is_no_prediction_is_named_by_its_line(name, text, found, tmp_path):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError) as caught:
        read_predictions(path, ROWS, KNOWN, TEXTS)
    assert caught.value.code == "bad_prediction"
    assert found in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UsageError, match=r"--predictions: there is no file .*nowhere\.jsonl"):
        read_predictions(tmp_path / "nowhere.jsonl", ROWS, KNOWN, TEXTS)


# Boxes


def test_boxes_are_pixels(tmp_path):
    said = {"label": "cat", "xyxy": [1, 2, 30, 40]}
    records = [{"id": "a", "prediction": "…", "boxes": [said]}, {"id": "b", "prediction": "…"}]
    found = read_predictions(write(tmp_path / "p.jsonl", records), BOXED, {"a", "b"}, ["box_iou"])
    assert [each.boxes for each in found] == [(BOX,), ()]
    assert [each.truth for each in found] == [(BOX,), (BOX,)]
    assert scored(found, ["box_iou"], None).metrics["box_iou"].value == 0.5


def test_boxes_that_are_needed_and_not_there(tmp_path):
    records = [{"id": name, "prediction": "…"} for name in ("a", "b")]
    path = write(tmp_path / "p.jsonl", records)
    with pytest.raises(UsageError, match="holds no boxes, which box_iou compares"):
        read_predictions(path, BOXED, {"a", "b"}, ["box_iou"])
    with pytest.raises(UsageError, match="row a holds boxes"):
        read_predictions(path, BOXED, {"a", "b"}, ["cer"])
    bad = write(tmp_path / "q.jsonl", [{**each, "boxes": [{"xyxy": [1, 2]}]} for each in records])
    with pytest.raises(DataError, match="found the box"):
        read_predictions(bad, BOXED, {"a", "b"}, ["box_iou"])


def test_the_text_of_boxes_is_what_our_own_file_says(tmp_path):
    records = [
        {"id": name, "prediction": "cat(1,2)", "references": ["cat(1,2)"]} for name in ("a", "b")
    ]
    found = read_predictions(write(tmp_path / "p.jsonl", records), BOXED, {"a", "b"}, ["cer"])
    assert [each.references for each in found] == [("cat(1,2)",)] * 2
    # Negative control: of answers that are texts, the data set's word stands.
    listed = [{**each, "id": key} for key in ANSWERS for each in records[:1]]
    found = read_predictions(write(tmp_path / "q.jsonl", listed), ROWS, KNOWN, ["cer"])
    assert [each.references for each in found] == [(text,) for text in ANSWERS.values()]
