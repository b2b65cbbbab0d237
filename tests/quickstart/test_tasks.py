"""The quickstart's tasks: what is written is prepared whole, and says what is drawn."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from vlmtune.data.conversation import Box
from vlmtune.data.prepare import PrepareOptions, prepare
from vlmtune.errors import UsageError
from vlmtune.formulas import split_of
from vlmtune.quickstart.tasks import TASKS, write_task


@pytest.mark.parametrize("name", sorted(TASKS))
def test_a_task_is_prepared_whole(tmp_path, name):
    table = write_task(tmp_path / "raw", name, rows=12, held_out=4)
    result = prepare(table, tmp_path / "data", PrepareOptions(validation=4, workers=1))
    assert (result.rows.kept, result.rows.quarantined) == (16, 0)
    assert result.splits == {"train": 12, "validation": 4}
    with Image.open(tmp_path / "raw" / "images" / "000003.png") as picture:
        assert picture.width % 28 == picture.height % 28 == 0


def test_held_out_formulas_are_of_their_own_split(tmp_path):
    table = write_task(tmp_path, "formulas", rows=10, held_out=5)
    rows = [json.loads(line) for line in table.read_text(encoding="utf-8").splitlines()]
    splits = [split_of(row["messages"][1]["content"]) for row in rows]
    assert splits == ["training"] * 10 + ["held_out"] * 5


def test_a_box_is_where_its_shape_is_drawn(tmp_path):
    import numpy as np

    from vlmtune.data.dataset import PreparedDataset

    table = write_task(tmp_path / "raw", "boxes", rows=6, held_out=1)
    prepare(table, tmp_path / "data", PrepareOptions(validation=1, workers=1))
    for number, row in enumerate(PreparedDataset.open(tmp_path / "data").split("train")):
        (box,) = [part for part in row.messages[-1].content if isinstance(part, Box)]
        assert row.question == f"Where is the {box.label}?"
        with Image.open(tmp_path / "raw" / "images" / f"{number:06d}.png") as picture:
            pixels = np.asarray(picture.convert("L"))
        left, top, right, bottom = map(round, box.xyxy)
        assert pixels[top:bottom, left:right].min() < 230


def test_an_unknown_task_says_which_there_are(tmp_path):
    with pytest.raises(UsageError, match="formulas"):
        write_task(tmp_path, "songs", rows=1, held_out=1)
