"""Exports are read again by ``prepare`` as they were, or it is told what was not."""

from __future__ import annotations

import csv
import io
import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from export_rows import (
    BOXED,
    GRID_BOX,
    HELD,
    IMAGELESS,
    MARKED,
    ODD,
    OUTSIDE,
    PICTURES,
    PROMPTED,
    SIMPLE,
    SIZE,
    TURNS,
    TWO,
    Make,
    again,
    apart,
    assistant,
    content,
    good,
    losses_of,
    message,
    row,
    unique,
    user,
    write_dataset,
)
from format_samples import SAMPLES
from vlmtune.data.boxes import from_grid
from vlmtune.data.cells import neutral, restored
from vlmtune.data.conversation import Box, Conversation, Image, Message, Part, Role, Text
from vlmtune.data.dataset import PreparedDataset
from vlmtune.data.export import FORMS, ExportRefusedError, export
from vlmtune.data.export.fit import Loss, check_read_back, fit
from vlmtune.data.formats import FORMATS
from vlmtune.data.formats.draft import tidy
from vlmtune.data.prepare import prepare
from vlmtune.data.writer import DatasetWriter
from vlmtune.errors import DataError


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Writes a prepared dataset of rows as they are."""

    def made(*rows: Conversation, validation: int = 0, name: str = "data") -> Path:
        return write_dataset(tmp_path / name, *rows, validation=validation)

    return made


def test_every_form_is_here() -> None:
    assert set(HELD) == set(FORMS)
    assert {form.reader for form in FORMS.values()} <= set(FORMATS)


@pytest.mark.parametrize("name", FORMS)
def test_what_a_form_holds_comes_back(name: str, make: Make, tmp_path: Path) -> None:
    *train, last = unique(HELD[name])
    rows = [*train, apart(last)]
    data = make(*rows, validation=1)
    result = export(data, tmp_path / "out", format=name)
    assert (result.rows, result.left_out, result.lost, result.report) == (len(rows), 0, {}, None)
    assert result.path == tmp_path / "out" / f"rows{FORMS[name].endings[0]}"
    assert content(again(result, tmp_path / "again")) == content(data)
    (tmp_path / "moved").mkdir()
    shutil.move(tmp_path / "out", tmp_path / "moved/elsewhere")
    moved = replace(result, path=tmp_path / "moved/elsewhere" / result.path.name)
    assert content(again(moved, tmp_path / "third")) == content(data)


def test_a_split_that_divides_a_picture_is_told(make: Make, tmp_path: Path) -> None:
    rows = unique([good("csv"), good("csv")])
    result = export(make(*rows, validation=1), tmp_path / "out", format="csv")
    assert (result.rows, result.lost) == (2, {"split": 1})
    apart_result = export(
        make(rows[0], apart(rows[1]), validation=1, name="b"), tmp_path / "b-out", format="csv"
    )
    assert apart_result.lost == {}


@pytest.mark.parametrize("name", FORMS)
def test_plain_rows_need_no_format_to_be_named(name: str, make: Make, tmp_path: Path) -> None:
    one = row(user(Image(0)) if name == "tutorial-ocr" else user(Image(0), "What?"), assistant("x"))
    data = make(*unique([one, one]))
    result = export(data, tmp_path / "out", format=name)
    prepare(tmp_path / "out", tmp_path / "again")
    assert content(tmp_path / "again") == content(data)
    assert prepare(result.path, tmp_path / "third").rows.kept == 2


@pytest.mark.parametrize("name", IMAGELESS)
def test_rows_without_images(name: str, make: Make, tmp_path: Path) -> None:
    data = make(row(user("1+1?"), assistant("2")), row(user("3?"), assistant("3"), id="2"))
    result = export(data, tmp_path / "out", format=name, strict=True)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [result.path.name]
    assert content(again(result, tmp_path / "again")) == content(data)


@pytest.mark.parametrize("name", FORMS)
def test_the_samples_of_all_formats(name: str, tmp_path: Path, make: Make) -> None:
    """Whatever came in goes out in every form: it comes back, or it is told that it does not."""
    data = make(*_sample_rows(tmp_path))
    result = export(data, tmp_path / "out", format=name)
    told = losses_of(result)
    assert len(told) == sum(result.lost.values())
    before = {one[0]: one for one in content(data)["train"]}
    back = content(again(result, tmp_path / "again", max_bad=0))["train"]
    assert len(back) == result.rows
    assert {id for id, _, what in told if what == "left out"} == set(before) - {r[0] for r in back}
    changed = {id for id, _, what in told if what == "written"}
    assert {r[0] for r in back if r != before[r[0]]} == changed
    assert result.rows + result.left_out == len(before)


def _sample_rows(folder: Path) -> list[Conversation]:
    """The conversations of ``SAMPLES``, each of whose images is a file here."""
    from vlmtune.data.build import Builder

    rows = []
    for number, (name, _, sample) in enumerate(SAMPLES):
        read = FORMATS[name].reader(sample, {})
        for position, fields in enumerate(sample):
            draft = read(fields)
            values = tuple({"bytes": PICTURES[n % 4]} for n in range(len(draft.images)))
            draft = replace(draft, images=values, size=None)
            identity = f"{number}.{position}"
            rows.append(Builder().build(draft, identity, folder, "here"))
    assert len(rows) > 25
    return rows


# What a form cannot hold is told.

UNNAMED = row(user(Image(0), "?"), assistant(Box(0, "a", GRID_BOX), Box(0, "", GRID_BOX)))

CANNOT: list[tuple[str, Conversation, str]] = [
    ("csv", TURNS, "several_turns"),
    ("csv", BOXED, "box"),
    ("csv", row(user(*TWO, "?"), assistant("a")), "image_count"),
    ("csv", row(user("?"), assistant("a")), "image_count"),
    ("csv", row(user("before", Image(0)), assistant("a")), "part_order"),
    ("csv", row(user("?"), assistant(Image(0), "a")), "image_in_answer"),
    ("csv", row(message("system", Image(0), "x"), user("?"), assistant("a")), "not_read_back"),
    ("tutorial-ocr", TURNS, "several_turns"),
    ("tutorial-ocr", PROMPTED, "system_prompt"),
    ("tutorial-ocr", row(user(*TWO), assistant("a")), "image_count"),
    ("tutorial-caption", PROMPTED, "system_prompt"),
    ("tutorial-caption", row(user("a"), assistant("a")), "image_count"),
    ("tutorial-caption", row(user("<|vision_end|>", Image(0)), assistant("a")), "mark_in_text"),
    ("tutorial-caption", BOXED, "box"),
    ("qwen", row(user(Image(0), "a <box> b"), assistant("a")), "bad_markup"),
    ("qwen", row(user(Image(0), "a"), assistant(Box(0, "</ref>", GRID_BOX))), "bad_markup"),
    ("qwen", row(user(*TWO, "a"), assistant(Box(0, "x", GRID_BOX))), "box_image"),
    ("qwen", row(user(Image(0), "a"), assistant(Box(7, "x", GRID_BOX))), "bad_box"),
    ("llava", MARKED, "mark_in_text"),
    ("llava", BOXED, "box"),
    ("llava", row(user("?"), assistant(Image(0), "a")), "image_in_answer"),
    ("sharegpt", MARKED, "mark_in_text"),
    ("sharegpt", row(user("?"), assistant(Image(0), "a")), "image_in_answer"),
    ("messages", BOXED, "box"),
    ("trl", BOXED, "box"),
    ("swift", MARKED, "mark_in_text"),
    ("swift", UNNAMED, "box_label"),
    ("swift", row(user(Image(0), "?"), assistant("<bbox>")), "mark_in_text"),
    ("swift", row(user(Image(0), "?"), assistant("<img>a</img>")), "mark_in_text"),
    *((name, row(user("q"), user("q"), assistant("a")), "role_order") for name in FORMS),
    *((name, row(user(" "), assistant("a")), "empty_question") for name in IMAGELESS),
]
PARTLY: list[tuple[str, Conversation, str]] = [
    ("csv", row(user(Image(0), " \n"), assistant("a")), "blank_text"),
    ("csv", row(message("system", " "), user(Image(0), "q"), assistant("a")), "blank_text"),
    ("csv", row(message("system"), user(Image(0), "q"), assistant("a")), "blank_text"),
    ("csv", row(user(Image(0)), assistant("a"), references=("a", " ")), "references"),
    ("tutorial-ocr", SIMPLE, "question"),
    ("qwen", OUTSIDE, "box_outside"),
    ("qwen", replace(BOXED, references=("a",)), "references"),
    ("qwen", row(user(Image(0)), assistant(Box(0, "a", (0, 0, 40, 30)))), "box_rounded"),
    ("qwen", row(user(Image(0)), assistant(Box(0, "a", (0, 0, 1.001, 2)))), "box_rounded"),
    *(
        (name, row(user(Image(0)), assistant("a"), references=("b", "a")), "references")
        for name in FORMS
        if name != "csv"
    ),
    *(
        (n, row(user(Image(0)), assistant("a", "b"), references=("ab",)), "texts_joined")
        for n in FORMS
    ),
]


@pytest.mark.parametrize(("name", "bad", "code"), CANNOT)
def test_a_row_that_a_form_cannot_hold_is_told(
    name: str, bad: Conversation, code: str, make: Make, tmp_path: Path
) -> None:
    if code == "empty_question" and name == "csv":
        bad = replace(bad, id="0")
        data = make(bad, replace(row(user("q"), assistant("a")), id="good"))
    else:
        data = make(replace(bad, id="bad\n\u202e"), good(name))
    result = export(data, tmp_path / "out", format=name)
    assert (result.rows, result.left_out, result.lost) == (1, 1, {code: 1})
    ((identity, told, what),) = losses_of(result)
    assert (told, what) == (code, "left out")
    assert identity != "good"
    assert [r[0] for r in content(again(result, tmp_path / "again"))["train"]] == ["good"]
    # Negative control: the good row alone is held, and the report is not there.
    alone = make(PreparedDataset.open(data).split("train")[1], name="alone")
    assert export(alone, tmp_path / "fine", format=name, strict=True).lost == {}


@pytest.mark.parametrize(("name", "bad", "code"), PARTLY)
def test_a_part_that_a_form_cannot_hold_is_told(
    name: str, bad: Conversation, code: str, make: Make, tmp_path: Path
) -> None:
    data = make(bad)
    result = export(data, tmp_path / "out", format=name)
    assert (result.rows, result.left_out, result.lost) == (1, 0, {code: 1})
    assert losses_of(result) == [("1", code, "written")]
    again(result, tmp_path / "again")
    with pytest.raises(ExportRefusedError, match=f"{code} 1.*--strict"):
        export(data, tmp_path / "strict", format=name, strict=True)
    assert not (tmp_path / "strict").exists()
    assert not list(tmp_path.glob(".*"))


def test_a_reader_that_changed_its_mind_is_noticed() -> None:
    """Negative control of the proof itself: every field that is read otherwise is seen."""
    form, paths = FORMS["sharegpt"], ["a.png"]
    fields = form.write(SIMPLE, paths, [SIZE])
    draft = FORMATS["sharegpt"].reader([], {})(fields)
    check_read_back(draft, SIMPLE, paths, [SIZE])
    for wrong in (
        replace(draft, id="2"),
        replace(draft, images=("b.png",)),
        replace(draft, references=("another",)),
        replace(draft, messages=(*draft.messages[:1], assistant("A cat."))),
    ):
        with pytest.raises(DataError) as caught:
            check_read_back(wrong, SIMPLE, paths, [SIZE])
        assert caught.value.code == "not_read_back"


def test_boxes_on_the_grid_are_exact_integers(make: Make, tmp_path: Path) -> None:
    data = make(BOXED)
    result = export(data, tmp_path / "out", format="qwen")
    (written,) = json.loads(result.path.read_text(encoding="utf-8"))
    value = written["conversations"][1]["value"]
    assert value == "<ref>a</ref><box>(100,200),(333,999)</box>"


def test_a_common_question_is_given_back_by_prompt(make: Make, tmp_path: Path) -> None:
    rows = [row(user(Image(0), "Read."), assistant(str(n)), id=str(n)) for n in range(3)]
    data = make(*rows)
    result = export(data, tmp_path / "out", format="tutorial-ocr")
    assert result.lost == {"question": 3}
    assert result.read_with == {"format": "tutorial-ocr", "prompt": "Read."}
    assert content(again(result, tmp_path / "again")) == content(data)
    other = make(*rows, row(user(Image(0)), assistant("x"), id="9"), name="other")
    assert "prompt" not in export(other, tmp_path / "2", format="tutorial-ocr").read_with


# Hypothesis: rows of everything, through the form and its reader.

SIGNS = st.characters(exclude_categories=["Cs"])
TEXTS = st.text(SIGNS, max_size=6) | st.sampled_from(
    [
        "\n",
        "\n\n",
        "<image>",
        "<bbox>",
        "<ref-object>",
        "Picture 1: ",
        "<ref>",
        "a</ref>",
        "=1",
        ODD,
        *("<|vision_start|>", "<|vision_end|>", "<img>a</img>", "<ima", "ge>", "<box>", " "),
    ]
)
GRID = st.tuples(*[st.integers(0, 499)] * 2, *[st.integers(500, 999)] * 2).map(
    lambda box: from_grid(box, SIZE, 1000)
)
FREE = st.tuples(*[st.floats(-9, 9)] * 2, *[st.floats(9, 99)] * 2)
CORNERS = GRID | FREE


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    """Anything; about half of it some form cannot say."""
    images = 0
    messages = []
    roles: list[Role] = ["user", "assistant"] * draw(st.sampled_from([1, 1, 2]))
    if draw(st.booleans()) and draw(st.booleans()):
        roles.insert(0, "system")
    for role in roles:
        parts: list[Part] = []
        kinds = ["image", "text", "text", "box"] if role == "user" else ["text", "text", "box"]
        for kind in draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=3)):
            if kind == "image":
                parts.append(Image(images))
                images += 1
            elif kind == "text" or not images:
                parts.append(Text(draw(TEXTS)))
            else:
                label = draw(TEXTS)
                parts.append(Box(draw(st.integers(0, images - 1)), label, draw(CORNERS)))
        if role != "system":
            parts.append(Text(draw(st.sampled_from(["", "x", "=1"]))))
        messages.append(Message(role, tidy(parts)))
    others = draw(st.lists(TEXTS, max_size=1))
    made = row(*messages, id=draw(IDS))
    return replace(made, references=tuple(dict.fromkeys((*others, *made.references))))


IDS = st.text(SIGNS, min_size=1, max_size=4)
# Nothing that any form takes for a mark, but all that a spreadsheet or a line reader minds.
PLAIN = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<>"), max_size=5)
PLAIN = (PLAIN | st.sampled_from(["\n", "Picture 1: ", "=1", "'", " "])).map(
    lambda text: f"{text}."
)


@st.composite
def held_by(draw: st.DrawFn, name: str) -> Conversation:
    """A row that the form holds whole."""
    single = name == "csv" or name.startswith("tutorial")
    images = 0
    messages = []
    if not name.startswith("tutorial") and draw(st.booleans()):
        messages.append(message("system", draw(PLAIN)))
    for _ in range(1 if single else draw(st.integers(1, 2))):
        kinds = draw(st.permutations(["image", "text"] if single else ["image", "image", "text"]))
        if name == "csv":
            kinds = ["image", "text"]
        if name == "tutorial-ocr":
            kinds = ["image"]
        parts: list[Part] = []
        for kind in kinds:
            parts.append(Image(images) if kind == "image" else Text(draw(PLAIN)))
            images += kind == "image"
        messages.append(Message("user", tuple(parts)))
        answer: list[Part] = [Text(draw(PLAIN))]
        for label in draw(st.lists(PLAIN, max_size=2)) if name in ("qwen", "swift") else ():
            image = images - 1 if name == "qwen" else draw(st.integers(0, images - 1))
            answer.append(Box(image, label, draw(GRID if name == "qwen" else FREE)))
        if name in ("trl", "messages", "swift", "qwen") and draw(st.booleans()):
            answer.append(Image(images))
            images += 1
        messages.append(Message("assistant", tuple(answer)))
    made = row(*messages, id=draw(IDS))
    others = draw(st.lists(PLAIN, max_size=2)) if name == "csv" else ()
    return replace(made, references=tuple(dict.fromkeys((*others, *made.references))))


def through(name: str, given_row: Conversation) -> tuple[Conversation, list[Loss]]:
    """The row as ``name`` holds it, written and read back; and what was lost."""
    form, losses = FORMS[name], list[Loss]()
    paths = [f"{number}.png" for number in range(len(given_row.images))]
    sizes = [SIZE] * len(paths)
    cut = fit(given_row, form, sizes, losses)
    fields = form.write(cut, paths, sizes)
    if name == "csv":
        fields = restored(_through_csv(neutral(fields)))
    check_read_back(FORMATS[form.reader].reader([fields], {})(fields), cut, paths, sizes)
    return cut, losses


@pytest.mark.parametrize("name", FORMS)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_all_that_a_form_holds(name: str, data: st.DataObject) -> None:
    given_row = data.draw(held_by(name))
    assert through(name, given_row) == (given_row, [])


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(conversations())
def test_what_is_written_without_loss_is_read_as_it_was(given_row: Conversation) -> None:
    for name in FORMS:
        try:
            cut, losses = through(name, given_row)
        except DataError as fault:
            code = fault.code
        else:
            code = "changed" if losses or cut == given_row else "changed silently"
        # Each thing that a form cannot say is known beforehand, not found out by reading.
        assert code not in ("not_read_back", "changed silently"), name


@settings(max_examples=1, deadline=None)
@given(st.lists(conversations(), min_size=8, max_size=12))
def test_rows_through_the_files(rows: list[Conversation]) -> None:
    for name in FORMS:
        with tempfile.TemporaryDirectory() as folder:
            here = Path(folder)
            with DatasetWriter(here / "data") as writer:
                for one in [good(name), *unique(rows)]:
                    writer.add(one)
                writer.finish(set(), "test", {})
                writer.publish()
            result = export(here / "data", here / "out", format=name)
            assert result.rows + result.left_out == len(rows) + 1
            lost = {identity for identity, _, _ in losses_of(result)}
            before = {one[0]: one for one in content(here / "data")["train"]}
            back = content(again(result, here / "again", max_bad=0))["train"]
            assert {r[0] for r in back} | lost == set(before)
            assert all(r == before[r[0]] for r in back if r[0] not in lost), name


def _through_csv(cells: dict[str, str]) -> dict[str, str]:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(cells))
    writer.writeheader()
    writer.writerow(cells)
    file.seek(0)
    (back,) = csv.DictReader(file, strict=True)
    return back
