"""Exports on the disk: spreadsheets, other tools, names, splits, and a killed process."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import shlex
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as Pillow
from typer.testing import CliRunner

from export_rows import (
    BOXED,
    HELD,
    MARKED,
    PICTURES,
    PROMPTED,
    SIMPLE,
    TURNS,
    TWO,
    Make,
    again,
    assistant,
    content,
    message,
    picture,
    row,
    tree,
    unique,
    user,
    write_dataset,
)
from vlmtune.cli.main import app
from vlmtune.data.cells import ESCAPED, is_formula, neutral, restored
from vlmtune.data.conversation import Conversation, EncodedImage, Image
from vlmtune.data.export import FORMS, ExportRefusedError, export
from vlmtune.data.prepare import prepare
from vlmtune.errors import RefusedError, UsageError


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Writes a prepared dataset of rows as they are."""

    def made(*rows: Conversation, validation: int = 0, name: str = "data") -> Path:
        return write_dataset(tmp_path / name, *rows, validation=validation)

    return made


# Spreadsheets.

FORMULAS = [
    "=1+1",
    "+1+1",
    "-1+1",
    "@SUM(1)",
    "\t=1",
    "\r=1",
    "\n=1",
    " =1",
    "\u00a0=1",
    "\u200b=1",
    "\ufeff=1",
    "＝1+1",
    "＋1+1",
    "－2+3",
    "＠SUM(1)",
    "﹦1",
    "−2+3",
    '=HYPERLINK("http://x","y")',
    "=cmd|' /C calc'!A0",
    "-",
    "-1,5",
    "-1 ",
    '"=1"'.strip('"'),
]
HARMLESS = ["-1", "+1", "-1.5e-3", "-.5", "1", "", "a=1", "'=1", '"=1"', '["=1"]', r"\frac{-1}{2}"]


def test_formulas_are_neutralised_and_come_back(make: Make, tmp_path: Path) -> None:
    assert all(map(is_formula, FORMULAS))
    assert not any(map(is_formula, HARMLESS))
    texts = [*FORMULAS, *filter(None, HARMLESS)]
    rows = [
        row(user(Image(0), text), assistant(text), id=text, references=(text, "=x"))
        for text in texts
    ]
    data = make(*rows)
    result = export(data, tmp_path / "out", format="csv", strict=True)
    with result.path.open(encoding="utf-8", newline="") as file:
        written = list(csv.DictReader(file))
    assert len(written) == len(texts)
    for cells, text in zip(written, texts, strict=True):
        assert not any(is_formula(cell) for cell in cells.values())
        assert cells["text"] == (f"'{text}" if text in FORMULAS else text)
        assert cells[ESCAPED] == ("id question text" if text in FORMULAS else "")
    assert content(again(result, tmp_path / "again")) == content(data)


