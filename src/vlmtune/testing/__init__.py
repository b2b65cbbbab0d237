"""Tiny random models of every family in the real layout, made offline in about a second.

For tests, ours and yours: ``python -m vlmtune.testing tiny qwen2_vl OUT`` writes a folder that
loads through the ordinary path like any hub model.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from vlmtune.errors import UsageError, VlmtuneError
from vlmtune.models.torchvision import torchvision_fault
from vlmtune.testing.gemma import gemma3
from vlmtune.testing.idefics import idefics2, idefics3, smolvlm
from vlmtune.testing.internvl import internvl
from vlmtune.testing.llava import llava, llava_next, llava_onevision
from vlmtune.testing.qwen import qwen2_5_vl, qwen2_vl, qwen3_vl
from vlmtune.testing.qwen_vl import qwen_vl
from vlmtune.testing.size import TinySize as TinySize

FAMILIES: dict[str, Callable[[Path, int, TinySize], None]] = {
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "qwen_vl": qwen_vl,
    "internvl": internvl,
    "idefics2": idefics2,
    "idefics3": idefics3,
    "smolvlm": smolvlm,
    "llava": llava,
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "gemma3": gemma3,
}


def tiny(family: str, out: str | Path, *, seed: int = 0, size: TinySize | None = None) -> Path:
    """Write a tiny random model of a family in the real on-disk layout.

    Args:
        family: A name of ``FAMILIES``.
        out: Folder to make; it must not hold a model yet.
        seed: Seed of the weights.
        size: How big; the default has about 0.2 million parameters.

    Returns:
        The folder.
    """
    if family not in FAMILIES:
        raise UsageError(f"family: found {family!r}, expected one of {', '.join(FAMILIES)}")
    folder = Path(out)
    if (folder / "config.json").exists():
        raise UsageError(f"{folder} already holds a model; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    torchvision_fault()
    from transformers.utils import logging

    logging.disable_progress_bar()
    FAMILIES[family](folder, seed, size or TinySize())
    return folder


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(prog="python -m vlmtune.testing")
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("tiny", help="write a tiny random model of a family")
    command.add_argument("family", choices=sorted(FAMILIES))
    command.add_argument("out", type=Path)
    command.add_argument("--seed", type=int, default=0)
    for name, default in vars(TinySize()).items():
        command.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    options = vars(parser.parse_args(arguments))
    family, out, seed = options.pop("family"), options.pop("out"), options.pop("seed")
    try:
        folder = tiny(family, out, seed=seed, size=TinySize(**options))
    except VlmtuneError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_status
    sys.stdout.write(f"{folder}\n")
    return 0
