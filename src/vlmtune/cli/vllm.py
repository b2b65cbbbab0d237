"""Options of the verbs that may let vLLM compute."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from vlmtune.serving.vllm.process import VllmConfig

EngineName = Annotated[str, typer.Option(help="What computes: own, or vllm (merged models).")]
VllmProgram = Annotated[
    str | None, typer.Option("--vllm", help="The vLLM to start, where it is not on the path.")
]
VllmOptions = Annotated[
    Path | None,
    typer.Option("--vllm-config", help="A YAML file of further options of `vllm serve`."),
]


def chosen_vllm(engine: str, program: str | None, options: Path | None) -> VllmConfig | None:
    """Which vLLM computes, or None for our own engine.

    Raises:
        UsageError: If there is no such engine, or vLLM's options are given without it.
    """
    from vlmtune.errors import UsageError
    from vlmtune.serving.vllm.process import VllmConfig

    if engine not in ("own", "vllm"):
        raise UsageError(f"--engine: found {engine!r}, expected own or vllm")
    if engine == "own":
        if program is not None or options is not None:
            raise UsageError("--vllm, --vllm-config: they are for --engine vllm")
        return None
    return VllmConfig(program=program, options=options) if program else VllmConfig(options=options)
