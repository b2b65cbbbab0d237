"""Tar shards: what becomes a row, what is refused, and that nothing ever reaches the disk."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path

import pytest

from vlmtune.data import shards
from vlmtune.data.prepare import PrepareOptions, prepare
from vlmtune.data.quarantine import read_quarantine
from vlmtune.data.shards import ArchiveError
from vlmtune.data.sources import Record, open_local
from vlmtune.errors import FormatError

PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b55"
    "0000000a49444154789c63600000000200014821bc330000000049454e44ae426082"
)


def member(name: str, data: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


def write(path: Path, members: list[tuple[tarfile.TarInfo, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return path


def pairs(count: int, start: int = 0) -> list[tuple[tarfile.TarInfo, bytes]]:
    return [
        each
        for number in range(start, start + count)
        for each in (
            member(f"./s/{number:04}.png", PNG),
            member(f"./s/{number:04}.txt", f"text {number}\n".encode()),
        )
    ]


def records(path: Path) -> list[Record]:
    return list(open_local(path).records)


TARS = [("a.tar", "w"), ("a.tar.gz", "w:gz"), ("a.tgz", "w:gz")]


@pytest.mark.parametrize(("name", "mode"), TARS)
def test_a_shard(tmp_path: Path, name: str, mode: str) -> None:
    found = records(write(tmp_path / name, pairs(40), mode))
    assert len(found) == 40
    assert found[3].where == f"{name}:s/0003"
    assert found[3].base is None
    image = {"bytes": PNG, "path": "./s/0003.png"}
    assert found[3].fields == {"id": "a/s/0003", "text": "text 3", "image": image}


def test_shards_become_a_dataset(tmp_path: Path) -> None:
    write(tmp_path / "x-0.tar", pairs(3))
    write(tmp_path / "x-1.tar", pairs(3))  # the same keys in another shard
    result = prepare(tmp_path / "x-*.tar", tmp_path / "out", PrepareOptions())
    assert result.to_json()["rows"] == {"in": 6, "kept": 6, "quarantined": 0}
    assert prepare(tmp_path / "x-*.tar", tmp_path / "out").already_made


def test_members_by_kind(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "yes"}]
    llava = json.dumps({"id": "own", "image": "/etc/passwd", "conversations": turns}).encode()
    members = [
        member("a.0.png", PNG),
        member("a.1.png", PNG),
        member("a.cls", b"7"),
        member("a.json", b'{"n": 1}'),
        member("a.npy", b"not read"),
        member("a/.hidden.txt", b"x"),
        member("b.PNG", PNG),
        member("b.json", llava),
        member("c.json", b"{"),
        member("d.txt", b"\xff"),
        member("e.txt", b"1"),
        member("e.txt", b"2"),
        member("f.json", b"[" * 100 + b"]" * 100),
        member("g.json", b"3"),
    ]
    a, b, *bad = records(write(tmp_path / "k.tar", members))
    assert len(a.fields["images"]) == 2
    assert (a.fields["label"], a.fields["json"]) == ("7", {"n": 1})
    assert (b.fields["id"], b.fields["image"]["bytes"]) == ("own", PNG)
    codes = ["bad_json", "bad_text", "bad_row", "bad_row", "bad_row"]
    assert [record.fault and record.fault.code for record in bad] == codes


EVIL = {
    "..": member("../evil.png", PNG),
    "deep ..": member("a/../../evil.png", PNG),
    "absolute": member("/tmp/evil.png", PNG),
    "backslash": member("..\\evil.png", PNG),
    "drive": member("C:evil.png", PNG),
    "symlink": member("l.png", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    "hard link": member("l.png", type=tarfile.LNKTYPE, linkname="s/0000.png"),
    "device": member("l.png", type=tarfile.CHRTYPE, devmajor=1, devminor=5),
    "pipe": member("l.png", type=tarfile.FIFOTYPE),
    "long name": member("x" * 5000 + "/../../../evil.png", PNG),
}


@pytest.mark.parametrize("kind", EVIL)
def test_an_archive_that_tries_to_escape_is_refused(tmp_path: Path, kind: str) -> None:
    inside = tmp_path / "in"
    inside.mkdir()
    shard = write(inside / "a.tar", [*pairs(2), EVIL[kind], *pairs(2, 5)])
    with pytest.raises(ArchiveError, match="nothing of it was used") as caught:
        prepare(shard, tmp_path / "out")
    assert caught.value.exit_status == 4
    assert [path.name for path in tmp_path.rglob("*")] == ["in", "a.tar"]
    # Without that member it is taken.
    assert len(records(write(inside / "a.tar", [*pairs(2), *pairs(2, 5)]))) == 4


@pytest.mark.parametrize("cut", [100, 512, 700, 1024, 3 * 512, 4000, 10_000])
def test_a_shard_that_was_cut_short_is_refused(tmp_path: Path, cut: int) -> None:
    shard = write(tmp_path / "a.tar", pairs(12))
    content = shard.read_bytes()
    assert len(records(shard)) == 12
    shard.write_bytes(content[:cut])
    with pytest.raises(FormatError, match="damaged"):
        records(shard)


def test_a_damaged_header_is_no_silent_end(tmp_path: Path) -> None:
    shard = write(tmp_path / "a.tar", pairs(12))
    content = bytearray(shard.read_bytes())
    content[8 * 512 + 20] ^= 1  # in the name of the fifth member
    shard.write_bytes(content)
    with pytest.raises(FormatError, match="no end mark"):
        records(shard)
    shard.write_bytes(gzip.compress(bytes(content))[:-20])
    with pytest.raises(FormatError, match="damaged"):
        records(shard)
    shard.write_bytes(b"")
    with pytest.raises(FormatError, match="damaged"):
        records(shard)


def test_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = tmp_path / "bomb.tar.gz"
    write(bomb, [*pairs(1), member("big.txt", b"\0" * 4_000_000)], "w:gz")
    with pytest.raises(ArchiveError, match="100 times its size"):
        records(bomb)
    shard = write(tmp_path / "a.tar", pairs(5))
    monkeypatch.setattr(shards, "MAX_MEMBERS", 7)
    with pytest.raises(ArchiveError, match="more than 7 members"):
        records(shard)
    monkeypatch.setattr(shards, "MAX_MEMBERS", 10)
    assert len(records(shard)) == 5
    monkeypatch.setattr(shards, "MAX_MEMBER_BYTES", 1000)
    with pytest.raises(ArchiveError, match="has 1,001 bytes"):
        records(write(tmp_path / "b.tar", [member("a.png", b"x" * 1001)]))
    # A header may not ask for gigabytes of memory either: a long name is data of a member.
    long = member("x" * 3000, b"")
    with pytest.raises(ArchiveError, match="asks for"):
        records(write(tmp_path / "c.tar", [long]))
    monkeypatch.setattr(shards, "MAX_SAMPLE_MEMBERS", 1)
    (record,) = records(write(tmp_path / "d.tar", pairs(1)))
    assert record.fault is not None
    assert "too many" in record.fault.message


def test_a_path_in_the_json_of_a_shard_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(PNG)
    rows = [
        member(f"{n}.json", json.dumps({"image": path, "text": "x"}).encode())
        for n, path in enumerate(["secret.png", str(tmp_path / "secret.png")])
    ]
    write(tmp_path / "a.tar", [*rows, member("2.json", b'{"text": "y"}'), member("2.png", PNG)])
    result = prepare(tmp_path / "a.tar", tmp_path / "out", PrepareOptions(max_bad=2))
    assert result.quarantine == {"path_outside": 2}
    codes = [entry["code"] for entry in read_quarantine(tmp_path / "out/quarantine.jsonl")]
    assert codes == ["path_outside"] * 2
