"""Many rows, several processes: the same bytes, every fault found, nothing left behind."""

from __future__ import annotations

import base64
import io
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image as Pillow

from vlmtune.data import work, workers
from vlmtune.data.prepare import PrepareOptions, prepare
from vlmtune.data.quarantine import read_quarantine
from vlmtune.data.records import Record
from vlmtune.data.sources import open_local
from vlmtune.data.work import Portion, Task
from vlmtune.errors import VlmtuneError

MakeTable = Callable[..., Path]
LEDGER = "quarantine.jsonl"
LARGE = PrepareOptions(max_bad=1e9, format="sharegpt", workers=1)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def saved(form: str = "PNG", size: tuple[int, int] = (24, 16), **options: Any) -> bytes:
    buffer = io.BytesIO()
    noise = random.Random(1).randbytes(size[0] * size[1] * 3)
    Pillow.frombytes("RGB", size, noise).save(buffer, form, **options)
    return buffer.getvalue()


def bomb() -> bytes:
    """A small PNG that would fill gigabytes."""
    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n"
    for body in (b"IHDR" + header, b"IDAT" + zlib.compress(b"\0" * 10_000), b"IEND"):
        data += struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    return data


# Planted faults


def turns(image: str, answer: Any = "yes", role: str = "assistant") -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": "<image>?"}, {"role": role, "content": answer}],
        "images": [image],
    }


ASK, SAY = {"role": "user", "content": "?"}, {"role": "assistant", "content": "yes"}
# Faults by name: a row, or a line's bytes, and the code that it must get.
KINDS: dict[str, tuple[Any, str]] = {
    "no such file": (turns("none.png"), "image_missing"),
    "NUL in a path": (turns("a\0b.png"), "image_missing"),
    "path too long": (turns("n" * 5000), "image_missing"),
    "empty file": (turns("empty.png"), "image_empty"),
    "a page of HTML": (turns("html.jpg"), "image_not_an_image"),
    "noise": (turns("noise.png"), "image_not_an_image"),
    "cut PNG": (turns("cut.png"), "image_truncated"),
    "cut JPEG": (turns("cut.jpg"), "image_truncated"),
    "bomb": (turns("bomb.png"), "image_too_large"),
    "thread": (turns("thread.png"), "image_too_stretched"),
    "parent": (turns("../secret.png"), "path_outside"),
    "absolute": (turns("/etc/passwd"), "path_outside"),
    "link outside": (turns("link.png"), "path_outside"),
    "device": (turns("zero.png"), "path_outside"),
    "pipe": (turns("pipe.png"), "not_a_file"),
    "folder": (turns("."), "not_a_file"),
    "URL": (turns("https://x.org/a.png"), "url_not_allowed"),
    "data URL": (turns("data:image/png;base64,@@@"), "bad_data_url"),
    "data URL of noise": (turns("data:image/png;base64,QUJD"), "image_not_an_image"),
    "empty answer": (turns("good.png", " \n"), "empty_answer"),
    "answer is a number": (turns("good.png", 3), "missing_field"),
    "unknown role": (turns("good.png", "yes", "robot"), "bad_role"),
    "no answer": ({"messages": [ASK]}, "no_answer"),
    "two answers": ({"messages": [ASK, SAY, SAY]}, "role_order"),
    "no messages": ({"text": "yes"}, "missing_field"),
    "image too many": ({**turns("good.png"), "images": ["good.png"] * 2}, "image_mismatch"),
    "video": ({**turns("good.png"), "videos": ["a.mp4"]}, "media_unsupported"),
    "half a character": (turns("good.png", "\ud83d"), "bad_text"),
    "id again": ({"id": "the first", **turns("good.png")}, "duplicate_id"),
    "not JSON": (b'{"messages": [', "bad_json"),
    "not UTF-8": (b'{"messages": "\xe9"}', "bad_json"),
    "a list": (b"[1, 2]", "bad_row"),
    "too deep": (b'{"a": ' + b"[" * 200 + b"]" * 200 + b"}", "bad_row"),
}