def test_a_strangers_apostrophes_stay(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("question,text\nq,'=1\n", encoding="utf-8")
    prepare(tmp_path / "t.csv", tmp_path / "out")
    assert content(tmp_path / "out")["train"][0][3] == ("'=1",)


@given(
    st.dictionaries(
        st.sampled_from("abc"), st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
    )
)
def test_restoring_is_the_inverse_of_neutralising(cells: dict[str, str]) -> None:
    assert restored(neutral(cells)) == cells
    assert not any(is_formula(cell) for cell in neutral(cells).values())


# The tutorials' scripts and the tools' own readers.


def test_the_tutorials_scripts_read_theirs(make: Make, tmp_path: Path) -> None:
    ocr = [row(user(Image(0)), assistant(f"x^{n}"), id=f"identity_{n}") for n in range(6)]
    result = export(make(*ocr), tmp_path / "ocr.json", format="tutorial-ocr")
    rows = json.loads(result.path.read_text(encoding="utf-8"))
    assert rows[0] == {
        "id": "identity_0",
        "conversations": [
            {"role": "user", "value": "ocr_images/identity_0.png"},
            {"role": "assistant", "value": "x^0"},
        ],
    }
    train, test = rows[:-4], rows[-4:]
    assert (len(train), len(test)) == (2, 4)
    for one in rows:  # as process_func does
        turns = one["conversations"]
        assert (tmp_path / turns[0]["value"]).read_bytes() == PICTURES[0]
        assert turns[1]["value"].startswith("x^")

    captions = [row(user("COCO Yes: ", Image(0)), assistant("A cat."), id="identity_1")]
    result = export(make(*captions, name="c"), tmp_path / "c.json", format="tutorial-caption")
    (one,) = json.loads(result.path.read_text(encoding="utf-8"))
    turns = one["conversations"]
    assert [turn["from"] for turn in turns] == ["user", "assistant"]
    path = turns[0]["value"].split("<|vision_start|>")[1].split("<|vision_end|>")[0]
    assert (tmp_path / path).read_bytes() == PICTURES[0]
    assert turns[1]["value"] == "A cat."


@pytest.mark.parametrize("name", ["trl", "messages", "sharegpt", "swift"])
def test_datasets_loads_it(name: str, make: Make, tmp_path: Path) -> None:
    from datasets import load_dataset

    rows = [row(message("system", "s"), user("no image"), assistant("x"), id="0"), *HELD[name]]
    result = export(make(*unique(rows)), tmp_path / "x.jsonl", format=name)
    loaded = load_dataset(
        "json", data_files=str(result.path), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert len(loaded) == len(rows)
    assert [turn["role"] for turn in loaded[0]["messages"]] == ["system", "user", "assistant"]
    if name == "trl":
        assert loaded[1]["messages"][0]["content"][0]["type"] == "image"
        assert (tmp_path / loaded[1]["images"][0]).read_bytes() == PICTURES[0]


# Files.


def test_images_are_safe_named_and_written_once(make: Make, tmp_path: Path) -> None:
    ids = ["A", "../../etc/passwd", "a", "图", "con", "a/b", "x" * 300, ".hidden", "a\x00\n", "a-2"]
    pictures = [picture(10 + n, "JPEG" if n % 2 else "PNG") for n in range(len(ids))]
    rows = [
        Conversation(
            identity,
            (user(*TWO, "?"), assistant("x")),
            (EncodedImage(data), EncodedImage(PICTURES[0])),
            ("x",),
        )
        for identity, data in zip(ids, pictures, strict=True)
    ]
    data = make(*rows)
    result = export(data, tmp_path / "out", format="llava")
    files = tree(tmp_path / "out/images")
    assert sorted(files.values()) == sorted([*pictures, PICTURES[0]])
    assert len({name.lower() for name in files}) == len(files)
    assert {"A.png", "A-2.png", "a-3.png", "a-2.jpg"} <= set(files)
    for name in files:
        assert name.isascii()
        assert name.replace("-", "").replace("_", "").replace(".", "").isalnum(), name
        assert len(name) < 100
        assert name[0] not in ".-"
        assert Path(name).suffix in (".png", ".jpg")
    assert "con.png" not in files
    assert content(again(result, tmp_path / "again")) == content(data)


@pytest.mark.parametrize("name", FORMS)
def test_twice_the_same_bytes(name: str, make: Make, tmp_path: Path) -> None:
    data = make(*unique([*HELD[name], TURNS, BOXED, MARKED, PROMPTED]))
    for out in ("a", "b"):
        export(data, tmp_path / out, format=name)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_splits(make: Make, tmp_path: Path) -> None:
    rows = [row(user(Image(0)), assistant(str(n)), id=str(n)) for n in range(40)]
    data = make(*rows, validation=4)
    for split, expected in (("train", rows[:36]), ("validation", rows[36:]), ("all", rows)):
        result = export(data, tmp_path / split, format="trl", split=split)
        lines = result.path.read_text(encoding="utf-8").splitlines()
        assert [json.loads(line)["id"] for line in lines] == [one.id for one in expected]
    assert result.read_with == {"format": "trl", "validation": 4}
    seen: list[tuple[int, int | None]] = []
    export(data, tmp_path / "p", format="csv", progress=lambda *at: seen.append(at))
    assert seen[-1] == (40, 40)


def test_out_as_a_file_and_as_a_folder(make: Make, tmp_path: Path) -> None:
    data = make(SIMPLE, replace(TURNS, id="2"))
    result = export(data, tmp_path / "my table.csv", format="csv")
    assert result.path == tmp_path / "my table.csv"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "data",
        "my table.csv",
        *[path.name for path in sorted(tmp_path.glob("my_table-*"))],
    ]
    assert result.report is not None
    assert result.report.name.endswith("_lost.jsonl")
    assert content(again(result, tmp_path / "again"))["train"][0][0] == "1"
    with pytest.raises(UsageError, match=r"x\.csv.*written as \.json or \.jsonl; found '\.csv'"):
        export(data, tmp_path / "x.csv", format="llava")
    (tmp_path / "empty").mkdir()
    result = export(data, tmp_path / "empty", format="csv")
    assert sorted(path.name for path in (tmp_path / "empty").iterdir()) == [
        "images",
        "lost",
        "rows.csv",
    ]
    assert content(again(replace(result, path=tmp_path / "empty"), tmp_path / "3"))["train"]


def test_nothing_is_overwritten(make: Make, tmp_path: Path) -> None:
    data = make(SIMPLE)
    for out in ("t.json", "folder"):
        export(data, tmp_path / out, format="llava")
        before = tree(tmp_path)
        with pytest.raises(RefusedError, match="already"):
            export(data, tmp_path / out, format="llava")
        assert tree(tmp_path) == before
    (tmp_path / "u_images").mkdir()
    with pytest.raises(RefusedError, match="u_images exists already"):
        export(data, tmp_path / "u.json", format="llava")
    (tmp_path / "u_images").rmdir()
    export(data, tmp_path / "u.json", format="llava")


def test_wrong_words_are_usage_errors(make: Make, tmp_path: Path) -> None:
    data = make(SIMPLE)
    with pytest.raises(UsageError, match=r"no such form \(did you mean 'llava'\?\)"):
        export(data, tmp_path / "x", format="lava")
    with pytest.raises(UsageError, match="did you mean 'train'"):
        export(data, tmp_path / "x", format="csv", split="trian")
    with pytest.raises(UsageError, match="has no rows there"):
        export(data, tmp_path / "x", format="csv", split="validation")
    with pytest.raises(ExportRefusedError, match=r"none of the 1 rows.*\(box 1\)"):
        export(make(BOXED, name="boxed"), tmp_path / "x", format="csv")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["boxed", "data"]


@pytest.mark.parametrize("out", ["x.jsonl", "x"])
@pytest.mark.parametrize("after", range(3))
def test_a_killed_export_leaves_all_or_nothing(
    out: str, after: int, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between its renames; the next one takes back what was moved and does it all."""
    data = make(SIMPLE, replace(BOXED, id="2"))
    whole = export(data, tmp_path / "whole" / out, format="trl")
    real, done = Path.rename, []

    def rename(self: Path, target: Path) -> Path:
        if len(done) == after:
            os._exit(9)
        done.append(target)
        return real(self, target)

    folder = tmp_path / "killed"
    folder.mkdir()
    child = os.fork()
    if child == 0:
        monkeypatch.setattr(Path, "rename", rename)
        export(data, folder / out, format="trl")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if out == "x":
        assert (os.waitstatus_to_exitcode(status) == 0) == (after > 0)
    else:
        assert os.waitstatus_to_exitcode(status) == 9
        assert not (folder / out).exists()
    if os.waitstatus_to_exitcode(status):
        assert any(path.name.startswith(".") for path in folder.iterdir())
        export(data, folder / out, format="trl")
    assert tree(folder) == tree(whole.path.parent if out != "x" else tmp_path / "whole")


def test_memory_is_bounded(make: Make, tmp_path: Path) -> None:
    """64 rows of 256 KiB take no more than 16 do."""

    def peak(rows: int) -> int:
        def noise(number: int) -> bytes:
            data = random.Random(number).randbytes(3 * 300 * 290)
            buffer = io.BytesIO()
            Pillow.frombytes("RGB", (300, 290), data).save(buffer, "BMP")
            return buffer.getvalue()

        data = make(
            *(
                Conversation(
                    str(n), (user(Image(0)), assistant("x")), (EncodedImage(noise(n)),), ("x",)
                )
                for n in range(rows)
            ),
            name=f"d{rows}",
        )
        tracemalloc.start()
        export(data, tmp_path / f"o{rows}", format="llava")
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    few, many = peak(16), peak(64)
    assert many < few + 2**20, (few, many)


# The command.


def test_the_command(make: Make, tmp_path: Path) -> None:
    data = make(SIMPLE, replace(TURNS, id="2"))

    def run(*arguments: object) -> tuple[int, dict[str, Any], str]:
        result = CliRunner().invoke(app, ["export", *map(str, (data, *arguments))])
        last = result.stdout.splitlines()[-1] if result.stdout else "{}"
        parsed = json.loads(last) if last.startswith("{") else {}
        return result.exit_code, parsed, result.stdout + result.stderr

    status, told, _ = run("--format", "trl", "--out", tmp_path / "a.jsonl", "--json")
    assert (status, told) == (
        0,
        {
            "path": str(tmp_path / "a.jsonl"),
            "rows": 2,
            "left_out": 0,
            "lost": {},
            "report": None,
            "read_with": {"format": "trl"},
        },
    )
    status, told, _ = run("--format", "csv", "--out", tmp_path / "b.csv", "--json")
    assert (status, told["rows"], told["lost"]) == (3, 1, {"several_turns": 1})
    (entry,) = map(json.loads, Path(told["report"]).read_text(encoding="ascii").splitlines())
    assert (entry["id"], entry["split"], entry["code"]) == ("2", "train", "several_turns")
    status, told, said = run("--format", "csv", "--out", tmp_path / "c", "--strict", "--json")
    assert (status, told["lost"], told["error"]["code"]) == (
        4,
        {"several_turns": 1},
        "not_expressible",
    )
    assert "--strict is set" in said
    status, _, said = run("--format", "lava", "--out", tmp_path / "c")
    assert (status, "did you mean 'llava'" in said) == (2, True)
    status, _, said = run("--format", "csv", "--out", tmp_path / "a b")
    assert status == 3
    assert "1 rows left out; not everything fits: several_turns 1; see " in said
    command = said[said.index("vlmtune prepare") :].splitlines()[0]
    arguments = [*shlex.split(command)[1:], "--out", str(tmp_path / "again")]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert [one[0] for one in content(tmp_path / "again")["train"]] == ["1"]
    assert not (tmp_path / "c").exists()
