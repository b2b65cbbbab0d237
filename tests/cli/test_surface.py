"""The public surface: what there is to call and to set, and that asking for help is quick."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer.main

import vlmtune
from vlmtune.cli.main import app
from vlmtune.recipe import option_names, recipe_from

VERBS = [
    "chat",
    "check",
    "doctor",
    "download",
    "evaluate",
    "export",
    "inspect",
    "list_runs",
    "merge",
    "plan",
    "predict",
    "prepare",
    "report",
    "reproduce",
    "serve",
    "train",
]

TINY = {
    "name": "tiny",
    "model": {"base": "BASE"},
    "training": {"max_steps": 1, "batch_size": 2, "precision": "fp32"},
    "evaluation": {"before": False, "after": False},
}

# Names that Python or a package of ours has already.
COMMANDS = {"evaluate": "eval", "list_runs": "runs"}

# A new option is a decision: it is added here in the same change.
OPTIONS = [
    "name",
    "description",
    "model.base",
    "model.hub",
    "model.revision",
    "model.dtype",
    "model.device",
    "model.quantization",
    "model.device_map",
    "model.backend",
    "data.path",
    "data.sources",
    "data.prompt",
    "data.instruction",
    "data.system_prompt",
    "data.answers",
    "data.max_length",
    "data.too_long",
    "image.max_pixels",
    "image.min_pixels",
    "image.size",
    "image.longest_edge",
    "image.split",
    "image.max_tiles",
    "image.background",
    "image.max_source_pixels",
    "image.max_aspect_ratio",
    "tuning.method",
    "tuning.rank",
    "tuning.alpha",
    "tuning.dropout",
    "tuning.init",
    "tuning.targets",
    "tuning.train",
    "tuning.freeze",
    "tuning.modules_to_save",
    "tuning.learning_rates.vision",
    "tuning.learning_rates.projector",
    "tuning.learning_rates.language",
    "training.epochs",
    "training.max_steps",
    "training.batch_size",
    "training.learning_rate",
    "training.schedule",
    "training.warmup_steps",
    "training.warmup_ratio",
    "training.weight_decay",
    "training.betas",
    "training.clip",
    "training.precision",
    "training.gradient_checkpointing",
    "training.compile",
    "training.seed",
    "training.log_steps",
    "training.save_steps",
    "training.save_behind",
    "training.keep",
    "training.token_budget",
    "training.rehearse",
    "training.workers",
    "training.vision_cache",
    "training.vision_cache_gb",
    "evaluation.before",
    "evaluation.after",
    "evaluation.metrics",
    "evaluation.normalise",
    "evaluation.every",
    "evaluation.generate_every",
    "evaluation.best_metric",
    "evaluation.stop_after",
    "evaluation.probe",
    "evaluation.max_new_tokens",
    "evaluation.limit",
    "evaluation.batch_rows",
    "tracking.to",
    "tracking.mode",
    "tracking.project",
    "tracking.name",
    "tracking.workspace",
    "distributed.strategy",
    "distributed.offload",
]

TRAIN = [
    "--run",
    "--resume",
    "--allow-change",
    "--devices",
    "--nodes",
    "--node-rank",
    "--rendezvous",
    "--profile",
    "--json",
    "--debug",
]

HEAVY = (
    "torch",
    "transformers",
    "datasets",
    "peft",
    "pyarrow",
    "numpy",
    "PIL",
    "matplotlib",
    "fastapi",
    "uvicorn",
)
HELP_SECONDS = 0.4
IMPORTED = """
import sys
from vlmtune.cli.main import main
sys.argv = ["vlmtune", {argument!r}]
try:
    main()
except SystemExit:
    pass
sys.stderr.write(" ".join(name for name in {heavy!r} if name in sys.modules))
"""


def test_verbs():
    assert vlmtune.__all__ == VERBS
    assert [name for name in dir(vlmtune) if not name.startswith("_")] == VERBS
    for name in VERBS:
        assert callable(getattr(vlmtune, name))


def test_options():
    assert list(option_names()) == OPTIONS


def test_every_option_can_be_set_by_its_name():
    """The list is the recipe's own: a written-out recipe has these options and no others."""
    recipe = recipe_from({"name": "x", "model": {"base": "b"}})

    def names(values, prefix=""):
        for name, value in values.items():
            if isinstance(value, dict):
                yield from names(value, f"{prefix}{name}.")
            else:
                yield prefix + name

    assert list(names(recipe.model_dump())) == OPTIONS


def test_options_of_train():
    found = typer.main.get_command(app).commands["train"].params
    assert [name for each in found for name in each.opts if name.startswith("--")] == TRAIN


def test_commands_are_the_verbs(command):
    text = command("--help").out
    for name in VERBS:
        assert f" {COMMANDS.get(name, name)} " in text
    version = command("--version")
    assert (version.status, version.out) == (0, f"vlmtune {vlmtune.__version__}\n")


def test_help_is_quick():
    script = Path(sys.executable).with_name("vlmtune")
    taken = []
    for _ in range(15):  # five, and more only while another process has the machine
        started = time.perf_counter()
        subprocess.run([script, "--help"], capture_output=True, check=True)
        taken.append(time.perf_counter() - started)
        if len(taken) >= 5 and min(taken) < HELP_SECONDS:
            break
    assert min(taken) < HELP_SECONDS, taken


def test_help_imports_nothing_heavy():
    for argument in ("--help", "--version"):
        code = IMPORTED.format(argument=argument, heavy=HEAVY)
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        assert done.stderr == ""
    # Negative control: a verb that does load them is seen by the same words.
    code = IMPORTED.format(argument="--help", heavy=HEAVY).replace(
        "import sys", "import sys, numpy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "numpy"


# What a training run has no use for; pandas comes with pyarrow's ``array`` and ``read_table``.
NEEDLESS = (
    "pandas",
    "datasets",
    "sacrebleu",
    "lxml",
    "matplotlib",
    "scipy",
    "sklearn",
    "fastapi",
    "uvicorn",
    "tensorboard",
    "vlmtune.serving",
    "vlmtune.checking",
    "vlmtune.verbs.merge",
    "vlmtune.forecast.shadow",
)
VERB = """
import sys
from pathlib import Path
import vlmtune
prepare, train = vlmtune.prepare, vlmtune.train
{more}
print(" ".join(name for name in {needless!r} if name in sys.modules))
"""


def loaded(more=""):
    code = VERB.format(more=more, needless=NEEDLESS)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_training_loads_nothing_that_it_does_not_need():
    assert loaded() == []
    # Negative control: what another verb loads is seen by the same words.
    assert loaded("vlmtune.merge, vlmtune.check").count("vlmtune.checking") == 1


@pytest.mark.slow
def test_neither_does_a_whole_run(tiny_base, formula_table, tmp_path):
    run = f"""
prepare({str(formula_table)!r}, {str(tmp_path / "data")!r})
recipe = Path({str(tmp_path / "tiny.yaml")!r})
recipe.write_text({json.dumps(TINY)!r}.replace("BASE", {str(tiny_base)!r}))
train(recipe, run_dir={str(tmp_path / "run")!r}, data__path={str(tmp_path / "data")!r})
"""
    assert loaded(run) == []
