"""Files, globs, Arrow, URLs, and paths that must not lead anywhere else."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from vlmtune.data import work
from vlmtune.data.files import ImageFiles
from vlmtune.data.prepare import PrepareOptions, prepare
from vlmtune.data.quarantine import HINTS, read_quarantine
from vlmtune.data.records import FieldError
from vlmtune.data.sources import Record, open_local
from vlmtune.errors import FetchError, FormatError, UsageError

MakeTable = Callable[..., Path]


def records(source: Path) -> list[Record]:
    return list(open_local(source).records)


def test_a_glob(make_table: MakeTable, tmp_path: Path) -> None:
    folder = make_table(4).parent
    for part in ("a", "b"):
        (folder / part).mkdir()
        row = {"image": f"../images/{'ab'.index(part)}.png", "text": part}
        (folder / part / "rows.jsonl").write_text(json.dumps(row) + "\n")
    found = records(folder / "*" / "rows.jsonl")
    assert [record.where for record in found] == ["a/rows.jsonl:1", "b/rows.jsonl:1"]
    assert [record.base for record in found] == [folder / "a", folder / "b"]
    assert len(records(folder / "**" / "*.jsonl")) == 2
    (folder / "c.jsonl").write_text("{}\n")
    assert [record.where for record in records(folder / "[c-z].jsonl")] == ["c.jsonl:1"]
    with pytest.raises(UsageError, match=r"no file matches .*nothing-\*\.jsonl.*in quotes"):
        records(folder / "nothing-*.jsonl")
    with pytest.raises(FormatError, match=r"ending '\.png'"):
        records(folder / "images" / "*.png")
    # A relative path starts from its own file's folder and may not leave it.
    result = prepare(
        folder / "?" / "rows.jsonl", tmp_path / "out", PrepareOptions(images_root=str(folder))
    )
    assert result.rows.kept == 2


@pytest.mark.parametrize("kind", ["file", "stream"])
def test_arrow(tmp_path: Path, make_table: MakeTable, kind: str) -> None:
    image = (make_table(1).parent / "images/0.png").read_bytes()
    rows = [{"image": {"bytes": image, "path": None}, "text": f"t{n}"} for n in range(50)]
    table = pa.Table.from_pylist(rows)
    path = tmp_path / ("a.feather" if kind == "file" else "a.arrow")
    with (pa.ipc.new_file if kind == "file" else pa.ipc.new_stream)(path, table.schema) as out:
        out.write_table(table, max_chunksize=20)
    found = records(path)
    assert [record.fields["text"] for record in found] == [f"t{n}" for n in range(50)]
    assert found[-1].where == f"{path.name}:50"
    assert prepare(path, tmp_path / "out").rows.kept == 50
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(FormatError, match=r"not readable as Arrow"):
        records(path)
    path.write_bytes(b"nothing")
    with pytest.raises(FormatError, match=r"row 1 .*not readable as Arrow"):
        records(path)


def test_arrow_offsets_that_lead_elsewhere(tmp_path: Path) -> None:
    table = pa.table({"text": ["a", "bc"]})
    path = tmp_path / "a.arrow"
    with pa.ipc.new_stream(path, table.schema) as out:
        out.write_table(table)
    assert len(records(path)) == 2
    good, bad = struct.pack("<3i", 0, 1, 3), struct.pack("<3i", 0, 1 << 30, 3)
    assert path.read_bytes().count(good) == 1
    path.write_bytes(path.read_bytes().replace(good, bad))
    with pytest.raises(FormatError, match="not readable as Arrow"):
        records(path)


def test_what_datasets_saved(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"image": "a.png", "text": f"t{n}"} for n in range(5)]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved", num_shards=2)
    found = records(tmp_path / "saved")
    assert [record.fields["text"] for record in found] == [f"t{n}" for n in range(5)]


def test_classes_come_by_name_and_links_are_not_entered(tmp_path: Path) -> None:
    folder = tmp_path / "animals"
    for name in ("dog/2.png", "dog/1.png", "cat/b/1.png", "cat/a.png", "cat.x/1.png", "bee/.h.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/secret.png").write_bytes(CANARY)
    (folder / "dog/link").symlink_to(tmp_path / "out")
    names = ["cat/a.png", "cat/b/1.png", "cat.x/1.png", "dog/1.png", "dog/2.png"]
    assert [record.where for record in records(folder)] == names
    assert open_local(folder).total == len(names)


def test_json_that_nests_too_deep(tmp_path: Path) -> None:
    deep = "[" * 300 + "]" * 300
    (tmp_path / "a.jsonl").write_text(f'{{"a": 1}}\n{{"a": {deep}}}\n{{"a": [[[1]]]}}\n')
    found = records(tmp_path / "a.jsonl")
    assert [record.fault is None for record in found] == [True, False, True]


def test_a_line_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmtune.data.tables.MAX_LINE_BYTES", 100)
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"a": "' + "x" * 5000 + '"}\n{"a": 2}\n')
    found = records(tmp_path / "a.jsonl")
    assert [record.where for record in found] == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3"]
    assert [record.fault and record.fault.code for record in found] == [None, "bad_json", None]


# URLs


def rows_with_urls(tmp_path: Path, *urls: str) -> Path:
    path = tmp_path / "u.jsonl"
    path.write_text("".join(json.dumps({"image": url, "text": "x"}) + "\n" for url in urls))
    return path


def test_urls_are_opened_only_when_asked(
    make_table: MakeTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = (make_table(1).parent / "images/0.png").read_bytes()
    asked: list[str] = []

    def fetch(url: str) -> bytes:
        asked.append(url)
        code = url.rsplit("/", 1)[-1]
        if code.startswith("once") and asked.count(url) == 1:
            raise FetchError("url_timeout", "late")
        if code.startswith("url_"):
            raise FetchError(code, f"no: {code}")
        return image

    monkeypatch.setattr(work, "fetch_image_bytes", fetch)
    codes = ["url_timeout", "url_unreachable", "url_too_large", "url_bad_answer", "url_not_allowed"]
    urls = [f"https://user:secret@x.org/?key=secret&/{name}" for name in ("good", "once", *codes)]
    source = rows_with_urls(tmp_path, *urls, "file:///etc/passwd", "ftp://x.org/a.png")
    result = prepare(source, tmp_path / "yes", PrepareOptions(allow_urls=True, max_bad=9))
    assert result.rows.kept == 2
    assert result.quarantine == dict.fromkeys(sorted(codes), 1) | {"url_not_allowed": 3}
    assert [asked.count(url) for url in urls] == [1, 2, 3, 1, 1, 1, 1]
    entries = read_quarantine(tmp_path / "yes/quarantine.jsonl")
    assert all(entry["hint"] == HINTS[entry["code"]] for entry in entries)
    assert "secret" not in (tmp_path / "yes/quarantine.jsonl").read_text()
    assert entries[0]["row"]["image"] == "https://x.org/"
    asked.clear()
    with pytest.raises(Exception, match="url_not_allowed 9"):
        prepare(source, tmp_path / "no", PrepareOptions(max_bad=8))
    assert asked == []
    assert "--allow-urls" in read_quarantine(tmp_path / "no/quarantine.jsonl")[0]["message"]


# Paths

CANARY = b"canary that no dataset may hold"
PIECES = st.sampled_from(
    ["a", "b", "self", "in.png", "x.png", ".", ".."] * 4
    + [
        "..",
        ".",
        "a",
        "b",
        "link",
        "loop",
        "out",
        "in.png",
        "root_evil",
        "x.png",
        "A",
        "%2e%2e",
        "\\",
    ]
    + [
        "..\\..",
        " ",
        "é",
        "e\u0301",
        "~",
        "$HOME",
        "c.png",
        "secret",
        "self",
        "a" * 300,
        "\0",
        "：",
    ]
)
PATHS = st.builds(
    lambda start, pieces, joint: start + joint.join(pieces),
    st.sampled_from(["", "", "", "/", "./", "//", "ROOT/", "ROOT/../", "OUT/"]),
    st.lists(PIECES, min_size=1, max_size=7),
    st.sampled_from(["/", "/", "//", "/./"]),
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``root`` may be read; everything beside it holds the canary."""
    top = Path(os.path.realpath(tmp_path_factory.mktemp("world")))
    root = top / "root"
    (root / "a/b").mkdir(parents=True)
    (top / "out/a").mkdir(parents=True)
    (top / "root_evil").mkdir()
    for folder in (top, top / "out", top / "out/a", top / "root_evil"):
        for name in ("x.png", "in.png", "c.png", "secret"):
            (folder / name).write_bytes(CANARY)
    for folder in (root, root / "a", root / "a/b"):
        for name in ("x.png", "in.png", "é"):
            (folder / name).write_bytes(b"allowed")
    (root / "c.png").symlink_to(top / "secret")
    (root / "secret").symlink_to("../out/secret")
    (root / "link").symlink_to(top / "out")
    (root / "self").symlink_to("a")
    (root / "a/loop").symlink_to("loop")
    (root / "out").symlink_to("..")
    return top


