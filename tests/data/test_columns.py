"""Columns made of Python values are those that pyarrow makes, without pandas."""

from __future__ import annotations

import subprocess
import sys

import pyarrow as pa
import pytest

from vlmtune.data.columns import array_of, batch_of
from vlmtune.data.rows import SCHEMA

PARTS = [
    {"type": "text", "text": "é\n"},
    {"type": "box", "index": 1, "label": "x", "box": [1.5, 2.0, 3.0, 4.0]},
    {"type": "image", "index": 0},
]
ROWS = [
    {
        "id": "a",
        "messages": [{"role": "user", "content": PARTS}, {"role": "assistant", "content": []}],
        "images": [{"bytes": b"\0\xff", "path": None}, {"bytes": None, "path": "p"}],
        "references": ["", "b", None],
        "meta": "{}",
    },
    {"id": None, "messages": None, "images": [], "references": [], "meta": None},
    {"id": "c", "messages": [None], "images": [None], "references": ["漢"]},
]


@pytest.mark.parametrize("rows", [[], ROWS, ROWS * 7])
def test_they_are_those_of_pyarrow(rows):
    found = batch_of(rows, SCHEMA)
    found.validate(full=True)
    assert found.equals(pa.RecordBatch.from_pylist(rows, schema=SCHEMA))
    assert found.schema.metadata == SCHEMA.metadata
    if rows:  # negative control
        other = [{**rows[0], "id": "other"}, *rows[1:]]
        assert not found.equals(pa.RecordBatch.from_pylist(other, schema=SCHEMA))


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([True, None, False] * 5, pa.bool_()),
        ([1, None, -3], pa.int32()),
        ([None, None], pa.string()),
        ([[1.0], None, []], pa.list_(pa.float64())),
    ],
)
def test_nulls_are_nulls(values, kind):
    found = array_of(values, kind)
    found.validate(full=True)
    assert found.equals(pa.array(values, kind))
    assert found.null_count == values.count(None)


def test_pandas_is_not_imported():
    pytest.importorskip("pandas")
    code = "import sys, pyarrow as pa; from vlmtune.data.columns import array_of; {}; " + (
        "print('pandas' in sys.modules)"
    )

    def imported(made):
        command = [sys.executable, "-c", code.format(made)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    assert imported("array_of([True], pa.bool_())") == "False"
    assert imported("pa.array([True])") == "True"  # negative control
