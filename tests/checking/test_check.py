"""Every fault is found with its code and row, nothing else is, and thresholds decide the status."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import pytest
from typer.testing import CliRunner

from planted import boxed, clean_rows, planted, sample, saved, scene, write_dataset
from vlmtune.checking.check import check_dataset
from vlmtune.checking.check_page import write_check_page
from vlmtune.checking.codes import code_of
from vlmtune.checking.findings import parse_limits
from vlmtune.cli.main import app
from vlmtune.data.conversation import Box
from vlmtune.data.media import ImagePolicy
from vlmtune.errors import UsageError
from vlmtune.verbs.check import encoder_of

AREA = 100352


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    train, validation, expected = planted()
    folder = write_dataset(tmp_path_factory.mktemp("check") / "data", train, validation)
    return folder, expected


@pytest.fixture(scope="module")
def encoder(tiny_base):
    return encoder_of(tiny_base, ImagePolicy(max_pixels=AREA))


@pytest.fixture(scope="module")
def result(dataset, encoder):
    return check_dataset(dataset[0], encoder, max_length=400)


def test_every_planted_fault_and_nothing_else(result, dataset):
    assert {(finding.code, finding.id) for finding in result.findings} == dataset[1]
    assert not result.ok


def test_rows_are_named_by_their_source(result):
    (cut,) = [finding for finding in result.findings if finding.id == "cut"]
    assert cut.source == "rows.csv:cut"


def test_clean_rows_are_clean(tmp_path, encoder):
    folder = write_dataset(tmp_path / "data", clean_rows(12), clean_rows(3, 3000))
    found = check_dataset(folder, encoder)
    assert found.findings == ()
    assert found.ok
    assert found.to_json()["ok"] is True


def test_tokens_are_those_of_the_encoder(tmp_path, encoder):
    rows = clean_rows(7)
    found = check_dataset(write_dataset(tmp_path / "data", rows), encoder).to_json()["tokens"]
    lengths = [len(encoder.tokens(row)) for row in rows]
    assert found["max"] == max(lengths)
    assert found["total"] == sum(lengths)


def test_without_a_model_only_its_own_limits_are_missing(dataset):
    found = {(finding.code, finding.id) for finding in check_dataset(dataset[0]).findings}
    family = ("too_long", "image_too_small", "image_shrunk", "image_squeezed")
    needs_model = {pair for pair in dataset[1] if pair[0] in family}
    assert found >= dataset[1] - needs_model - {
        ("image_too_stretched", "thread"),
        ("control_token", "markup"),
    }
    assert not found.intersection(needs_model)


def test_different_formulas_are_not_duplicates(tmp_path):
    """Formula pictures are mostly white; a hash of brightness alone would call them all alike."""
    from vlmtune.data.prepare import PrepareOptions, prepare
    from vlmtune.formulas import write_formula_table

    table = write_formula_table(tmp_path / "formulas", 120, seed=4)
    prepare(table, tmp_path / "data", PrepareOptions(validation=20, workers=1))
    found = check_dataset(tmp_path / "data").findings
    assert [
        finding for finding in found if "duplicate" in finding.code or "leak" in finding.code
    ] == []


def test_real_formulas_are_not_duplicates(shared_data, tmp_path):
    from vlmtune.data.prepare import PrepareOptions, prepare

    options = PrepareOptions(validation=100, workers=1)
    prepare(shared_data / "latex_ocr" / "latex_ocr.csv", tmp_path / "data", options)
    assert check_dataset(tmp_path / "data").findings == ()


def test_thresholds(dataset, encoder):
    accepted = {code: 1.0 for code, _ in dataset[1]}
    assert check_dataset(dataset[0], encoder, max_length=400, limits=accepted).ok
    del accepted["leak"]
    assert not check_dataset(dataset[0], encoder, max_length=400, limits=accepted).ok
    assert parse_limits(["leak=2", "too_long=1%"]) == {"leak": 2, "too_long": 0.01}
    for wrong in ("leak", "leak=-1", "leek=1", "leak=x"):
        with pytest.raises(UsageError):
            parse_limits([wrong])


def test_exit_statuses(tmp_path):
    def status(name, rows):
        folder = write_dataset(tmp_path / name, rows)
        done = CliRunner().invoke(app, ["check", str(folder), "--json"])
        json.loads(done.stdout.splitlines()[-1])
        return done.exit_code

    assert status("clean", clean_rows(12)) == 0
    moving = saved(scene(4), "GIF", save_all=True, append_images=[scene(5)])
    assert status("note", [*clean_rows(12), sample("moving", moving)]) == 3
    outside = boxed("out", 17, Box(0, "it", (100, 50, 190, 100)))
    assert status("stop", [*clean_rows(12), outside]) == 4


def test_a_changed_file_is_refused(tmp_path):
    folder = write_dataset(tmp_path / "data", clean_rows(6))
    (file,) = (folder / "data").glob("*.parquet")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    done = CliRunner().invoke(app, ["check", str(folder)])
    assert done.exit_code == 4
    assert "changed" in done.stderr


class Page(HTMLParser):
    """Collects what a page would load or run."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.loads: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        for name, value in attrs:
            if name in ("src", "href") and not (value or "").startswith(("data:image/", "#")):
                self.loads.append(f"{name}={value}")
            assert not name.startswith("on"), name


def test_the_page_loads_and_runs_nothing(tmp_path, encoder):
    hostile = "<script>alert(1)</script><img src=x onerror=y>\u202e"
    rows = [*clean_rows(8), sample(hostile, saved(scene(7, (20, 20))), hostile, hostile)]
    folder = write_dataset(tmp_path / "data", rows)
    found = check_dataset(folder, encoder)
    write_check_page(tmp_path / "check.html", folder, found, "<u>model</u>")
    text = (tmp_path / "check.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    assert "image_too_small" in text
    assert page.loads == []
    assert not page.tags & {"script", "u", "iframe", "object", "form"}
    assert "\u202e" not in text


def test_every_code_has_words():
    for code in ("leak", "near_leak", "box_outside", "too_long"):
        assert code_of(code).meaning
        assert code_of(code).advice