def oracle(text: str, root: Path) -> str:
    """What reading ``text`` must give, said with pathlib alone."""
    if "\0" in text:
        return "image_missing"
    try:
        path = (root / text).resolve()
    except RuntimeError:  # a loop of links
        return "outside or missing"
    except OSError:
        return "outside or missing"
    if not path.is_relative_to(root):
        return "path_outside"
    try:
        return "read" if path.is_file() else "missing or not a file"
    except OSError:
        return "missing or not a file"


MEANS = {
    "read": ("read",),
    "image_missing": ("image_missing",),
    "path_outside": ("path_outside",),
    "missing or not a file": ("image_missing", "not_a_file"),
    "outside or missing": ("path_outside", "image_missing", "not_a_file"),
}


def agrees(text: str, world: Path) -> None:
    root = world / "root"
    text = text.replace("ROOT", str(root)).replace("OUT", str(world / "out"))
    try:
        data = ImageFiles(None).read(text, root, "image").data
        found = "read"
        assert data == b"allowed", text
    except FieldError as fault:
        found = fault.code
        hinted = "--images-root" in str(fault)
    assert found != "path_outside" or hinted
    expected = oracle(text, root)
    if not text.strip():
        assert found == "missing_field"
    else:
        assert found in MEANS[expected], (text, found, expected)


