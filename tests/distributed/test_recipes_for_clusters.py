"""The files for clusters in the documentation start what they say, as far as a shell can tell."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import typer.main
import yaml

from vlmtune.cli.main import app

PAGE = Path(__file__).resolve().parents[2] / "docs" / "distributed.md"
SHIMS = {
    "vlmtune": """
import json, os, sys
open(os.environ["SEEN"], "a").write(json.dumps(sys.argv[1:]) + "\\n")
""",
    "scontrol": 'print("first\\nsecond")',
    "srun": """
import os, subprocess, sys
for node in range(int(os.environ["SLURM_NNODES"])):
    subprocess.run(sys.argv[1:], env={**os.environ, "SLURM_NODEID": str(node)}, check=True)
""",
}
SLURM = {"SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "nodes[1-2]"}
SKYPILOT = {
    "SKYPILOT_NODE_IPS": "first\nsecond",
    "SKYPILOT_NUM_GPUS_PER_NODE": "8",
    "SKYPILOT_NUM_NODES": "2",
}


def blocks(heading: str, language: str) -> list[str]:
    """The files of a section."""
    section = PAGE.read_text(encoding="utf-8").split(f"\n### {heading}\n")[1].split("\n### ")[0]
    return re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)


@pytest.fixture
def started(tmp_path, monkeypatch):
    """The options with which a script starts ``vlmtune``, each time."""
    import sys

    for name, code in SHIMS.items():
        shim = tmp_path / name
        shim.write_text(f"#!{sys.executable} -S\n{code}", encoding="utf-8")
        shim.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SEEN", str(tmp_path / "seen"))
    train = typer.main.get_command(app).commands["train"]

    def run(script: str, **variables: str) -> list[dict[str, object]]:
        seen = tmp_path / "seen"
        seen.unlink(missing_ok=True)
        subprocess.run(
            ["bash", "-e", "-u", "-c", script], env={**os.environ, **variables}, check=True
        )
        lines = [json.loads(line) for line in seen.read_text().splitlines()]
        return [train.make_context("train", arguments[1:]).params for arguments in lines]

    return run


def check_node(options, node):
    assert (options["devices"], options["nodes"], options["node_rank"]) == (8, 2, node)
    assert options["resume"] is True
    assert options["overrides"] == ["data.path=/shared/data/latex"]


def test_slurm(started):
    (script,) = blocks("SLURM", "bash")
    assert "#SBATCH --signal=TERM@120" in script
    found = started(script, **SLURM)
    assert [options["rendezvous"] for options in found] == ["first:29500"] * 2
    for node, options in enumerate(found):
        check_node(options, node)


def test_skypilot(started):
    (text,) = blocks("SkyPilot", "yaml")
    for node in range(2):
        (options,) = started(yaml.safe_load(text)["run"], SKYPILOT_NODE_RANK=str(node), **SKYPILOT)
        assert options["rendezvous"] == "first:29500"
        check_node(options, node)


def test_kubernetes(started):
    (text,) = blocks("Kubernetes", "yaml")
    service, job = yaml.safe_load_all(text)
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"] == ["bash", "-c"]
    name = job["metadata"]["name"]
    first = f"{name}-0.{service['metadata']['name']}:29500"  # as an indexed Job names its pods
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": name}
    for node in range(job["spec"]["completions"]):
        (options,) = started(container["args"][0], JOB_COMPLETION_INDEX=str(node))
        assert options["rendezvous"] == first
        check_node(options, node)
    with pytest.raises(subprocess.CalledProcessError):  # the control: what no node sets is missed
        started(container["args"][0])
