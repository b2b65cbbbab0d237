"""A whole run: evaluate before, train, evaluate after, report. Continues where it was killed."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlmtune.batching.planner import Plan
from vlmtune.batching.proof import packing_encoder
from vlmtune.data.dataset import PreparedDataset, Rows
from vlmtune.data.mixture import Dataset, open_sources
from vlmtune.errors import ChangedError, RunExistsError, UsageError
from vlmtune.files import append_lines, keep_lines_through, write_json, write_text
from vlmtune.models.contract import Contract, make_contract
from vlmtune.models.encode import Encoder
from vlmtune.models.families import load_family
from vlmtune.models.load import BaseSource
from vlmtune.recipe import Recipe, as_recipe
from vlmtune.runs.best import best_checkpoint
from vlmtune.runs.checkpoints import newest_good, step_of
from vlmtune.runs.folder import RunFolder, commit, describe_environment
from vlmtune.runs.resolve import fetch_base
from vlmtune.training.checkpoint import (
    State,
    load_state,
    remove_leftovers,
    token_budgets_of,
)
from vlmtune.training.distributed.ranks import Ranks, join
from vlmtune.training.distributed.strategy import Strategy
from vlmtune.training.fitting import TOKENS_PER_FORWARD, budgets
from vlmtune.training.loader import Loader
from vlmtune.training.loop import Job, StepReport, run
from vlmtune.training.prepare_rows import measure, plan_rows
from vlmtune.training.profiling import profiled
from vlmtune.training.saving import Saver
from vlmtune.training.summary import write_summary
from vlmtune.training.tracking.trackers import Trackers
from vlmtune.training.trainability import TrainabilityProof
from vlmtune.tuning.apply import Tuned
from vlmtune.verbs.holding import check_strategy, hold, hold_checkpoint, shards
from vlmtune.verbs.looking import look
from vlmtune.verbs.measuring import Measuring
from vlmtune.verbs.observer import Observer
from vlmtune.verbs.recomputing import decide, room_here
from vlmtune.verbs.results import result_of
from vlmtune.verbs.run_facts import (
    FIXED,
    recipe_changes,
    record_change,
    record_dropped,
)
from vlmtune.verbs.start import check_start, load_start, place_of, quantization_of, tune
from vlmtune.verbs.tracked import track_run, track_step
from vlmtune.verbs.weights import write_weights

logger = logging.getLogger(__name__)

PROGRESS_EVERY = 50


def train(
    recipe: Recipe | str | Path,
    *,
    run_dir: str | Path | None = None,
    resume: bool = False,
    allow_change: bool = False,
    profile: bool = False,
    observer: Observer | None = None,
    **overrides: Any,
) -> dict[str, Any]:
    """Fine-tune as a recipe says.

    Args:
        recipe: A recipe, the name of a shipped one, or a YAML file.
        run_dir: The run's folder; ``runs/NAME`` unless given.
        resume: Continue the run in the folder; starts it where there is none.
        allow_change: Continue although data, recipe or contract changed, and record it.
        profile: Record steps 3 to 5 from here into ``profile/trace.json`` of the folder.
        observer: Who is told how it goes.
        **overrides: Options with ``__`` for the dot: ``training__batch_size=8``.

    Returns:
        The keys of ``vlmtune train --json``; nothing in the further processes of a distributed run.

    Raises:
        RunExistsError: If the folder holds a run and ``resume`` is not set.
        ChangedError: If something changed since the run began.
        StoppedError: On a signal, after a checkpoint.
        DiskFullError: What was saved before is intact.
    """
    recipe = as_recipe(recipe, overrides)
    folder = RunFolder(run_dir or Path("runs") / recipe.name)
    ranks = join()
    check_strategy(recipe, ranks.count)
    # The others neither write nor speak.
    with folder.full_disk_told(), folder.lock() if ranks.first else nullcontext():
        observer = observer if observer is not None and ranks.first else Observer()
        return _Run(recipe, folder, observer, ranks, profile).go(resume, allow_change)


def _opened(recipe: Recipe) -> Dataset:
    """The data that a recipe names.

    Raises:
        UsageError: It names none.
    """
    if recipe.data.sources:
        return open_sources(recipe.data.sources, recipe.training.seed)
    if recipe.data.path is None:
        raise UsageError(
            "data.path: missing; prepare a data set (vlmtune prepare SOURCE --out DIR), then give "
            "data.path=DIR, or several of them in data.sources"
        )
    return PreparedDataset.open(recipe.data.path)


@dataclass
class _Run:
    """One run on its way."""

    recipe: Recipe
    folder: RunFolder
    observer: Observer
    ranks: Ranks
    profile: bool = False

    def go(self, resume: bool, allow_change: bool) -> dict[str, Any]:
        if self.ranks.first and self.folder.exists and not resume:
            raise RunExistsError(
                f"{self.folder} already holds a run; continue it with --resume, or choose another "
                "folder with --run DIR"
            )
        dataset, base, encoder = self._open()
        finished = self._begin(dataset, encoder, allow_change) if self.ranks.first else None
        if self.ranks.any(finished is not None):
            return finished or {}
        checkpoint = newest_good(self.folder.checkpoints)
        # Before they wait for each other: some may begin to load while others do something else.
        room = room_here(place_of(self.recipe)[0], self.ranks.count)
        plan, rows = self._plan(dataset, encoder, checkpoint)
        validation = dataset.split("validation")
        # Before anything that takes long: a tracker that is not installed is said at once.
        trackers = Trackers()
        if self.ranks.first:
            trackers = track_run(self.recipe, self.folder, plan, checkpoint)
        measuring = Measuring(
            self.recipe, self.folder, validation, self.ranks, self.observer, trackers
        )
        try:
            self.observer.stage("loading weights")
            quantization = encoder.contract.quantization
            cut = shards(self.recipe, self.ranks)
            model = load_start(self.recipe, base, checkpoint, quantization, to_be_cut=cut)
            packing = packing_encoder(model, encoder)
            if packing is not encoder:
                encoder, plan = packing, replace(plan, token_budget=self._budget(checkpoint))
            encoder = look(
                model, encoder, self.recipe, plan, rows, validation, self.ranks, self.observer
            )
            told, ranks, folder = self.observer.stage, self.ranks, self.folder
            recomputed = decide(self.recipe, base, encoder, plan, rows, folder, ranks, room, told)
            begins = checkpoint is None and self.recipe.evaluation.before
            if begins and not cut:
                measuring.evaluate("before", 0, model, encoder)
            facts = encoder.family.facts
            tuned = tune(model, self.recipe, facts, base, checkpoint, recomputed)
            # Before the weights are cut: it counts them.
            proof = TrainabilityProof(tuned.model, encoder.family.facts, tuned.trainable())
            strategy = hold(tuned, self.recipe, encoder.family.facts, self.ranks)
            if begins and cut:  # fresh adapters change nothing; the base need not fit on a device
                measuring.evaluate("before", 0, model, encoder)
            step = self._train(
                tuned, strategy, proof, encoder, base, plan, rows, checkpoint, measuring
            )
            if self.recipe.evaluation.after:
                best = best_checkpoint(self.folder)
                if best is not None and step_of(best) != step:
                    step = step_of(best)
                    self.observer.stage(f"loading the best checkpoint, that of step {step}")
                    del model, tuned, strategy, proof  # two need not fit on the device
                    model = hold_checkpoint(best, self.recipe, base, encoder, self.ranks)
                measuring.evaluate("after", step, model, encoder)
        finally:
            trackers.finish()
        return self._finish() if self.ranks.first else {}

    def _begin(
        self, dataset: Dataset, encoder: Encoder, allow_change: bool
    ) -> dict[str, Any] | None:
        """Start the run's folder or go on in it; the result of a run that is finished."""
        finished = self.folder.read_result()
        if self.folder.exists:
            changed = self._compare(dataset, encoder.contract, allow_change)
            if finished is not None and not changed:
                logger.warning("%s is finished; nothing to do", self.folder)
                return finished
        else:
            self._start(dataset, encoder.contract)
        remove_leftovers(self.folder.checkpoints)
        return None

    def _open(self) -> tuple[Dataset, BaseSource, Encoder]:
        recipe = self.recipe
        dataset = _opened(recipe)
        self.observer.stage("verifying the data")
        dataset.verify()
        evaluates = recipe.evaluation.before or recipe.evaluation.after
        if evaluates and not len(dataset.split("validation")):
            raise UsageError(
                "the data has no validation rows to measure on; prepare it with --validation 0.1, "
                "or set evaluation.before=false evaluation.after=false"
            )
        self.observer.stage("opening the model")
        base = fetch_base(recipe.model.base, recipe.model.hub, recipe.model.revision)
        family = load_family(str(base.folder), recipe.model.backend)
        contract = make_contract(
            family,
            base.identity(),
            recipe.image,
            system_prompt=recipe.data.system_prompt,
            prompt=recipe.data.prompt,
            instruction=recipe.data.instruction,
        )
        check_start(recipe, base, family.facts)
        quantization = quantization_of(recipe, base, family.facts)
        contract = contract.model_copy(update={"quantization": quantization})
        return dataset, base, Encoder(family, contract)

    def _start(self, dataset: Dataset, contract: Contract) -> None:
        self.folder.start(
            self.recipe.to_yaml(),
            describe_environment(),
            dataset.facts(),
            contract.model_dump(mode="json"),
        )

    def _compare(self, dataset: Dataset, contract: Contract, allow: bool) -> bool:
        """Refuse to go on with something else than the run was started with.

        Returns:
            Whether something changed, and was allowed to.
        """
        changes = []
        stored = json.loads(self.folder.data.read_text(encoding="utf-8"))
        if stored["fingerprint"] != dataset.fingerprint:
            changes.append(f"data: {stored['fingerprint'][:12]} is now {dataset.fingerprint[:12]}")
        changes += recipe_changes(self.folder.recipe, self.recipe)
        if self.folder.contract.exists():
            changes += Contract.read(self.folder.path).differences(contract)
        if not changes:
            return False
        fixed = [change for change in changes if change.startswith(FIXED)]
        if fixed:
            raise ChangedError(
                f"{self.folder}: {'; '.join(fixed)}: with another order or batch, rows would be "
                "trained twice or not at all. Undo that, or start a new run with --run DIR"
            )
        if not allow:
            raise ChangedError(
                f"{self.folder} was started with something else: {'; '.join(changes)}. Undo that, "
                "or go on all the same with --allow-change, which is recorded"
            )
        record_change(self.folder.ledger, changes)
        write_text(self.folder.recipe, self.recipe.to_yaml())
        contract.write(self.folder.path)
        write_json(self.folder.data, dataset.facts())
        # What was measured after the old training says nothing of the new.
        shutil.rmtree(self.folder.evaluation("after"), ignore_errors=True)
        self.folder.result.unlink(missing_ok=True)
        self.folder.recomputed.unlink(missing_ok=True)  # decided for another step
        return True

    def _plan(
        self, dataset: Dataset, encoder: Encoder, checkpoint: Path | None
    ) -> tuple[Plan, Rows]:
        recipe = self.recipe
        rows = dataset.split("train")
        self.observer.stage("measuring rows")
        measured = measure(rows, encoder, self._progress, recipe.data.answers, self.ranks)
        plan, long = plan_rows(
            rows,
            measured,
            recipe.training,
            max_length=recipe.data.max_length,
            too_long=recipe.data.too_long,
            token_budget=self._budget(checkpoint),
        )
        if self.ranks.first:
            record_dropped(self.folder.ledger, [*measured.unusable, *long])
        return plan, rows

    def _budget(self, checkpoint: Path | None) -> int:
        """Tokens of a forward. A resumed run must cut alike: other packs would round otherwise."""
        return self._budgets(checkpoint)[0]

    def _budgets(self, checkpoint: Path | None) -> tuple[int, int]:
        """The budget, and what it was before memory halved it."""
        default = TOKENS_PER_FORWARD.get(place_of(self.recipe)[0].type, 4096)
        stated = self.recipe.training.token_budget
        return budgets(stated, default, token_budgets_of(checkpoint))

    def _train(  # noqa: PLR0913
        self,
        tuned: Tuned,
        strategy: Strategy,
        proof: TrainabilityProof,
        encoder: Encoder,
        base: BaseSource,
        plan: Plan,
        rows: Rows,
        checkpoint: Path | None,
        measuring: Measuring,
    ) -> int:
        """Train; returns the step after which it ended."""
        config = self.recipe.training
        state = State(plan=plan.fingerprint())
        if checkpoint is not None:
            state = load_state(checkpoint, strategy)
        asked = self._budgets(checkpoint)[1]
        state.token_budget, state.asked_budget = plan.token_budget, asked
        if self.ranks.first:
            self._forget_after(state.step)
        if checkpoint is not None and self.ranks.first:
            resumed = {"event": "resumed", "step": state.step, "commit": commit()}
            append_lines(self.folder.ledger, [resumed])
        job = Job(
            model=tuned.model,
            family=encoder.family,
            strategy=strategy,
            config=config,
            plan=plan,
            loader=Loader(
                rows, encoder, plan, config.workers, self.ranks, in_step=strategy.in_step
            ),
            folder=self.folder,
            saver=Saver(
                self.folder.checkpoints,
                strategy,
                tuned.saved,
                lambda out, tensors: write_weights(out, tensors, tuned, encoder, base),
                keep=config.keep,
                behind=config.save_behind,
            ),
            proof=proof,
            watch=measuring.watch(
                tuned.model, strategy, encoder, replace(plan, token_budget=asked)
            ),
            state=state,
            profile=self._profiled(),
            on_step=lambda report: self._on_step(report, measuring.trackers),
            on_proof=self.observer.trainability,
        )
        self.observer.stage("training")
        return run(job).step

    def _profiled(self) -> AbstractContextManager[Callable[[], None]]:
        if self.profile and self.ranks.first:
            return profiled(self.folder.path / "profile")
        return nullcontext(lambda: None)

    def _forget_after(self, step: int) -> None:
        """What was written after the checkpoint will be written again."""
        for path in (self.folder.ledger, self.folder.metrics):
            keep_lines_through(path, step)
        for folder in self.folder.evaluation("after").parent.glob("step-*"):
            if int(folder.name.removeprefix("step-")) > step:
                shutil.rmtree(folder, ignore_errors=True)

    def _on_step(self, report: StepReport, trackers: Trackers) -> None:
        self.observer.step(report)
        track_step(trackers, self.recipe, report)

    def _progress(self, done: int, total: int) -> None:
        if done % PROGRESS_EVERY == 0 or done == total:
            self.observer.progress(done, total)

    def _finish(self) -> dict[str, Any]:
        self.observer.stage("writing the report")
        write_summary(self.folder)
        result = result_of(self.folder)
        write_json(self.folder.result, result)
        return result
