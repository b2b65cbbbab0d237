"""The command itself, killed five times on its way: what it ends with is the run never killed."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from tiny_world import fingerprint
from vlmtune.files import read_lines


def test_killed_five_times(make_recipe, lora_run, tmp_path):
    """``make test-faults`` kills at a hundred places; here Python, files and locks are real."""
    recipe, run = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text(make_recipe().to_yaml(), encoding="utf-8")
    command = [sys.executable, "-W", "ignore", "-m", "vlmtune", "train", str(recipe)]
    command += ["--run", str(run), "--resume"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment}
    seen = []
    for reached in (0, 1, 2, 3, 5):  # steps that are done when it is killed, or one more
        with subprocess.Popen(command, **quiet) as process:
            begun = time.monotonic()
            while steps(run) < reached or not (run / "recipe.yaml").exists():
                assert process.poll() is None
                assert time.monotonic() - begun < 120
                time.sleep(0.001)
            process.kill()
        seen.append(steps(run))
    assert len(set(seen)) >= 4, seen
    assert not (run / "result.json").exists()
    subprocess.run(command, check=True, **quiet)
    assert fingerprint(run) == fingerprint(lora_run)


def steps(run):
    path = run / "metrics.jsonl"
    return len(list(read_lines(path))) if path.exists() else 0
