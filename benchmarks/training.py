"""The same job with vlmtune, the tutorials' way, TRL, LLaMA-Factory and ms-swift, one thread.

    python benchmarks/training.py --data DIR [--vocabulary 2048] [--rows 256] [--core 0]

DIR holds a CSV of formula pictures and texts; without it formulas are drawn. Each system runs in an
environment of its own (see ``environments.py``) and a process of its own, one after the other, and
again. The same checkpoint, first adapters, pixels, rows of each step and label tokens: the losses
of all steps must agree to 1e-5, or the system's row is void.
"""

from __future__ import annotations

import argparse
import compileall
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import (
    REPOSITORY,
    RESULTS,
    fault_of,
    machine,
    middle,
    pinned,
    run_child,
    table,
    write_result,
)
from environments import HERE, PEERS, interpreter, make
from material import BATCH, SEED, formula_rows, make_material

JOBS = Path(__file__).resolve().parent / "jobs"
PHASES = ("prepare", "train", "start_load", "whole")
AGREE = 1e-5
WHOLE_BATCH = 32_768  # above, LLaMA-Factory's logits of 16 rows take more than 10 GB
OURS = {"vlmtune": {}, "vlmtune bf16": {"precision": "bf16"}}
KINDS = {"processor": "processor seconds", "seconds": "wall seconds"}


def command_of(system: str, environments: Path) -> list[str]:
    """The interpreter and script of a system."""
    if system in OURS:
        return [sys.executable, str(JOBS / "ours.py")]
    return [str(interpreter(environments, system)), str(JOBS / PEERS[system].job)]


def run_once(
    system: str, material: dict[str, Any], asked: argparse.Namespace, folder: Path
) -> dict[str, Any]:
    """One run of one system in an empty folder; ``fault`` is set where it failed."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    job = {**material, "precision": "fp32", **OURS.get(system, {})}
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    log = folder / "log"
    command = [*pinned(asked.core), *command_of(system, asked.environments)]
    # Nothing that an earlier run made may be found again.
    caches = {"HF_HOME": str(folder / "hub"), "MODELSCOPE_CACHE": str(folder / "modelscope")}
    used = run_child([*command, str(folder / "job.json")], log, environment=caches)
    fault = fault_of(used, log)
    if fault is not None:
        return {"fault": fault}
    measured = json.loads((folder / "measured.json").read_text(encoding="utf-8"))
    for kind, whole in (("seconds", used["wall_s"]), ("processor", used["processor_s"])):
        times = measured[kind]
        times["whole"] = whole
        times["start_load"] = round(whole - times["prepare"] - times["train"], 4)
    return {**measured, "peak_bytes": used["peak_bytes"], "load": round(os.getloadavg()[0], 1)}


def apart(losses: list[float], reference: list[float]) -> float:
    """The largest relative difference of two curves."""
    if len(losses) != len(reference):
        return float("inf")
    return max(
        abs(loss - right) / abs(right) for loss, right in zip(losses, reference, strict=True)
    )


def figures(system: str, runs: list[dict[str, Any]], reference: dict[str, Any]) -> dict[str, Any]:
    """What is said of a system; ``void`` says why its times may not be compared."""
    faults = [run["fault"] for run in runs if "fault" in run]
    if faults:
        return {"void": f"failed: {faults[0]}"}
    said: dict[str, Any] = {
        kind: {phase: middle(run[kind][phase] for run in runs) for phase in PHASES}
        for kind in KINDS
    }
    difference = max(apart(run["losses"], reference["losses"]) for run in runs)
    said |= {
        "peak_bytes": middle(run["peak_bytes"] for run in runs),
        "loss_difference": difference,
        "labels": runs[0]["labels"],
        "versions": runs[0]["versions"],
        "runs": runs,
    }
    if said["labels"] != reference["labels"]:
        said["void"] = f"trained on {said['labels']} label tokens, ours on {reference['labels']}"
    elif difference > AGREE and system != "vlmtune bf16":
        said["void"] = f"its losses differ from ours by {difference:.1g}"
    return said


def summary(systems: dict[str, Any]) -> dict[str, Any]:
    """Figures of all systems, and how they compare."""
    reference = systems["vlmtune"][0]
    if "fault" in reference:
        raise SystemExit(f"vlmtune failed: {reference['fault']}")
    said = {
        name: figures(name, runs, reference) if isinstance(runs, list) else runs
        for name, runs in systems.items()
    }
    return {"others_over_ours": ratios(said), "systems": said}


def ratios(systems: dict[str, Any]) -> dict[str, Any]:
    """Seconds of the best of the others over ours; memory of the leanest over ours."""
    valid = [name for name, said in systems.items() if name not in OURS and "void" not in said]
    if not valid:
        return {}
    found: dict[str, Any] = {}
    for kind in KINDS:
        for which in ("median", "min"):

            def of(name: str, phase: str, kind: str = kind, which: str = which) -> float:
                return float(systems[name][kind][phase][which])

            found[f"{kind}_{which}"] = {
                "training": round(min(of(n, "train") for n in valid) / of("vlmtune", "train"), 2),
                "whole_job": round(min(of(n, "whole") for n in valid) / of("vlmtune", "whole"), 2),
                "training_bf16": round(
                    min(of(n, "train") for n in valid) / of("vlmtune bf16", "train"), 2
                )
                if "vlmtune bf16" in systems
                else None,
                "preparing_over_tutorial": round(
                    of("tutorial", "prepare") / of("vlmtune", "prepare"), 1
                )
                if "tutorial" in valid
                else None,
            }
    leanest = min(systems[name]["peak_bytes"]["median"] for name in valid)
    found["peak_memory"] = round(leanest / systems["vlmtune"]["peak_bytes"]["median"], 2)
    return found


def told(systems: dict[str, Any], kind: str) -> str:
    """The table, medians and minima."""
    rows = []
    for name, said in systems.items():
        if "void" in said and "peak_bytes" not in said:
            rows.append([name, said["void"], *[""] * 5])
            continue
        times = [
            f"{said[kind][phase]['median']:.2f} ({said[kind][phase]['min']:.2f})"
            for phase in PHASES
        ]
        memory = f"{said['peak_bytes']['median'] / 1e6:,.0f}"
        curve = said.get("void") or f"{said['loss_difference']:.0e}"
        rows.append([name, *times, memory, curve])
    header = (f"{KINDS[kind]}: median (min)", *PHASES, "memory MB", "losses apart")
    return table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--core", type=int, help="keep every run to this core")
    parser.add_argument("--environments", type=Path, default=HERE)
    parser.add_argument("--systems", nargs="+", default=[*OURS, *PEERS])
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    result: dict[str, Any] = {**machine("vlmtune", "torch", "transformers", "peft")}
    result |= {name: vars(asked)[name] for name in ("vocabulary", "rows", "seed", "core")}
    result["data"] = "formulas drawn by vlmtune" if asked.data is None else asked.data.name
    systems: dict[str, Any] = {}
    # As it is where pip installed it, and as the others are: nobody compiles in every run.
    compileall.compile_dir(REPOSITORY / "src", quiet=1)
    for name in asked.systems:
        fault = make(asked.environments, name) if name in PEERS else None
        systems[name] = {"void": f"did not install, because {fault}"} if fault else []
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "material"
        rows = formula_rows(asked.data, asked.rows, made)
        material = make_material(made, rows, vocabulary=asked.vocabulary, seed=asked.seed)
        if asked.vocabulary > WHOLE_BATCH:
            material["llamafactory"] = {
                "per_device_train_batch_size": material["micro_batch"],
                "gradient_accumulation_steps": BATCH // material["micro_batch"],
            }
        for number in range(asked.rounds):
            for name, runs in systems.items():
                if isinstance(runs, list):
                    runs.append(run_once(name, material, asked, Path(folder) / "job"))
                    said = {key: runs[-1].get(key) for key in ("fault", *KINDS, "peak_bytes")}
                    print(number + 1, name, json.dumps(said), file=sys.stderr, flush=True)
            # After every round: one that is stopped leaves what was measured.
            result |= {"rounds": number + 1, **summary(systems)}
            write_result(asked.out or RESULTS / f"training-{asked.vocabulary}.json", result)
    systems = result["systems"]
    for kind in KINDS:
        print(told(systems, kind), end="\n\n")
    print(json.dumps(result["others_over_ours"], indent=1))


if __name__ == "__main__":
    main()
