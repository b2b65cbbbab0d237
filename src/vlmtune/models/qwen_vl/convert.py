"""The original's pickled weights to safetensors, without running what a pickle may hold.

The first releases of Qwen-VL are ``pytorch_model-*.bin``. They are read with torch's weights-only
unpickler, which makes tensors and refuses everything else, one file at a time:

    python -m vlmtune.models.qwen_vl.convert FOLDER OUT
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from vlmtune.errors import ModelError, UsageError, VlmtuneError
from vlmtune.files import sync, write_json
from vlmtune.models.folder import read_json

SINGLE = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"
# Weights in other formats, and code: neither is copied.
LEFT_OUT = (".bin", ".py", ".pyc", ".pt", ".pth", ".pkl", ".ckpt", ".h5", ".msgpack", ".onnx")


@dataclass(frozen=True)
class Conversion:
    """What was written.

    Attributes:
        path: The new folder.
        tensors: How many tensors.
        bytes: Their size.
        files: Names of the weight files.
        copied: Names of the files taken over as they are.
    """

    path: Path
    tensors: int
    bytes: int
    files: tuple[str, ...]
    copied: tuple[str, ...]


def convert_to_safetensors(
    folder: Path, out: Path, *, progress: Callable[[int, int], None] | None = None
) -> Conversion:
    """Write a folder with the same weights as safetensors, and everything beside them but code.

    Every tensor keeps its name, shape, dtype and bits, which is checked on what was written. The
    new folder appears at the end, by a rename.

    Args:
        folder: Holds ``pytorch_model.bin``, or ``pytorch_model.bin.index.json`` and its files.
        out: The folder to make; it must not exist, or be empty.
        progress: Called with the number of weight files written, and how many there are.

    Raises:
        UsageError: If ``out`` holds something.
        ModelError: If a weight file is missing, damaged, holds anything but tensors, or does not
            fit its index. Nothing is left behind.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is not empty; name a new folder for the converted model")
    shards = _shards(folder)
    out.parent.mkdir(parents=True, exist_ok=True)
    writing = out.parent / f".{out.name}.{os.getpid()}.writing"
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir()
    try:
        done = _write(folder, shards, writing, progress)
        for path in writing.iterdir():
            sync(path)
        if out.exists():
            out.rmdir()
        writing.rename(out)
        sync(out.parent)
    finally:
        shutil.rmtree(writing, ignore_errors=True)
    return Conversion(out, *done)


def _shards(folder: Path) -> dict[str, set[str] | None]:
    """Weight files and the names that each must hold; None where nothing says so."""
    if not (folder / INDEX).is_file():
        if not (folder / SINGLE).is_file():
            raise ModelError(
                f"{folder} holds no pickled weights; expected {SINGLE}, or {INDEX} and its files. "
                "A folder of *.safetensors needs no conversion"
            )
        return {SINGLE: None}
    placed = read_json(folder / INDEX).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise ModelError(f"{folder / INDEX} has no 'weight_map'; fetch the model again")
    shards: dict[str, set[str] | None] = {}
    for name in sorted(set(placed.values())):
        if Path(name).name != name or not (folder / name).is_file():
            raise ModelError(
                f"{folder / INDEX} names the weight file {name!r}, which is not in the folder; "
                "fetch the model again"
            )
        shards[name] = {tensor for tensor, file in placed.items() if file == name}
    return shards


def _write(
    folder: Path,
    shards: Mapping[str, set[str] | None],
    out: Path,
    progress: Callable[[int, int], None] | None,
) -> tuple[int, int, tuple[str, ...], tuple[str, ...]]:
    """Write weights, index and companions; returns the counts of a ``Conversion``."""
    placed: dict[str, str] = {}
    size = 0
    for number, (name, expected) in enumerate(shards.items(), start=1):
        tensors = _read(folder / name, expected)
        if twice := sorted(tensors.keys() & placed.keys()):
            raise ModelError(f"{folder / name} and another file both hold {twice[0]!r}")
        target = "model.safetensors"
        if len(shards) > 1:
            target = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(tensors, out / target, metadata={"format": "pt"})
        (out / target).chmod(0o644)
        _require_equal(tensors, out / target)
        placed |= dict.fromkeys(tensors, target)
        size += sum(tensor.nbytes for tensor in tensors.values())
        if progress is not None:
            progress(number, len(shards))
    if len(shards) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": placed}
        write_json(out / "model.safetensors.index.json", index)
    copied = tuple(sorted(path.name for path in _companions(folder)))
    for name in copied:
        shutil.copyfile(folder / name, out / name)
    return len(placed), size, tuple(sorted(set(placed.values()))), copied


def _read(path: Path, expected: set[str] | None) -> dict[str, Tensor]:
    """Tensors of a pickled file, each in memory of its own as safetensors wants it."""
    try:
        # Old files are no archives and cannot be mapped.
        mapped = zipfile.is_zipfile(path)
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).split(". ")[0].splitlines()[0]
        raise ModelError(
            f"{path} cannot be read as weights: {reason}. A weight file holds tensors and nothing "
            "else; anything else in it is never run. Fetch the model again, from its publisher"
        ) from error
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in found.items()
    ):
        raise ModelError(f"{path} holds something else than named tensors")
    if expected is not None and found.keys() != expected:
        odd = sorted(found.keys() ^ expected)
        raise ModelError(
            f"{path} does not hold what {INDEX} says: {len(odd)} names differ, first {odd[:3]}; "
            "fetch the model again"
        )
    return {name: tensor.clone().contiguous() for name, tensor in found.items()}


def _require_equal(meant: Mapping[str, Tensor], path: Path) -> None:
    """Read a file back and compare every tensor with what it was written from, bit for bit."""
    with safe_open(path, framework="pt") as file:
        for name, tensor in meant.items():
            back = file.get_tensor(name)
            same = back.dtype == tensor.dtype and back.shape == tensor.shape
            if not same or not torch.equal(_bits(back), _bits(tensor)):
                raise ModelError(f"{path}: {name} was read back otherwise than it was written")


def _bits(tensor: Tensor) -> Tensor:
    """A tensor's bytes; NaNs compare equal to themselves."""
    return tensor.reshape(-1).view(torch.uint8)


def _companions(folder: Path) -> Iterator[Path]:
    """Files beside the weights that the new folder needs too."""
    for path in folder.iterdir():
        weights = path.name == INDEX or path.name.endswith((".safetensors", ".index.json"))
        if path.is_file() and not weights and not path.name.endswith(LEFT_OUT):
            yield path


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m vlmtune.models.qwen_vl.convert",
        description="Write the pickled weights of a model folder as safetensors.",
    )
    parser.add_argument("folder", type=Path, help="holds pytorch_model*.bin")
    parser.add_argument("out", type=Path, help="the folder to make")
    options = parser.parse_args(arguments)
    try:
        done = convert_to_safetensors(options.folder, options.out, progress=_tell)
    except VlmtuneError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_status
    sys.stdout.write(f"{done.path}: {done.tensors} tensors, {done.bytes:,} bytes\n")
    return 0


def _tell(written: int, files: int) -> None:
    sys.stderr.write(f"{written} of {files} files\n")


if __name__ == "__main__":
    sys.exit(main())