def write_files(folder: Path) -> None:
    (folder / "good.png").write_bytes(saved())
    good = saved()
    files = {
        "empty.png": b"",
        "html.jpg": b"<html>404</html>",
        "cut.png": good[: len(good) // 2],
        "cut.jpg": saved("JPEG", (200, 200))[:3000],
        "bomb.png": bomb(),
        "thread.png": saved(size=(3000, 2)),
        "noise.png": random.Random(2).randbytes(500),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (folder.parent / "secret.png").write_bytes(good)
    (folder / "link.png").symlink_to(folder.parent / "secret.png")
    (folder / "zero.png").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe.png")


def plant(folder: Path, copies: int) -> tuple[Path, dict[str, str]]:
    """A source with each fault ``copies`` times among good rows; where, and its code."""
    folder.mkdir()
    write_files(folder)
    lines: list[tuple[bytes, str]] = [
        (row if isinstance(row, bytes) else json.dumps(row).encode(), code)
        for row, code in KINDS.values()
    ] * copies
    lines += [
        (json.dumps(turns("good.png", f"answer {n}")).encode(), "") for n in range(len(lines))
    ]
    random.Random(5).shuffle(lines)
    first = {"id": "the first", **turns("good.png")}
    lines.insert(0, (json.dumps(first).encode(), ""))
    (folder / "rows.jsonl").write_bytes(b"\n".join(line for line, _ in lines) + b"\n")
    expected = {f"rows.jsonl:{n}": code for n, (_, code) in enumerate(lines, start=1) if code}
    return folder / "rows.jsonl", expected


def check_planted(tmp_path: Path, copies: int) -> None:
    source, expected = plant(tmp_path / "source", copies)
    assert len(expected) == len(KINDS) * copies
    result = prepare(source, tmp_path / "a", LARGE)
    found = {entry["source"]: entry["code"] for entry in read_quarantine(tmp_path / "a" / LEDGER)}
    assert found == expected
    assert result.quarantine == Counter(expected.values())
    assert result.rows.came_in == result.rows.kept + result.rows.quarantined
    assert result.rows.kept == len(expected) + 1
    prepare(source, tmp_path / "b", LARGE)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    whole = b"".join(tree(tmp_path / "a").values())
    assert b"root:" not in whole


def test_planted_faults(tmp_path: Path) -> None:
    assert len(KINDS) >= 25
    check_planted(tmp_path, 4)


@pytest.mark.slow
def test_planted_faults_forty_times(tmp_path: Path) -> None:
    check_planted(tmp_path, 40)


def test_planted_faults_in_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, _ = plant(tmp_path / "source", 4)
    prepare(source, tmp_path / "alone", LARGE)
    monkeypatch.setattr(workers, "SECONDS_ALONE", 0.0)
    for count in (3,):
        started = Counter[int]()
        monkeypatch.setattr(workers, "_Worker", counting(started, workers._Worker))
        prepare(source, tmp_path / f"{count}", LARGE.model_copy(update={"workers": count}))
        assert sum(started.values()) == count  # negative control: they did the work
        monkeypatch.undo()
        monkeypatch.setattr(workers, "SECONDS_ALONE", 0.0)
        assert tree(tmp_path / "alone") == tree(tmp_path / f"{count}")
    assert children() == []


def counting(started: Counter[int], kind: type) -> Callable[[Task], Any]:
    def make(task: Task) -> Any:
        started[0] += 1
        return kind(task)

    return make


def children() -> list[psutil.Process]:
    """Processes of ``prepare``; that which draws formulas for the metrics stays for the session."""
    return [
        child
        for child in psutil.Process().children()
        if child.status() != "zombie" and "rendering" not in " ".join(child.cmdline())
    ]


def test_small_results_are_handed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, _ = plant(tmp_path / "source", 1)
    prepare(source, tmp_path / "a", LARGE)
    for name in ("BYTES_PER_RESULT", "BYTES_PER_PORTION", "ROWS_PER_PORTION"):
        monkeypatch.setattr(work, name, 1)
        prepare(source, tmp_path / name, LARGE)
        assert tree(tmp_path / "a") == tree(tmp_path / name)


# Processes that die


def test_a_worker_that_dies_is_named(
    make_table: MakeTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "SECONDS_ALONE", 0.0)
    table = make_table(300)

    def kill(done: int, _total: object) -> None:
        if done == 40:
            children()[0].kill()

    with pytest.raises(workers.WorkerDiedError) as caught:
        prepare(table, tmp_path / "made/out", PrepareOptions(workers=2), progress=kill)
    assert "signal 9" in str(caught.value)
    assert "table.csv:" in str(caught.value)
    assert caught.value.exit_status == 1
    assert children() == []
    assert list((tmp_path / "made").iterdir()) == []


def test_a_defect_in_a_worker_is_told(make_table: MakeTable) -> None:
    options = PrepareOptions()
    records = list(open_local(make_table(3)).records)
    task = Task("table", [records[0].fields], options)
    with workers._Worker(task) as worker:
        worker.send(Portion(1, [Record("x:1", None, None)]))  # type: ignore[arg-type]
        with pytest.raises(RuntimeError, match="AttributeError"):
            list(worker.next_worked())
    assert children() == []


def test_an_interrupt_leaves_no_process(
    make_table: MakeTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "SECONDS_ALONE", 0.0)

    def stop(done: int, _total: object) -> None:
        if done == 100:
            assert len(children()) == 2
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(make_table(300), tmp_path / "out", PrepareOptions(workers=2), progress=stop)
    assert children() == []


CHILD = """
import sys
from vlmtune.data import workers
from vlmtune.data.prepare import PrepareOptions, prepare
workers.SECONDS_ALONE = 0.0
prepare(sys.argv[1], sys.argv[2], PrepareOptions(workers=2, limit=int(sys.argv[3])))
"""


def many(make_table: MakeTable, rows: int) -> Path:
    table = make_table(50)
    with table.open("a") as file:
        file.writelines(f"images/{n % 50}.png,text {n}\n" for n in range(50, rows))
    return table


@pytest.mark.faults
def test_killed_at_any_moment(make_table: MakeTable, tmp_path: Path) -> None:
    table, out = many(make_table, 6000), tmp_path / "made/out"
    (tmp_path / "made").mkdir()
    seconds = random.Random(3)
    killed = 0
    for _ in range(20):
        command = [sys.executable, "-c", CHILD, str(table), str(out), "6000"]
        process = psutil.Popen(command)
        time.sleep(seconds.uniform(0.2, 2.5))
        family = [process, *process.children(recursive=True)]
        process.kill()
        killed += process.wait() == -signal.SIGKILL
        _, alive = psutil.wait_procs(family, timeout=5)
        assert alive == []  # workers end with the process that started them
        assert {path.name for path in out.parent.iterdir()} <= {".out.partial", "out"}
        if out.exists():
            assert prepare(table, out, PrepareOptions(limit=6000)).already_made
            shutil.rmtree(out)
    assert killed > 5
    assert prepare(table, out, PrepareOptions(limit=6000)).rows.kept == 6000
    assert [path.name for path in out.parent.iterdir()] == ["out"]


# The ledger


def test_the_ledger_holds_no_megabytes(tmp_path: Path) -> None:
    data = base64.b64encode(random.Random(1).randbytes(3_000_000)).decode()
    rows = [
        turns(f"data:image/png;base64,{data}"),
        {**turns("none.png"), "id": data, "blob": {"deep": [data] * 3}, "list": list(range(9999))},
        turns("none.png", data),
        turns(data),
    ]
    text = "\n".join([*map(json.dumps, rows), '{"x": "' + data])
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(VlmtuneError):
        prepare(tmp_path / "rows.jsonl", tmp_path / "out", LARGE)
    ledger = tmp_path / "out" / LEDGER
    assert ledger.stat().st_size < 30_000
    entries = read_quarantine(ledger)
    assert len(entries) == 5
    assert entries[0]["row"]["images"][0]["characters"] == len(data) + 22
    assert len(entries[0]["row"]["images"][0]["sha256"]) == 64
    assert entries[1]["row"]["list"][-1] == "… and 9,799 more"


def test_a_worker_imports_nothing_from_the_working_folder(tmp_path: Path) -> None:
    """A dataset may hold a ``json.py``: only what the caller would import is imported."""
    (tmp_path / "json.py").write_text("raise SystemExit('imported')")
    task = Task("table", [{"image": b"x", "text": "x"}], PrepareOptions())
    code = (
        "import sys; sys.path = [path for path in sys.path if path]\n"
        "from vlmtune.data import workers; from vlmtune.data.options import PrepareOptions\n"
        f"from vlmtune.data.work import Portion, Task\n"
        f"with workers._Worker({task!r}) as worker:\n"
        "    worker.send(Portion(1, [])); print(len(list(worker.next_worked())))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr
