"""``vlmtune quickstart`` in an empty home without a network: the figures that it has to reach."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

CPU_SECONDS, MEGABYTES = 8 * 60, 2048
GOALS = {
    "formulas": {"exact_match": (0.05, 0.70), "edit_similarity": (1.0, 0.95)},
    "shapes": {"accuracy": (1.0, 0.95)},
    "boxes": {"box_accuracy_50": (0.1, 0.8)},
}


def cut_off() -> list[str]:
    """What to put before a command so that it has no network, where the system can do that."""
    unshare = shutil.which("unshare")
    if unshare is None:
        return []
    command = [unshare, "--map-root-user", "--net"]
    return command if subprocess.run([*command, "true"], check=False).returncode == 0 else []


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("task", sorted(GOALS))
def test_it_reaches_its_goal_in_an_empty_home_without_a_network(builtin_base, tmp_path, task):  # noqa: ARG001
    home = tmp_path / "home"
    home.mkdir()
    environment = {"HOME": str(home), "PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}
    command = [*cut_off(), sys.executable, "-m", "vlmtune", "quickstart", "--task", task, "--json"]
    with (tmp_path / "out").open("wb") as out:
        process = subprocess.Popen(command, stdout=out, env=environment, cwd=home)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    result = json.loads((tmp_path / "out").read_text(encoding="utf-8").splitlines()[-1])
    for metric, (before, after) in GOALS[task].items():
        assert result["before"][metric] <= before, metric
        assert result["after"][metric] >= after, metric
    assert usage.ru_utime + usage.ru_stime <= CPU_SECONDS
    assert usage.ru_maxrss / 1024 <= MEGABYTES
    assert (home / "quickstart" / task / "run" / "report.html").is_file()
