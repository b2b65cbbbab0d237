"""Environments of the others, each a layer over one with torch: they cap transformers below ours.

    python benchmarks/environments.py [--out DIR]

An environment that cannot be made is a row of the table, with pip's last words.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path.home() / ".cache/vlmtune-benchmarks"
# A plain torchvision would swap torch for a CUDA build of several GB.
TORCH = ("torch==2.13.0", "torchvision==0.28.0")
BELOW = (*TORCH, "pillow==12.3.0", "numpy")


@dataclass(frozen=True)
class Peer:
    """A system beside ours.

    Attributes:
        job: Its script in ``jobs/``.
        packages: What pip is asked for.
        removed: What it brings along and cannot be imported beside a CPU build of torch.
    """

    job: str
    packages: tuple[str, ...]
    removed: tuple[str, ...] = ()


PEERS = {
    "tutorial": Peer(
        "tutorial.py",
        ("transformers==5.23.0", "peft==0.21.2", "datasets==5.2.0", "accelerate==1.15.0", "pandas"),
    ),
    "trl": Peer("trl_job.py", ("trl==1.16.0", "transformers==5.23.0", "peft==0.21.2")),
    "llamafactory": Peer("llamafactory_job.py", ("llamafactory==0.9.5",), ("torchaudio",)),
    "swift": Peer("swift_job.py", ("ms-swift==4.6.0", "qwen-vl-utils==0.0.14")),
}


def interpreter(folder: Path, name: str) -> Path:
    """The Python of an environment."""
    return folder / name / "bin/python"


def make(folder: Path, name: str) -> str | None:
    """Make an environment unless it is there.

    Returns:
        None, or why it could not be installed.
    """
    peer, python = PEERS[name], interpreter(folder, name)
    done = folder / name / "done"
    if done.exists():
        return None
    folder.mkdir(parents=True, exist_ok=True)
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join(TORCH) + "\n", encoding="utf-8")
    fault = _make_below(folder) or _venv(folder / name, below=folder / "below")
    fault = fault or _pip(python, "install", "-c", str(constraints), *peer.packages)
    if fault is None and peer.removed:
        fault = _pip(python, "uninstall", "-y", *peer.removed)
    if fault is None:
        done.touch()
    return fault


def _make_below(folder: Path) -> str | None:
    below = folder / "below"
    if (below / "done").exists():
        return None
    fault = _venv(below) or _pip(below / "bin/python", "install", *BELOW)
    if fault is None:
        (below / "done").touch()
    return fault


def _venv(folder: Path, below: Path | None = None) -> str | None:
    fault = _run([sys.executable, "-m", "venv", "--clear", str(folder)])
    if fault is None and below is not None:
        packages = next((folder / "lib").glob("python*/site-packages"))
        lower = next((below / "lib").glob("python*/site-packages"))
        (packages / "below.pth").write_text(f"{lower}\n", encoding="utf-8")
    return fault


def _pip(python: Path, *arguments: str) -> str | None:
    return _run([str(python), "-m", "pip", "--quiet", *arguments])


def _run(command: list[str]) -> str | None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return None
    return " ".join(done.stderr.split())[-300:] or f"exit status {done.returncode}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE)
    folder = parser.parse_args().out
    for name in PEERS:
        fault = make(folder, name)
        print(name, "is installed" if fault is None else f"did not install, because {fault}")


if __name__ == "__main__":
    main()
