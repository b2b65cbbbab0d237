"""What trains, its optimizer, and how the processes of a run hold them."""

from __future__ import annotations

from typing import Any

from vlmtune.models.family import FamilyFacts
from vlmtune.models.load import DTYPES
from vlmtune.recipe import Recipe
from vlmtune.training.checkpoint import seed_random
from vlmtune.training.distributed.ranks import Ranks
from vlmtune.training.distributed.sharding import Sharded, shard
from vlmtune.training.distributed.strategy import Strategy
from vlmtune.training.distributed.zero import Stage, start_zero
from vlmtune.training.optim import make_optimizer, make_scaler
from vlmtune.tuning.apply import Tuned
from vlmtune.tuning.parts import learning_rates
from vlmtune.verbs.start import place_of


def shards(recipe: Recipe, ranks: Ranks) -> bool:
    """Whether the weights are cut among the processes; a single one holds them all."""
    return recipe.distributed.cuts_weights and ranks.count > 1


def hold(tuned: Tuned, recipe: Recipe, facts: FamilyFacts, ranks: Ranks) -> Strategy:
    """Share the weights out as the recipe says, and make the optimizer of what trains."""
    config, device = recipe.training, place_of(recipe)[0]
    ranks.from_first(tuned.trainable().values())
    if not ranks.first:
        seed_random(config.seed + ranks.rank)  # dropout of their own
    zero = recipe.distributed.zero and ranks.count > 1
    compute, offload = DTYPES[config.precision], recipe.distributed.offload
    if shards(recipe, ranks) and not zero:
        shard(tuned.model, facts, ranks, compute=compute, offload=offload)
    parameters = tuned.trainable()
    own = recipe.tuning.learning_rates
    rates = learning_rates(parameters, own, facts, config.learning_rate)
    optimizer = make_optimizer(parameters, config, rates)
    held: dict[str, Any] = {
        "ranks": ranks,
        "parameters": parameters,
        "optimizer": optimizer,
        "scaler": make_scaler(config, device),
        "device": device,
        "module": tuned.model,
    }
    if zero:
        stage = Stage(cuts_weights=recipe.distributed.cuts_weights, offload=offload)
        return start_zero(held, stage, clip=config.clip, compute=compute)
    return Sharded(**held) if shards(recipe, ranks) else Strategy(**held)
