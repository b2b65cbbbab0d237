"""Rows of WebDataset shards: tar files whose members belong together by the start of their names.

Nothing is ever written to disk, so that no name can lead anywhere; an archive that tries is not to
be trusted all the same and is refused as a whole, as is one with links, devices or sparse files.
"""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from vlmtune.data.layouts import IMAGE_ENDINGS
from vlmtune.data.records import Fault, Record
from vlmtune.data.tables import first_line, json_record
from vlmtune.errors import FormatError, RefusedError

# Limits of one shard. A plain tar is as large as what it holds; a compressed one need not be.
MAX_MEMBER_BYTES = 256 * 2**20
MAX_TEXT_BYTES = 16 * 2**20
MAX_MEMBERS = 10_000_000
MAX_RATIO = 100
MAX_SAMPLE_MEMBERS = 1000

TEXTS = {".txt": "text", ".cls": "label", ".caption": "text"}


class ArchiveError(RefusedError):
    """An archive that is dangerous, or larger than it may be."""

    code = "archive"


@dataclass(slots=True)
class _Sample:
    """The members of one key, as far as they are understood."""

    key: str
    where: str
    members: set[str] = field(default_factory=set)
    images: list[dict[str, Any]] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)
    json: Any = None
    fault: Fault | None = None
    bytes: int = 0


def read_tar(path: Path, name: str) -> Iterator[Record]:
    """Rows of a shard.

    Members with the same name up to the first dot are a row: ``0001.png`` and ``0001.txt``. Images
    become ``image`` (several: ``images``), ``.txt`` becomes ``text``, ``.cls`` becomes ``label``.
    The fields of a ``.json`` are the row's own; beside a ``.txt`` or ``.cls`` they stay under
    ``json`` (``--columns text=json.caption``). The row's id is ``SHARD/KEY`` unless the JSON has
    one. Other members, and hidden ones, are passed over.

    Raises:
        FormatError: It is damaged or cut short.
        ArchiveError: A name leads outside, a member is a link, device or sparse file, or a limit is
            passed.
    """
    shard = name.split(".tar")[0].removesuffix(".tgz")
    try:
        for sample in _samples(path, name):
            yield _record(sample, shard)
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, ValueError) as wrong:
        raise FormatError(
            f"{path} is damaged or no tar file: {first_line(wrong)}; copy or make it again"
        ) from None


def _samples(path: Path, name: str) -> Iterator[_Sample]:
    sample: _Sample | None = None
    for tar, member in _members(path):
        if not member.isfile():
            continue
        place = PurePosixPath(member.name)
        if place.name.startswith("."):
            continue
        stem, dot, ending = place.name.partition(".")
        key = str(place.with_name(stem))
        if sample is None or sample.key != key:
            if sample is not None:
                yield sample
            sample = _Sample(key, f"{name}:{key}")
        _take(tar, member, sample, (dot + ending).lower())
    if sample is not None:
        yield sample


def _members(path: Path) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """The members, each judged before it is given out."""
    with path.open("rb") as raw:
        compressed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        stream: Any = gzip.GzipFile(fileobj=raw) if compressed else raw
        limit = max(MAX_RATIO * path.stat().st_size, 2**20) if compressed else None
        reader = _Bounded(stream, limit, path)
        with tarfile.open(fileobj=reader, mode="r:", errorlevel=2) as tar:
            count = 0
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # else all headers stay in memory
                count += 1
                _judge(path, member, count)
                yield tar, member
            _require_end(path, reader.last, tar.offset)


def _judge(path: Path, member: tarfile.TarInfo, count: int) -> None:
    place = PurePosixPath(member.name.replace("\\", "/"))
    shown = ascii(member.name[:200])
    if count > MAX_MEMBERS:
        raise ArchiveError(f"{path} has more than {MAX_MEMBERS:,} members; make smaller shards")
    drive = len(member.name) > 1 and member.name[1] == ":"
    if place.is_absolute() or ".." in place.parts or "\0" in member.name or drive:
        raise ArchiveError(
            f"{path}: the member {shown} leads outside of the archive; nothing of it was used. "
            "Make the archive again with plain names"
        )
    if not (member.isfile() or member.isdir()) or member.issparse():
        raise ArchiveError(
            f"{path}: the member {shown} is a link, a device or a sparse file; nothing of it was "
            "used. Make the archive again with plain files"
        )
    if member.size > MAX_MEMBER_BYTES:
        raise ArchiveError(
            f"{path}: the member {shown} has {member.size:,} bytes, more than {MAX_MEMBER_BYTES:,}"
        )


