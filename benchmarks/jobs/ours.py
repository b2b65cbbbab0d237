"""The job with vlmtune: rows prepared and trained as the two verbs do it, in one process."""

from __future__ import annotations

from clock import LOAD, Clock

clock = Clock()
job, out = clock.job, clock.folder

import ablation  # noqa: E402

from vlmtune.api import PrepareOptions, prepare, train  # noqa: E402  # imports are timed
from vlmtune.recipe import recipe_from  # noqa: E402
from vlmtune.training.loop import StepReport  # noqa: E402
from vlmtune.verbs.observer import Observer  # noqa: E402

WITHOUT = job.get("without")  # a measure that is taken away, see ``ablation.py``
if WITHOUT in ablation.PATCHES:
    ablation.PATCHES[WITHOUT]()
PHASES = {"verifying the data": "prepare", "measuring rows": "prepare", "training": "train"}


class Timing(Observer):
    """Tells the clock what begins."""

    def stage(self, text: str) -> None:
        """A stage of the run."""
        clock.switch(PHASES.get(text, LOAD))

    def step(self, report: StepReport) -> None:
        """A step; what comes after the last one is writing the checkpoint."""
        clock.losses.append(report.loss)
        clock.labels += report.labels
        clock.facts["peak_memory_bytes"] = report.peak_memory_bytes
        clock.facts.setdefault("step_seconds", []).append(round(report.seconds, 4))
        if report.step == report.steps:
            clock.switch(LOAD)


with clock.phase("prepare"):
    prepare(job["table"], out / "prepared", PrepareOptions(images_root="/", workers=1))
recipe = {
    "name": "benchmark",
    "model": {"base": job["base"]},
    "data": {"path": str(out / "prepared"), "prompt": job["prompt"]},
    "image": {"max_pixels": job["max_pixels"]},
    "tuning": {"rank": job["rank"], "alpha": job["alpha"], "dropout": job.get("dropout", 0.0)},
    "training": {
        "max_steps": job["steps"],
        "batch_size": job["batch_size"],
        "learning_rate": job["learning_rate"],
        "precision": job["precision"],
        "seed": job["seed"],
        "save_steps": 10**6,
        **job.get("training", {}),
        **ablation.OPTIONS.get(WITHOUT, {}),
    },
    "evaluation": {"before": False, "after": False},
}
train(recipe_from(recipe), run_dir=out / "run", observer=Timing())
if job.get("forecast"):
    from vlmtune.verbs.plan import plan

    forecast = plan(recipe_from(recipe))
    clock.facts |= {name: forecast[name] for name in ("flops", "samples", "tokens")}
clock.write("vlmtune", "transformers", "peft")
