from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

import vlmtune
from vlmtune.data.conversation import Image, Text
from vlmtune.data.dataset import PreparedDataset
from vlmtune.data.prepare import PrepareOptions, PrepareRefusedError, prepare
from vlmtune.data.quarantine import HINTS, read_quarantine
from vlmtune.errors import FormatError, RefusedError, UsageError

MakeTable = Callable[..., Path]


def options(**values: object) -> PrepareOptions:
    return PrepareOptions(**values)


def rows_of(out: Path, split: str = "train") -> list:
    return list(PreparedDataset.open(out).split(split))


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_table_becomes_a_dataset(make_table: MakeTable, tmp_path: Path) -> None:
    seen = []
    result = prepare(
        make_table(10),
        tmp_path / "out",
        options(validation=2, prompt="Read."),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert result.to_json() == {
        "path": str(tmp_path / "out"),
        "rows": {"in": 10, "kept": 10, "quarantined": 0},
        "splits": {"train": 8, "validation": 2},
        "fingerprint": PreparedDataset.open(tmp_path / "out").fingerprint,
        "quarantine": {},
        "format": {
            "name": "table",
            "reason": "the rows are cells of named columns, not lists of turns",
            "notes": [],
        },
        "notes": [],
    }
    row = rows_of(tmp_path / "out")[3]
    assert row.id == "row-000004"
    assert row.messages[0].content == (Image(0), Text("Read."))
    assert row.answer == "text 3"
    assert row.references == ("text 3",)
    assert row.images[0].data == (tmp_path / "source/images/3.png").read_bytes()
    assert row.meta["source"] == "table.csv:5"
    assert rows_of(tmp_path / "out", "validation")[0].answer == "text 8"
    assert seen[-1] == (10, None)


def test_without_a_prompt_the_question_is_the_image(make_table: MakeTable, tmp_path: Path) -> None:
    prepare(make_table(1), tmp_path / "out")
    assert rows_of(tmp_path / "out")[0].messages[0].content == (Image(0),)


def test_twice_the_same_bytes_and_not_made_again(make_table: MakeTable, tmp_path: Path) -> None:
    table = make_table(70, {5: ["images/none.png", "x"]})
    chosen = options(validation=0.1, split_by="random", max_bad=5)
    first = prepare(table, tmp_path / "a", chosen)
    prepare(table, tmp_path / "b", chosen)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*")}
    again = prepare(table, tmp_path / "a", chosen)
    assert again.already_made
    assert again.to_json() == first.to_json()
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*")}


def test_another_dataset_is_not_overwritten(make_table: MakeTable, tmp_path: Path) -> None:
    table = make_table(5)
    prepare(table, tmp_path / "out")
    before = tree(tmp_path / "out")
    with pytest.raises(RefusedError, match="another prompt"):
        prepare(table, tmp_path / "out", options(prompt="x"))
    (tmp_path / "source/images/2.png").write_bytes((tmp_path / "source/images/1.png").read_bytes())
    with pytest.raises(RefusedError, match="other rows"):
        prepare(table, tmp_path / "out")
    assert tree(tmp_path / "out") == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("x")
    with pytest.raises(RefusedError, match="not empty"):
        prepare(table, tmp_path / "full")


def test_every_bad_row_is_accounted_for(make_table: MakeTable, tmp_path: Path) -> None:
    table = make_table(60)
    folder = table.parent
    good = (folder / "images/0.png").read_bytes()
    (folder / "images/empty.png").write_bytes(b"")
    (folder / "images/html.jpg").write_bytes(b"<html>404</html>")
    (folder / "images/cut.png").write_bytes(good[: len(good) // 2])
    os.mkfifo(folder / "images/pipe.png")
    (tmp_path / "secret.png").write_bytes(good)
    (folder / "images/link.png").symlink_to(tmp_path / "secret.png")
    (folder / "images/zero.png").symlink_to("/dev/zero")
    (tmp_path / "source_evil").mkdir()
    (tmp_path / "source_evil/x.png").write_bytes(good)
    planted = {
        3: (["images/none.png", "x"], "image_missing"),
        6: (["images/empty.png", "x"], "image_empty"),
        9: (["images/html.jpg", "x"], "image_not_an_image"),
        12: (["images/cut.png", "x"], "image_truncated"),
        15: (["images/pipe.png", "x"], "not_a_file"),
        18: (["images/link.png", "x"], "path_outside"),
        21: (["images/zero.png", "x"], "path_outside"),
        24: (["../secret.png", "x"], "path_outside"),
        27: ([str(tmp_path / "source_evil/x.png"), "x"], "path_outside"),
        30: (["https://example.org/a.png", "x"], "url_not_allowed"),
        33: (["images/33.png", "  "], "empty_answer"),
        36: (["images/36.png"], "bad_row"),
        39: (["images/39.png", "a", "b"], "bad_row"),
        42: (["", "x"], "missing_field"),
        45: (["images", "x"], "not_a_file"),
        48: (["images/a\0b.png", "x"], "image_missing"),
        51: (["images/%s.png" % ("n" * 5000), "x"], "image_missing"),
    }
    table = make_table(60, {number: row for number, (row, _) in planted.items()})
    result = prepare(table, tmp_path / "out", options(max_bad=20))
    assert result.to_json()["rows"] == {"in": 60, "kept": 43, "quarantined": 17}
    entries = read_quarantine(tmp_path / "out/quarantine.jsonl")
    assert {int(entry["id"][4:]) - 1: entry["code"] for entry in entries} == {
        number: code for number, (_, code) in planted.items()
    }
    assert {entry["source"] for entry in entries} == {f"table.csv:{n + 2}" for n in planted}
    assert all(entry["message"] and entry["hint"] == HINTS[entry["code"]] for entry in entries)
    assert sum(result.quarantine.values()) == 17
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["in"] == summary["kept"] + summary["quarantined"] == 60
    assert summary["quarantine"] == result.quarantine
    kept = [row.answer for row in rows_of(tmp_path / "out")]
    assert kept == [f"text {number}" for number in range(60) if number not in planted]
    cut = next(entry for entry in entries if entry["code"] == "image_truncated")
    assert cut["image"]["bytes"] == len(good) // 2
    assert cut["row"] == {"image_path": "images/cut.png", "text": "x"}
    assert cut["field"] == "image_path"


def test_images_root_allows_what_lies_outside(make_table: MakeTable, tmp_path: Path) -> None:
    make_table(3)
    table = tmp_path / "elsewhere" / "table.csv"
    table.parent.mkdir()
    absolute = tmp_path / "source/images/2.png"
    table.write_text(f"image,text\nimages/0.png,a\n{absolute},b\n")
    with pytest.raises(PrepareRefusedError) as caught:
        prepare(table, tmp_path / "no")
    assert caught.value.result.quarantine == {"image_missing": 1, "path_outside": 1}
    entries = read_quarantine(tmp_path / "no/quarantine.jsonl")
    assert "--images-root" in entries[1]["message"]
    prepare(table, tmp_path / "yes", options(images_root=str(tmp_path / "source")))
    assert [row.answer for row in rows_of(tmp_path / "yes")] == ["a", "b"]


def test_too_many_bad_rows_leave_only_the_ledger(make_table: MakeTable, tmp_path: Path) -> None:
    table = make_table(99, {3: ["images/none.png", "x"]})
    with pytest.raises(PrepareRefusedError, match="1 of 99 rows are bad") as caught:
        prepare(table, tmp_path / "out")
    assert caught.value.exit_status == 4
    assert caught.value.result.to_json()["rows"] == {"in": 99, "kept": 98, "quarantined": 1}
    assert set(tree(tmp_path / "out")) == {"quarantine.jsonl", "summary.json"}
    with pytest.raises(UsageError):
        PreparedDataset.open(tmp_path / "out")
    # The same with one more good row is within 1 %, and takes the refusal's place.
    prepare(make_table(100, {3: ["images/none.png", "x"]}), tmp_path / "out")
    assert len(rows_of(tmp_path / "out")) == 99
    with pytest.raises(PrepareRefusedError):
        prepare(
            make_table(2, {0: ["x.png", "x"], 1: ["y", "y"]}), tmp_path / "n", options(max_bad=9)
        )


def test_of_duplicate_ids_the_later_goes(make_table: MakeTable, tmp_path: Path) -> None:
    table = make_table(
        4,
        {
            0: ["a", "images/none.png", "bad"],
            1: ["a", "images/1.png", "first"],
            2: ["b", "images/2.png", "other"],
            3: ["a", "images/3.png", "later"],
        },
        header=("id", "image", "text"),
    )
    result = prepare(table, tmp_path / "out", options(max_bad=3))
    assert result.quarantine == {"duplicate_id": 1, "image_missing": 1}
    assert [(row.id, row.answer) for row in rows_of(tmp_path / "out")] == [
        ("a", "first"),
        ("b", "other"),
    ]


def test_splits(make_table: MakeTable, tmp_path: Path) -> None:
    table = make_table(20)

    def validation(name: str, **values: object) -> list[str]:
        prepare(table, tmp_path / name, options(**values))
        return [row.id for row in rows_of(tmp_path / name, "validation")]

    assert validation("none") == []
    assert validation("last", validation=0.1) == ["row-000019", "row-000020"]
    one = validation("one", validation=5, split_by="random")
    other = validation("other", validation=5, split_by="random", seed=1)
    assert len(one) == len(other) == 5
    assert one != other
    assert one != [f"row-{number:06d}" for number in range(16, 21)]
    with pytest.raises(UsageError, match="none to train on"):
        validation("all", validation=20)
    assert not (tmp_path / "all").exists()
    with pytest.raises(ValidationError, match="no meaning"):
        options(validation=3, split_by="column:part")
    with pytest.raises(ValidationError, match="no way to split"):
        options(split_by="first")


def test_a_column_names_the_split(make_table: MakeTable, tmp_path: Path) -> None:
    header = ("image", "text", "part")
    parts = ["train", "val", "Test", "train", "holdout"]
    table = make_table(
        5, {n: [f"images/{n}.png", f"t{n}", part] for n, part in enumerate(parts)}, header
    )
    result = prepare(table, tmp_path / "out", options(split_by="column:part", max_bad=1))
    assert result.quarantine == {"bad_split": 1}
    assert [row.answer for row in rows_of(tmp_path / "out", "validation")] == ["t1", "t2"]
    with pytest.raises(FormatError, match="did you mean 'part'"):
        prepare(table, tmp_path / "no", options(split_by="column:prt"))


def test_limit_counts_rows_that_came_in(make_table: MakeTable, tmp_path: Path) -> None:
    table = make_table(9, {1: ["images/none.png", "x"]})
    result = prepare(table, tmp_path / "out", options(limit=4, max_bad=1))
    assert result.to_json()["rows"] == {"in": 4, "kept": 3, "quarantined": 1}


def test_several_answers_are_all_references(make_table: MakeTable, tmp_path: Path) -> None:
    table = make_table(30, {n: [f"images/{n}.png", "one&& two &&three&&"] for n in range(30)})
    prepare(table, tmp_path / "out", options(answer_separator="&&"))
    rows = rows_of(tmp_path / "out")
    assert all(row.references == ("one", "two", "three") for row in rows)
    assert {row.answer for row in rows} == {"one", "two", "three"}
    prepare(table, tmp_path / "seed", options(answer_separator="&&", seed=1))
    assert [row.answer for row in rows] != [row.answer for row in rows_of(tmp_path / "seed")]
    # A row's draw does not depend on the others.
    prepare(table, tmp_path / "few", options(answer_separator="&&", limit=7))
    assert [row.answer for row in rows[:7]] == [row.answer for row in rows_of(tmp_path / "few")]
    prepare(table, tmp_path / "plain")
    assert rows_of(tmp_path / "plain")[0].answer == "one&& two &&three&&"


def test_document_questions_from_parquet(make_table: MakeTable, tmp_path: Path) -> None:
    folder = make_table(2).parent
    images = [(folder / f"images/{n}.png").read_bytes() for n in range(2)]
    table = pa.table(
        {
            "id": ["a", "b"],
            "image": [{"bytes": images[0], "path": None}, {"bytes": images[1], "path": "1.png"}],
            "query": [{"de": "Was?", "en": "What?"}, {"de": None, "en": "Who?"}],
            "answers": [["x", "y"], ["z"]],
            "answer": [{"text": "x", "start": 1}, {"text": "z", "start": 2}],
        }
    )
    pq.write_table(table, tmp_path / "d.parquet")
    seen = []
    prepare(
        tmp_path / "d.parquet",
        tmp_path / "out",
        options(prompt="unused"),
        progress=lambda done, total: seen.append((done, total)),
    )
    rows = rows_of(tmp_path / "out")
    assert [row.question for row in rows] == ["What?", "Who?"]
    assert rows[0].references == ("x", "y")
    assert rows[0].answer in rows[0].references
    assert [row.images[0].data for row in rows] == images
    assert seen == [(1, 2), (2, 2)]


def test_a_hub_dataset(
    make_table: MakeTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = (make_table(1).parent / "images/0.png").read_bytes()
    asked = {}

    def load(name: str, **values: object) -> tuple[object, str]:
        asked.update(values, name=name)
        return iter([{"image": {"bytes": image, "path": "x.png"}, "text": "t"}]), "abc123"

    fake = SimpleNamespace(load_dataset_records=load)
    monkeypatch.setitem(sys.modules, "vlmtune.hub", fake)
    monkeypatch.setattr(vlmtune, "hub", fake, raising=False)
    prepare("owner/name", tmp_path / "out", options(split="test", hub="modelscope"))
    assert (asked["name"], asked["split"], asked["hub"]) == ("owner/name", "test", "modelscope")
    assert PreparedDataset.open(tmp_path / "out").info.source == "owner/name@abc123"
    # A path that a hub's row names is never followed.
    (tmp_path / "a.png").write_bytes(image)
    monkeypatch.setattr(
        fake,
        "load_dataset_records",
        lambda *_, **__: (iter([{"image": str(tmp_path / "a.png"), "text": "t"}]), "abc"),
    )
    with pytest.raises(PrepareRefusedError, match="path_outside 1"):
        prepare("owner/name", tmp_path / "no")


KILLED = """
import os, signal, sys
from vlmtune.data.prepare import prepare
def progress(done, total):
    if done == 50:
        os.kill(os.getpid(), signal.SIGKILL)
prepare(sys.argv[1], sys.argv[2], progress=progress)
"""


def test_a_killed_prepare_leaves_nothing_that_loads(make_table: MakeTable, tmp_path: Path) -> None:
    table, out = make_table(70), tmp_path / "made" / "out"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(table), str(out)], check=False)
    assert killed.returncode == -9
    assert [path.name for path in out.parent.iterdir()] == [".out.partial"]
    with pytest.raises(UsageError):
        PreparedDataset.open(out)
    assert prepare(table, out).rows.kept == 70
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_an_interrupted_prepare_cleans_up(make_table: MakeTable, tmp_path: Path) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(make_table(3), tmp_path / "made" / "out", progress=stop)
    assert list((tmp_path / "made").iterdir()) == []
