from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlmtune.data.conversation import Image, Message, Text
from vlmtune.data.formats import FORMATS, choose_columns, detect
from vlmtune.data.prepare import PrepareOptions, prepare
from vlmtune.data.quarantine import read_quarantine, visible
from vlmtune.data.sources import FieldError, Record, open_local
from vlmtune.errors import FormatError, UsageError

MakeTable = Callable[..., Path]


def records(path: Path) -> list[Record]:
    return list(open_local(path).records)


def read(rows: list[dict[str, Any]], name: str = "auto", **columns: str) -> list[Any]:
    reader = FORMATS[detect(rows, name).name].reader(rows, columns)
    return [reader(row) for row in rows]


OCR = {
    "id": "identity_1",
    "conversations": [
        {"role": "user", "value": "/data/LaTeX OCR/0.jpg"},
        {"role": "assistant", "value": r"\frac{1}{2}"},
    ],
}
CAPTION = {
    "id": "identity_1",
    "conversations": [
        {"from": "user", "value": "COCO Yes: <|vision_start|>/coco/1.jpg<|vision_end|>"},
        {"from": "assistant", "value": "A cat."},
    ],
}


def test_tutorial_ocr() -> None:
    (draft,) = read([OCR])
    assert draft.messages == (
        Message("user", (Image(0),)),
        Message("assistant", (Text(r"\frac{1}{2}"),)),
    )
    assert draft.images == ("/data/LaTeX OCR/0.jpg",)
    assert draft.id == "identity_1"


def test_tutorial_caption_keeps_the_order_as_written() -> None:
    (draft,) = read([CAPTION])
    assert draft.messages[0].content == (Text("COCO Yes: "), Image(0))
    assert draft.images == ("/coco/1.jpg",)
    mark = "<|vision_start|>{}<|vision_end|>"
    value = f"{mark.format('a.png')}first {mark.format('b.png')} and last"
    (draft,) = read([{"conversations": [{"from": "user", "value": value}]}])
    assert draft.messages[0].content == (Image(0), Text("first "), Image(1), Text(" and last"))
    assert draft.images == ("a.png", "b.png")


def test_tutorial_files_through_prepare(make_table: MakeTable, tmp_path: Path) -> None:
    folder = make_table(3).parent
    rows = [
        {
            "id": f"identity_{n}",
            "conversations": [
                {"role": "user", "value": str(folder / f"images/{n}.png")},
                {"role": "assistant", "value": f"x^{n}"},
            ],
        }
        for n in range(3)
    ]
    (folder / "ocr.json").write_text(json.dumps(rows))
    prompt = "你是一个LaText OCR助手"
    prepare(folder / "ocr.json", tmp_path / "out", PrepareOptions(prompt=prompt, validation=1))
    from vlmtune.data.dataset import PreparedDataset

    train = PreparedDataset.open(tmp_path / "out").split("train")
    assert train.ids == ["identity_0", "identity_1"]
    assert train[1].messages[0].content == (Image(0), Text(prompt))
    assert train[1].references == ("x^1",)
    assert train[1].meta["source"] == "ocr.json[1]"


def test_bad_conversations_are_quarantined(make_table: MakeTable, tmp_path: Path) -> None:
    folder = make_table(8).parent

    def row(*turns: tuple[str, Any]) -> dict[str, Any]:
        return {"conversations": [{"from": role, "value": value} for role, value in turns]}

    ask = "<|vision_start|>images/0.png<|vision_end|>"
    planted = [
        (row(("user", ask), ("assistant", "ok")), None),
        (row(("user", ask), ("robot", "x")), "bad_role"),
        (row(("user", ask)), "no_answer"),
        (row(("assistant", "x"), ("user", ask)), "role_order"),
        (row(("user", " "), ("assistant", "x")), "empty_question"),
        (row(("user", ask), ("assistant", " ")), "empty_answer"),
        (row(("user", 3), ("assistant", "x")), "missing_field"),
        (row(("user", ask), ("assistant", "\ud800")), "bad_text"),
        ({"conversations": "x"}, "bad_row"),
        ({"id": "7"}, "missing_field"),
        (row(), "no_answer"),
    ]
    lines = [json.dumps(content) for content, _ in planted]
    lines[3:3] = ["", "{broken", "[1]"]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    chosen = PrepareOptions(max_bad=50, format="tutorial-caption")
    result = prepare(folder / "rows.jsonl", tmp_path / "out", chosen)
    found = [entry["code"] for entry in read_quarantine(tmp_path / "out/quarantine.jsonl")]
    expected = [code for _, code in planted if code]
    expected[2:2] = ["bad_json", "bad_row"]
    assert found[: len(expected) - 1] == expected[:-1]
    assert found[-1] in ("no_answer", "empty_conversation")
    assert result.rows.came_in == result.rows.kept + result.rows.quarantined == 13
    lines_named = [entry["source"] for entry in read_quarantine(tmp_path / "out/quarantine.jsonl")]
    assert "rows.jsonl:5" in lines_named


def test_columns_are_found_by_their_names() -> None:
    assert choose_columns([{"img": "a.png", "latex": "x", "other": 1}], {}) == {
        "image": "img",
        "text": "latex",
    }
    rows = [{"file_name": "a", "question": "q", "answer": {"text": 1}, "answers": ["a"]}]
    assert choose_columns(rows, {}) == {
        "image": "file_name",
        "question": "question",
        "answers": "answers",
    }