def check_paths(world: Path, count: int) -> None:
    seen: dict[str, int] = {}

    @settings(
        max_examples=count,
        deadline=1000,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @example("../out/x.png")
    @example("out/out/x.png")
    @example("self/in.png")
    @given(PATHS)
    def check(text: str) -> None:
        agrees(text, world)
        kind = oracle(text.replace("ROOT", str(world / "root")), world / "root")
        seen[kind] = seen.get(kind, 0) + 1

    check()
    assert min(seen.get(kind, 0) for kind in ("read", "path_outside", "image_missing")) > 5, seen


def test_paths_do_what_pathlib_says(world: Path) -> None:
    check_paths(world, 500)


@pytest.mark.slow
def test_ten_thousand_paths(world: Path) -> None:
    check_paths(world, 10_000)


def test_the_oracle_would_see_a_reader_that_follows(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: judged by its text alone, a path gets out through a link."""
    path = SimpleNamespace(**{**vars(os.path), "realpath": os.path.normpath})
    monkeypatch.setattr("vlmtune.data.files.os", SimpleNamespace(**{**vars(os), "path": path}))
    for text in ("c.png", "secret"):
        with pytest.raises(AssertionError):
            agrees(text, world)


def test_a_folder_that_becomes_a_link_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("root/a", "out"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "x.png").write_bytes(CANARY if name == "out" else b"allowed")
    files, root, opened = ImageFiles(None), tmp_path / "root", os.open
    assert files.read("a/x.png", root, "image").data == b"allowed"

    def swap(path: object, *rest: int) -> int:
        (root / "a").rename(root / "b")
        (root / "a").symlink_to(tmp_path / "out")
        return opened(path, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr("vlmtune.data.files.os.open", swap)
    with pytest.raises(FieldError, match="replaced while it was read"):
        files.read("a/x.png", root, "image")
