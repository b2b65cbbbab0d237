from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from format_samples import ANSWER, SAMPLES, TEXT_ONLY, read
from vlmtune.data.formats import FORMATS, detect
from vlmtune.data.formats.shape import shape_of
from vlmtune.errors import DataError, FormatError, UsageError

NAMED = [(name, rows) for name, _, rows in SAMPLES]
IDS = [f"{name}: {what}" for name, what, _ in SAMPLES]


@pytest.mark.parametrize(("name", "rows"), NAMED, ids=IDS)
def test_each_sample_is_of_one_format(name: str, rows: list[dict[str, Any]]) -> None:
    shape = shape_of(rows)
    assert [format_ for format_, (says, _) in FORMATS.items() if says(shape)] == [name]
    found = detect(rows)
    assert found.name == name
    assert found.reason
    assert str(found) == f"taken for {name}: {found.reason}"
    before = copy.deepcopy(rows)
    assert len(read(rows)) == len(rows)
    assert rows == before


def test_every_format_has_a_sample() -> None:
    assert {name for name, _, _ in SAMPLES} == set(FORMATS)


@pytest.mark.parametrize("rows", [rows for _, rows in NAMED], ids=IDS)
def test_any_format_may_be_asked_for_any_rows(rows: list[dict[str, Any]]) -> None:
    """Rows of another format are errors of rows or of the format, never a crash."""
    for asked in FORMATS:
        assert detect(rows, asked).reason == f"--format {asked}"
        with contextlib.suppress(DataError, FormatError):
            read(rows, asked)


def test_ambiguous_rows_name_the_candidates() -> None:
    both = {
        "conversations": [
            {"from": "human", "value": "<image>What?"},
            {"from": "gpt", "value": "x"},
        ],
        "image": "a.png",
        "annotations": [],
        "file_name": "a.png",
        "query": "q",
        "response": "r",
    }
    with pytest.raises(FormatError, match=r"could be llava \(.*\) or ms-swift \(.*--format"):
        detect([both])


def test_unknown_rows() -> None:
    with pytest.raises(FormatError, match="no form that is known"):
        detect([{"conversations": []}])
    with pytest.raises(UsageError, match="did you mean 'llava'"):
        detect([{}], "lava")


def test_columns_mean_a_table() -> None:
    rows = [{"query": "q", "response": "r"}]
    assert detect(rows).name == "ms-swift"
    found = detect(rows, columns={"question": "query", "text": "response"})
    assert (found.name, found.reason) == ("table", "--columns names its columns")
    with pytest.raises(FormatError, match=r"rows are taken for llava.*--format table"):
        read([{"image": "a", "conversations": []}], "llava", image="x")


def test_joint_answers_are_noted_not_split() -> None:
    rows = [{"image_id": n, "image": "a.png", "caption": "one&& two"} for n in range(3)]
    (note,) = detect(rows).notes
    assert note.startswith("3 of 3 texts in 'caption' hold '&&'")
    assert "--answer-separator '&&'" in note
    assert detect([*rows[:1], *({**row, "caption": "a"} for row in rows)]).notes == ()
    assert read(rows)[0].messages[-1].text == "one&& two"
    assert detect(rows, "table").notes == (note,)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5) | st.just("<image><bbox>"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "text", "from", "role", "value", "content", "bbox", "ref"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)
KEYS = [
    *("id", "text", "system", "query", "response", "history", "prompt", "completion"),
    *("messages", "conversations", "image", "images", "objects", "annotations", "file_name"),
]
ROW = st.dictionaries(st.sampled_from(KEYS), JSON, max_size=5)
TURN = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool", 3])},
    optional={"content": JSON, "value": JSON, "loss": JSON},
)


@settings(max_examples=150, deadline=None)
@given(ROW, st.lists(TURN, max_size=3), st.sampled_from(["messages", "conversations"]))
def test_no_row_crashes_a_reader(row: dict[str, Any], turns: list[Any], key: str) -> None:
    rows = [row, {**row, key: turns}]
    shape_of(rows)
    for name in FORMATS:
        for one in rows:
            with contextlib.suppress(DataError, FormatError):
                read([one], name)


def test_rows_of_one_sample_may_differ() -> None:
    rows = [
        {"messages": [TEXT_ONLY, ANSWER]},
        {"messages": [{"role": "user", "content": "<image>?"}, ANSWER], "images": ["a.png"]},
    ]
    assert detect(rows).name == "sharegpt"
