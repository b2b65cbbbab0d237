"""Hashes of weight files: which base an adapter was trained on, to the byte."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from vlmtune.errors import ModelError

BLOB = re.compile(r"^[0-9a-f]{64}$")
CONVERT = "python -m vlmtune.models.qwen_vl.convert"
MEMO = Path("~/.cache/vlmtune/sha256.json")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, in order.

    Raises:
        ModelError: If there are none; pickled weights are never read.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        found = f"only pickled weights ({', '.join(pickled[:3])})" if pickled else "no weights"
        raise ModelError(
            f"{folder} holds {found}; expected *.safetensors. vlmtune never unpickles weights"
            + (f". To convert them once: {CONVERT} {folder} OUT" if pickled else "")
        )
    return files


def weights_sha256(folder: Path) -> str:
    """One sha256 over the names and hashes of a folder's weight files.

    A file of the hub's cache is named by its hash already; any other is read once and remembered by
    path, size and time.
    """
    total = hashlib.sha256()
    for path in weight_files(folder):
        total.update(f"{path.name}:{file_sha256(path)}\n".encode())
    return total.hexdigest()


def file_sha256(path: Path) -> str:
    """Sha256 of a file, remembered between calls."""
    target = path.resolve()
    if target.parent.name == "blobs" and BLOB.match(target.name):
        return target.name
    status = target.stat()
    key = f"{target}|{status.st_size}|{status.st_mtime_ns}"
    memo = _read_memo()
    if key not in memo:
        with target.open("rb") as stream:
            memo[key] = hashlib.file_digest(stream, "sha256").hexdigest()
        _write_memo(memo)
    return memo[key]


def _read_memo() -> dict[str, str]:
    try:
        memo = json.loads(MEMO.expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return memo if isinstance(memo, dict) else {}


def _write_memo(memo: dict[str, str]) -> None:
    path = MEMO.expanduser()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(dict(list(memo.items())[-500:])), encoding="utf-8")
        temporary.replace(path)
    except OSError:
        return  # a memo that cannot be kept costs time, nothing else
