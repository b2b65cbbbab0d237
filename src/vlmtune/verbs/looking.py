"""What a run looks at, how often, and whether its vision tower stays as it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vlmtune.batching.planner import Plan
from vlmtune.data.conversation import Conversation
from vlmtune.data.dataset import Rows
from vlmtune.models.encode import Encoder
from vlmtune.recipe import Recipe
from vlmtune.training.config import TrainingConfig
from vlmtune.training.distributed.ranks import Ranks
from vlmtune.training.looking import Keeping, Part, looking_once, with_features
from vlmtune.tuning.parts import parts_of
from vlmtune.tuning.targets import find_targets
from vlmtune.verbs.holding import shards
from vlmtune.verbs.observer import Observer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def look(  # noqa: PLR0913
    model: PreTrainedModel,
    encoder: Encoder,
    recipe: Recipe,
    plan: Plan,
    rows: Rows,
    validation: Rows,
    ranks: Ranks,
    observer: Observer,
) -> Encoder:
    """The encoder of a run, which may know the features of all images.

    Args:
        model: The base, without adapters.
        encoder: Its encoder.
        recipe: The run's.
        plan: Which rows it trains.
        rows: The split that it trains on.
        validation: The rows that it is measured on.
        ranks: The processes.
        observer: Who is told how it goes.
    """
    refusal = why_not(model, encoder, recipe, ranks)
    if refusal is None and recipe.training.vision_cache != "off":
        observer.stage("looking at images")
    parts = parts_of_run(recipe, plan, rows, validation)
    return looking_once(model, encoder, parts, recipe.training, refusal, observer.progress)


def look_at_questions(
    model: PreTrainedModel, encoder: Encoder, rows: Sequence[Conversation]
) -> Encoder:
    """The encoder for questions of which several may be about the same image."""
    if encoder.family.facts.features is None:
        return encoder
    keeping = Keeping("auto", TrainingConfig().vision_cache_gb, model.dtype)
    return with_features(model, encoder, [Part(rows, range(len(rows)), 1)], keeping)


def why_not(model: PreTrainedModel, encoder: Encoder, recipe: Recipe, ranks: Ranks) -> str | None:
    """Why features cannot be kept, or None."""
    facts = encoder.family.facts
    if facts.features is None:
        return f"models of the family {facts.name} are not known to take features for pixels"
    if shards(recipe, ranks):
        return "the vision tower's weights are cut among the processes (distributed.strategy)"
    if ranks.count > 1:
        return "each of several processes would have to look at all images"
    tuning = recipe.tuning
    if tuning.adapts:
        targets = find_targets(model, tuning, facts)
        moving = parts_of((*targets.adapted, *targets.saved), facts)
    else:
        moving = tuning.trained_parts()
    for part in ("vision", "projector"):
        if part in moving:
            return f"the {part} part trains (tuning.train, tuning.targets): its features change"
    return None


def parts_of_run(recipe: Recipe, plan: Plan, rows: Rows, validation: Rows) -> list[Part]:
    """What is looked at in training, before and after it, and on its way."""
    asked, training = recipe.evaluation, recipe.training
    every = asked.every or training.save_steps
    probes = plan.steps // every + plan.steps // (asked.generate_every or plan.steps + 1)
    limit = len(validation) if asked.limit is None else min(asked.limit, len(validation))
    probe = range(min(asked.probe, len(validation)))
    return [
        Part(rows, plan.kept.tolist(), plan.samples / len(plan.kept)),
        Part(validation, range(limit), asked.before + asked.after),
        Part(validation, probe, probes),
    ]