def _require_end(path: Path, block: bytes, offset: int) -> None:
    """A tar ends with blocks of zeros; tarfile also stops, silently, where a header is damaged."""
    if len(block) < tarfile.BLOCKSIZE or block.strip(b"\0"):
        raise FormatError(
            f"{path} is damaged or was cut short near byte {offset:,}: it has no end mark; copy or "
            "make it again"
        )


class _Bounded(io.RawIOBase):
    """A file that may be read so far, and never much at once: headers name their own sizes.

    ``last`` is what was read last.
    """

    def __init__(self, file: Any, limit: int | None, path: Path) -> None:
        self._file, self._limit, self._path = file, limit, path
        self.last = b""

    def read(self, size: int = -1) -> bytes:
        if size < 0 or size > MAX_MEMBER_BYTES + tarfile.BLOCKSIZE:
            raise ArchiveError(f"{self._path}: a header asks for {size:,} bytes at once")
        data: bytes = self._file.read(size)
        self._check(self._file.tell())
        self.last = data
        return data

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_SET:
            self._check(offset)
        position: int = self._file.seek(offset, whence)
        return position

    def tell(self) -> int:
        position: int = self._file.tell()
        return position

    def _check(self, position: int) -> None:
        if self._limit is not None and position > self._limit:
            raise ArchiveError(
                f"{self._path} unpacks to more than {MAX_RATIO} times its size; pictures do not "
                "compress so well. Give the archive uncompressed if it is meant"
            )


def _take(tar: tarfile.TarFile, member: tarfile.TarInfo, sample: _Sample, ending: str) -> None:
    """Read a member into its sample, if it is of a kind that is understood."""
    last = "." + ending.rsplit(".", 1)[-1]
    is_image = last in IMAGE_ENDINGS
    if not is_image and last != ".json" and last not in TEXTS:
        return
    if ending in sample.members:
        sample.fault = Fault("bad_row", f"the shard has two members {member.name[:200]!a}")
        return
    sample.members.add(ending)
    sample.bytes += member.size
    if len(sample.members) > MAX_SAMPLE_MEMBERS or sample.bytes > MAX_MEMBER_BYTES:
        sample.images.clear()
        sample.fault = Fault(
            "bad_row",
            f"the members of {sample.key!r} are too many or have more than {MAX_MEMBER_BYTES:,} "
            "bytes together",
        )
        return
    if not is_image and member.size > MAX_TEXT_BYTES:
        sample.fault = Fault("bad_row", f"{member.name[:200]!a} has {member.size:,} bytes")
        return
    content = tar.extractfile(member)
    data = b"" if content is None else content.read()
    if is_image:
        sample.images.append({"bytes": data, "path": member.name})
        return
    try:
        text = data.decode("utf-8-sig")
        if last == ".json":
            sample.json = json.loads(text)
        else:
            sample.texts[TEXTS[last]] = text.removesuffix("\n")
    except (ValueError, RecursionError) as wrong:
        code = "bad_json" if last == ".json" else "bad_text"
        kind = "valid JSON" if last == ".json" else "UTF-8"
        sample.fault = Fault(code, f"{member.name[:200]!a} is not {kind}: {first_line(wrong)}")


def _record(sample: _Sample, shard: str) -> Record:
    fields: dict[str, Any] = {"id": f"{shard}/{sample.key}"}
    if sample.json is not None:
        inner = json_record(sample.where, sample.json, None)
        if inner.fault is not None:
            return inner
        if sample.texts:
            fields["json"] = inner.fields
        else:
            fields.update(inner.fields)
            for name in ("image", "images", "file_name", "image_path"):
                if sample.images:  # names of files that the members are
                    fields.pop(name, None)
    fields.update(sample.texts)
    if len(sample.images) == 1:
        fields["image"] = sample.images[0]
    elif sample.images:
        fields["images"] = sample.images
    return Record(sample.where, fields, None, sample.fault)
