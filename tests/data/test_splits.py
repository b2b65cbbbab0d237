"""Validation rows: how many, which, and that no image stands on both sides."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from vlmtune.data.conversation import Conversation
from vlmtune.data.dataset import PreparedDataset
from vlmtune.data.prepare import PrepareOptions, PrepareResult, prepare
from vlmtune.data.quarantine import read_quarantine
from vlmtune.data.splits import ImageGroups, rows_taken
from vlmtune.errors import UsageError

MakeTable = Callable[..., Path]


def made(table: Path, out: Path, **options: object) -> tuple[PrepareResult, set[bytes], set[bytes]]:
    """What was made, and the images of its train and its validation rows."""
    result = prepare(table, out, PrepareOptions(**options))
    dataset = PreparedDataset.open(out)
    train, validation = (
        {image.data for row in dataset.split(name) for image in row.images}
        for name in ("train", "validation")
    )
    return result, train, validation


def test_random_keeps_rows_of_one_image_together(make_table: MakeTable, tmp_path: Path) -> None:
    table = make_table(60, {n: [f"images/{n // 5}.png", f"caption {n}"] for n in range(60)})
    for seed in range(3):
        options = {"validation": 10, "split_by": "random", "seed": seed}
        result, train, validation = made(table, tmp_path / f"{seed}", **options)
        assert result.splits == {"train": 50, "validation": 10}
        assert len(validation) == 2
        assert not train & validation
        assert result.notes == ()
    result, train, validation = made(table, tmp_path / "last", validation=7)
    assert result.splits == {"train": 50, "validation": 10}  # the last 7, and 3 of their image
    assert not train & validation
    assert "3 more than asked for" in result.notes[0]
    assert json.loads((tmp_path / "last/summary.json").read_text())["notes"] == list(result.notes)


def test_a_column_may_divide_an_image_and_that_is_said(
    make_table: MakeTable, tmp_path: Path
) -> None:
    """Negative control of the two above: taken as it stands, an image is on both sides."""
    table = make_table(10, {n: [f"images/{n // 5}.png", f"caption {n}"] for n in range(10)})
    lines = table.read_text(encoding="utf-8").splitlines()
    marks = ["split", *(["train"] * 7), *(["validation"] * 3)]
    marked = [f"{line},{mark}" for line, mark in zip(lines, marks, strict=True)]
    table.write_text("\n".join(marked) + "\n", encoding="utf-8")
    result, train, validation = made(table, tmp_path / "out", split_by="column:split")
    assert result.splits == {"train": 7, "validation": 3}
    assert len(train & validation) == 1
    assert "2 train rows show an image that is in the validation split" in result.notes[0]


def test_last_rows_that_share_with_all(make_table: MakeTable, tmp_path: Path) -> None:
    table = make_table(6, {n: ["images/0.png", f"caption {n}"] for n in range(6)})
    with pytest.raises(UsageError, match="none is left to train on; divide them by a column"):
        made(table, tmp_path / "out", validation=2)


def test_the_last_rows_are_the_last_rows(make_table: MakeTable, tmp_path: Path) -> None:
    result, train, validation = made(make_table(20), tmp_path / "out", validation=4)
    rows = PreparedDataset.open(tmp_path / "out").split("validation")
    assert [row.answer for row in rows] == [f"text {n}" for n in range(16, 20)]
    assert not train & validation
    assert result.notes == ()


def test_groups_that_do_not_fit(make_table: MakeTable, tmp_path: Path) -> None:
    table = make_table(30, {n: [f"images/{n // 10}.png", f"t{n}"] for n in range(30)})
    result, train, validation = made(table, tmp_path / "a", validation=14, split_by="random")
    assert result.splits == {"train": 20, "validation": 10}
    assert not train & validation
    assert "10 validation rows" in result.notes[0]
    with pytest.raises(UsageError, match=r"the fewest that do are 10; take more, or --split-by l"):
        made(table, tmp_path / "b", validation=9, split_by="random")


def test_groups_through_others() -> None:
    groups = ImageGroups()
    for images in ([b"a", b"b"], [b"c"], [b"b", b"d"], [], [b"d", b"c"], [b"e"], [b"e"]):
        groups.add(images)
    assert [groups.of(row) for row in range(7)] == [0, 0, 0, 3, 0, 5, 5]
    assert groups.astride({4, 3}) == 3
    assert groups.astride(set()) == 0


def test_a_row_added_moves_few_others() -> None:
    def taken(count: int) -> set[int]:
        groups = ImageGroups()
        for row in range(count):
            groups.add([b"%d" % row])
        return rows_taken(0.1, "random", 0, [f"id-{row}" for row in range(count)], groups)

    assert len(taken(200)) == 20
    assert len(taken(200) - taken(201)) <= 1


# Ids that name a picture


def llava(path: Path, rows: list[tuple[str, str, str]]) -> Path:
    turns = [
        {
            "id": identity,
            "image": f"images/{image}.png",
            "conversations": [
                {"from": "human", "value": f"<image>\n{question}"},
                {"from": "gpt", "value": "yes"},
            ],
        }
        for identity, image, question in rows
    ]
    path.write_text(json.dumps(turns))
    return path


def rows_of(out: Path) -> list[Conversation]:
    return list(PreparedDataset.open(out).split("train"))


def test_ids_of_llava_that_repeat(make_table: MakeTable, tmp_path: Path) -> None:
    folder = make_table(4).parent
    rows = [("0", "0", "a?"), ("0", "0", "b?"), ("1", "1", "c?"), ("0", "0", "c?")]
    rows += [("0", "0", "b?"), ("0#2", "2", "d?")]
    source = llava(folder / "llava.json", rows)
    result = prepare(source, tmp_path / "out", PrepareOptions(max_bad=5))
    assert result.detection.name == "llava"
    assert [row.id for row in rows_of(tmp_path / "out")] == ["0", "0#2", "1", "0#3", "0#2#2"]
    assert [row.question for row in rows_of(tmp_path / "out")] == ["a?", "b?", "c?", "c?", "d?"]
    assert result.quarantine == {"duplicate_id": 1}  # the very same row again
    (entry,) = read_quarantine(tmp_path / "out/quarantine.jsonl")
    assert entry["source"] == "llava.json[4]"
    assert result.notes[0].startswith("3 rows have an id that an earlier, different row has")
    # The digests are of what was written: reading the rows gives the same fingerprint.
    from vlmtune.data.writer import DatasetWriter

    with DatasetWriter(tmp_path / "again") as writer:
        for row in rows_of(tmp_path / "out"):
            writer.add(row)
        assert writer.finish(set(), "again", {}).fingerprint == result.fingerprint
