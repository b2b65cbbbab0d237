"""Damaged pictures and slips of the pen: each row is kept or quarantined, none takes a second."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as Pillow

import planted
from vlmtune.data import work
from vlmtune.data.options import PrepareOptions
from vlmtune.data.records import Record
from vlmtune.data.sources import open_local
from vlmtune.data.work import Portion, RowWork, Task
from vlmtune.errors import FormatError


def saved(form: str = "PNG", size: tuple[int, int] = (24, 16), **options: Any) -> bytes:
    return planted.saved(planted.scene(1, size), form, **options).data


def mutated(content: bytes, seed: int) -> bytes:
    chance = random.Random(seed)
    data = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 5, 20))):
        place = chance.randrange(len(data)) if data else 0
        match chance.randrange(6):
            case 0:
                data[place : place + 1] = bytes([chance.randrange(256)])
            case 1:
                data[place : place + 1] = bytes([(data[place] ^ (1 << chance.randrange(8)))])
            case 2:
                del data[place : place + chance.randrange(1, 60)]
            case 3:
                data[place:place] = chance.randbytes(chance.randrange(1, 9))
            case 4:
                del data[place:]
            case 5:
                data[place:place] = data[place : place + chance.randrange(1, 60)]
        if not data:
            break
    return bytes(data)


def mistyped(content: bytes, seed: int) -> bytes:
    """A text with a slip of the pen or two: still UTF-8, mostly still of its form."""
    chance = random.Random(seed)
    text = content.decode()
    for _ in range(chance.choice((1, 1, 2))):
        place = chance.randrange(len(text) - 2)
        sign = chance.choice("abc019 \t<>()[]{}|/\\.:;'é图\u202e\x00\"")
        text = text[:place] + chance.choice(("", sign, sign * 9)) + text[place + 1 :]
    return text.encode()


ODD: list[Any] = [None, True, -1, 0.5, 1e308, float("nan"), 10**40, "", " ", "x", "\ud800", "\x00"]
ODD += [
    [],
    {},
    [[]],
    [None],
    {"a": 1},
    "<image>",
    "<box>(",
    "<img>",
    "../x",
    "good.png" * 99,
    ["x"],
]


def with_odd_values(row: Any, seed: int) -> bytes:
    """A row in which a value or two are something else."""
    chance = random.Random(seed)
    row = json.loads(json.dumps(row))
    for _ in range(chance.choice((1, 1, 2))):
        here = row
        while True:
            key = chance.choice(list(here) if isinstance(here, dict) else range(len(here)))
            if isinstance(here[key], dict | list) and here[key] and chance.random() < 0.8:
                here = here[key]
                continue
            here[key] = chance.choice(ODD)
            break
    return json.dumps(row).encode()


def outcomes(task: Task, records: Iterator[Record]) -> Counter[str]:
    """What becomes of each row, none of which may take a second."""
    done, counted = RowWork(task), Counter[str]()
    for number, record in enumerate(records, start=1):
        started = time.process_time()
        found = [
            each for result in done.results(Portion(number, [record])) for each in result.outcomes
        ]
        assert time.process_time() - started < 1, record.where
        assert len(found) == 1
        counted[found[0].code if isinstance(found[0], work.Refused) else "kept"] += 1
    return counted


def check_images(count: int) -> None:
    exif = Pillow.Exif()
    exif[0x0112] = 6
    seeds = [
        saved(),
        saved("JPEG", (64, 48), exif=exif),
        saved("JPEG", (64, 48), progressive=True),
        saved("GIF"),
        saved("WEBP"),
        saved("BMP"),
        saved("TIFF", compression="tiff_lzw"),
        saved("TIFF"),
        saved("PPM"),
        saved("JPEG2000"),
    ]
    rows = (
        Record(f"x:{n}", {"image": mutated(seeds[n % len(seeds)], n), "text": "x"}, None)
        for n in range(count)
    )
    counted = outcomes(Task("table", [{"image": b"x", "text": "x"}], PrepareOptions()), rows)
    assert counted.total() == count
    assert counted["kept"] > count / 50
    assert len(counted) > 3, counted


def test_mutated_images() -> None:
    check_images(300)


@pytest.mark.slow
def test_ten_thousand_mutated_images() -> None:
    check_images(10_000)


def check_json(folder: Path, count: int) -> None:
    (folder / "good.png").write_bytes(saved())
    (folder / "images").mkdir()
    box = "<ref>x</ref><box>(1,2),(3,4)</box>"
    talk = [{"from": "user", "value": "Picture 1: <img>good.png</img>\n?"}]
    rows = {
        "sharegpt": {
            "messages": [
                {"role": "user", "content": "<image>?"},
                {"role": "assistant", "content": "yes"},
            ],
            "images": ["good.png"],
        },
        "table": {"id": 1, "image": "good.png", "text": "x", "answers": ["a", "b"]},
        "qwen-vl": {"conversations": [*talk, {"from": "assistant", "value": box}]},
        "openai": {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": "good.png"}}],
                },
                {"role": "assistant", "content": "yes"},
            ]
        },
        "ms-swift": {
            "query": "<image>?",
            "response": "<bbox>",
            "images": ["good.png"],
            "objects": {"bbox": [[1, 2, 3, 4]], "ref": []},
        },
        "coco": {
            "file_name": "good.png",
            "annotations": [{"id": 1, "bbox": [1, 2, 3, 4], "category": "x"}],
        },
    }
    for name, row in rows.items():
        lines = [json.dumps(row).encode()]
        third = range(count // len(rows) // 3)
        lines += [mutated(lines[0], n) for n in third]
        lines += [mistyped(lines[0], n) for n in third]
        lines += [with_odd_values(row, n) for n in third]
        (folder / "rows.jsonl").write_bytes(b"\n".join(lines))
        expected = sum(bool(line.strip()) for line in b"\n".join(lines).split(b"\n"))
        task = Task(name, [row], PrepareOptions())
        counted = outcomes(task, open_local(folder / "rows.jsonl").records)
        assert counted.total() == expected
        assert counted["kept"] > 1, (name, counted)
        assert len(counted) > 3, (name, counted)


def test_mutated_json(tmp_path: Path) -> None:
    check_json(tmp_path, 300)


@pytest.mark.slow
def test_ten_thousand_mutated_json_rows(tmp_path: Path) -> None:
    check_json(tmp_path, 10_000)


def check_csv(folder: Path, count: int) -> None:
    """A row is kept or quarantined, or the file is refused with the line named."""
    (folder / "good.png").write_bytes(saved())
    task = Task("table", [{"image": "good.png", "text": "x"}], PrepareOptions())
    row = b'good.png,"a text, with ""quotes"""\r\n'
    taken = refused = 0
    for seed in range(count):
        slip = mutated if seed % 3 == 0 else mistyped
        (folder / "t.csv").write_bytes(b"image,text\r\n" + row + slip(row, seed) + row)
        try:
            counted = outcomes(task, open_local(folder / "t.csv").records)
        except FormatError as fault:
            refused += "t.csv:" in str(fault)
            continue
        # Lost quotes may join the bad row and the one after it to one row; the first stays apart.
        assert counted["kept"] >= 1
        assert counted.total() >= 2
        taken += 1
    assert taken + refused == count
    assert taken > count / 2
    assert refused


def test_mutated_csv(tmp_path: Path) -> None:
    check_csv(tmp_path, 300)


@pytest.mark.slow
def test_ten_thousand_mutated_csv_rows(tmp_path: Path) -> None:
    check_csv(tmp_path, 10_000)