def test_columns_asked_for() -> None:
    rows = [{"scan": "a.png", "image": "b.png", "truth": "x", "text": "y"}]
    assert choose_columns(rows, {"image": "scan", "text": "truth"}) == {
        "image": "scan",
        "text": "truth",
    }
    (draft,) = read(rows, image="scan", text="truth")
    assert draft.images == ("a.png",)
    with pytest.raises(
        FormatError, match=r"no column 'txet' \(did you mean 'text'\?\).*found scan"
    ):
        choose_columns(rows, {"text": "txet"})
    with pytest.raises(FormatError, match=r"unknown purpose 'imgae' \(did you mean 'image'"):
        choose_columns(rows, {"imgae": "scan"})


def test_unclear_or_missing_columns() -> None:
    with pytest.raises(FormatError, match=r"not clear.*text: caption, label.*--columns text="):
        choose_columns([{"image": "a", "caption": "x", "label": "y"}], {})
    with pytest.raises(FormatError, match="no column of answers found among the columns image, n"):
        choose_columns([{"image": "a", "n": "x"}], {})
    with pytest.raises(FormatError, match="no column of images"):
        choose_columns([{"n": "a", "text": "x"}], {})


@pytest.mark.parametrize("answers", [[], [" "], None, "[]", ""])
def test_a_row_without_an_answer(answers: Any) -> None:
    good = {"image": "a.png", "question": "q", "answers": ["x"]}
    assert read([good])[0].references == ("x",)
    with pytest.raises(FieldError) as caught:
        read([good, {**good, "answers": answers}])
    assert (caught.value.code, caught.value.field) == ("empty_answer", "answers")


def test_detection() -> None:
    assert detect([OCR]).name == "tutorial-ocr"
    assert detect([CAPTION]).name == "tutorial-caption"
    assert detect([{"image": 1, "text": 2}]).name == "table"
    with pytest.raises(FormatError, match="no form that is known"):
        detect([{"messages": []}], "auto")
    with pytest.raises(UsageError, match="did you mean 'tutorial-ocr'"):
        detect([OCR], "tutorial-orc")
    both = {
        "conversations": [
            {"role": "user", "value": "a.png"},
            {"from": "user", "value": "<|vision_start|>a<|vision_end|>"},
        ]
    }
    with pytest.raises(FormatError, match=r"could be tutorial-ocr \(.*\) or tutorial-caption \("):
        detect([both], "auto")


@pytest.mark.parametrize("name", ["table.csv", "table.tsv"])
def test_lines_are_counted_with_line_breaks_in_cells(name: str, make_table: MakeTable) -> None:
    table = make_table(4, {1: ["images/1.png", 'two\nlines, and ,\t"quotes"']}, name=name)
    table.write_bytes(b"\xef\xbb\xbf" + table.read_bytes() + b"\r\n")
    found = records(table)
    assert [record.where for record in found] == [f"{name}:{line}" for line in (2, 3, 5, 6)]
    assert found[1].fields["text"] == 'two\nlines, and ,\t"quotes"'
    assert list(found[0].fields) == ["image_path", "text"]


def test_a_long_cell(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("image,text\na.png," + "x" * 300_000 + "\n")
    assert len(records(tmp_path / "t.csv")[0].fields["text"]) == 300_000


def test_an_open_quote_does_not_swallow_the_rest(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text('image,text\na,1\nb,"2\nc,3\nd,4\n')
    with pytest.raises(FormatError, match=r"t\.csv:3: a quote opened here is never closed"):
        records(tmp_path / "t.csv")
    (tmp_path / "t.csv").write_text('image,text\na,"1"x\nb,2\n')
    found = records(tmp_path / "t.csv")
    assert [(record.where, record.fault is None) for record in found] == [
        ("t.csv:2", False),
        ("t.csv:3", True),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "image,text\na,é\n".encode("latin-1"), r"t\.csv:2 is not UTF-8"),
        ("t.json", '["é"]'.encode("latin-1"), r"t\.json:1 is not UTF-8"),
        ("t.csv", b"", "is empty"),
        ("t.csv", b"text,text\n", "several columns"),
        ("t.json", b"{", "not valid JSON"),
        ("t.json", b"[" * 100_000, "not valid JSON"),
        ("t.json", b"{}", "a JSON dict; expected a list"),
        ("t.parquet", b"PAR1", "not readable as parquet"),
        ("t.xlsx", b"", "the ending '.xlsx'"),
    ],
)
def test_unreadable_tables(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FormatError, match=message):
        records(tmp_path / name)


def test_a_line_that_is_not_utf8_is_one_bad_row(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_bytes('{"a": 1}\n{"a": "é"}\n'.encode("latin-1"))
    good, bad = records(tmp_path / "t.jsonl")
    assert good.fault is None
    assert bad.fault is not None
    assert bad.fault.code == "bad_json"


def test_a_folder_with_its_table(make_table: MakeTable, tmp_path: Path) -> None:
    folder = make_table(2).parent
    assert len(records(folder)) == 2
    (folder / "other.jsonl").write_text("{}\n")
    with pytest.raises(FormatError, match=r"several tables: other\.jsonl, table\.csv"):
        records(folder)
    (folder / "metadata.csv").write_text("file_name,text\nimages/0.png,x\n")
    assert [record.where for record in records(folder)] == ["metadata.csv:2"]
    with pytest.raises(FormatError, match="holds no table"):
        records(folder / "images")
    with pytest.raises(UsageError, match="does not exist"):
        prepare(tmp_path / "nothing.csv", tmp_path / "out")


def test_a_source_without_rows(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("image,text\n")
    with pytest.raises(FormatError, match="no rows"):
        prepare(tmp_path / "t.csv", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_reaches_a_terminal_is_written_out() -> None:
    assert visible("a\x1b[31m\u202eb\n") == r"a\x1b[31m\u202eb\n"
    assert visible("公式 é") == "公式 é"
