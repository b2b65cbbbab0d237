"""Reads the image files that a row names, and no others."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmtune.data.conversation import EncodedImage
from vlmtune.data.records import FieldError

MAX_FILE_BYTES = 256 * 2**20


class ImageFiles:
    """Image files below allowed folders.

    A path is judged by where it leads after ``..`` and symbolic links are followed, not by how it
    is written. Absolute paths are legal where they lead below an allowed folder.

    Args:
        root: ``--images-root``: allowed, and tried first for relative paths.
    """

    def __init__(self, root: str | Path | None) -> None:
        self._root = None if root is None else Path(os.path.realpath(root))
        self._real: dict[Path, Path] = {}

    def read(self, value: Any, base: Path | None, field: str) -> EncodedImage:
        """The image that a row gives as bytes, a path, or a mapping of these.

        Args:
            value: What the row says.
            base: Folder of the row's file; None if it has none.
            field: Where in the row it stands, for the message.

        Raises:
            FieldError: ``missing_field``, ``url_not_allowed``, ``path_outside``, ``image_missing``,
                ``not_a_file``, ``image_too_large``.
        """
        path: Any = None
        if isinstance(value, Mapping):
            value, path = value.get("bytes"), value.get("path")
        if isinstance(value, bytes | bytearray):
            return EncodedImage(bytes(value), path if isinstance(path, str) else None)
        text = value if value is not None else path
        if not isinstance(text, str) or not text.strip():
            raise FieldError(
                "missing_field",
                f"{field!r} holds {type(text).__name__}, expected a path or an image's bytes",
                field=field,
                value=text,
            )
        try:
            return EncodedImage(self._read_path(text, base), text)
        except FieldError as fault:
            fault.field, fault.value = field, text
            raise

    def _read_path(self, text: str, base: Path | None) -> bytes:
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:(//|[^/\\])", text):
            raise FieldError(
                "url_not_allowed",
                f"{_short(text)} is a URL; prepare opens only http and https, and only with "
                "--allow-urls: say that, or download the images and name the files",
            )
        allowed = [self._resolved(folder) for folder in (self._root, base) if folder is not None]
        if not _can_be_a_name(text):
            raise FieldError("image_missing", f"{_short(text)} cannot be the name of a file")
        missing = None
        for folder in allowed:
            # strict=False: what does not exist is judged by its place all the same.
            path = Path(os.path.realpath(folder / text))
            if not any(path.is_relative_to(root) for root in allowed):
                continue
            try:
                return _read_regular(path)
            except FileNotFoundError:
                missing = path
        if missing is None:
            places = " and ".join(str(folder) for folder in allowed) or "any folder"
            raise FieldError(
                "path_outside",
                f"{_short(text)} leads outside {places}; if that is meant, allow its folder with "
                "--images-root DIR",
            )
        raise FieldError(
            "image_missing", f"there is no file {_short(str(missing))} (from {_short(text)})"
        )

    def _resolved(self, folder: Path) -> Path:
        if folder not in self._real:
            self._real[folder] = Path(os.path.realpath(folder))
        return self._real[folder]


def _read_regular(path: Path) -> bytes:
    """Read a regular file; never wait on a pipe, never read a device.

    Raises:
        FileNotFoundError: There is none.
        FieldError: It is not a regular file, too large, or unreadable.
    """
    try:
        # The path is resolved: a link that stands there now was put there since.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except FileNotFoundError:
        raise
    except OSError as wrong:
        if wrong.errno in (errno.ENOTDIR, errno.ENAMETOOLONG):
            raise FileNotFoundError(path) from None
        code = "not_a_file" if wrong.errno in (errno.ENXIO, errno.ELOOP) else "image_unreadable"
        raise FieldError(
            code, f"{_short(str(path))} cannot be opened: {os.strerror(wrong.errno or 0)}"
        ) from None
    try:
        if not _is_at(handle, path):
            raise FieldError("path_outside", f"{_short(str(path))} was replaced while it was read")
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise FieldError("not_a_file", f"{_short(str(path))} is no regular file")
        if status.st_size > MAX_FILE_BYTES:
            raise FieldError(
                "image_too_large",
                f"{_short(str(path))} has {status.st_size:,} bytes, more than {MAX_FILE_BYTES:,}",
            )
        with os.fdopen(handle, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(handle)


def _is_at(handle: int, path: Path) -> bool:
    """Whether an open file is the one at ``path``, where the system can tell.

    A folder on the way may have become a link after the path was judged.
    """
    try:
        return Path(f"/proc/self/fd/{handle}").readlink() == path
    except OSError:
        return True


def _can_be_a_name(text: str) -> bool:
    try:
        return "\0" not in text and len(text.encode("utf-8")) <= 4096
    except UnicodeEncodeError:
        return False


def _short(text: str) -> str:
    return repr(text if len(text) <= 200 else text[:200] + "…")
