"""What trains, its optimizer, and how the processes of a run hold them."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmtune.models.encode import Encoder
from vlmtune.models.family import FamilyFacts
from vlmtune.models.load import DTYPES, BaseSource
from vlmtune.recipe import Recipe
from vlmtune.training.checkpoint import seed_random
from vlmtune.training.distributed.ranks import Ranks
from vlmtune.training.distributed.sharding import Sharded, shard
from vlmtune.training.distributed.strategy import Strategy
from vlmtune.training.distributed.zero import Stage, require_deepspeed, start_zero
from vlmtune.training.optim import fuses, make_optimizer, make_scaler
from vlmtune.tuning.apply import Tuned
from vlmtune.tuning.parts import learning_rates
from vlmtune.verbs.start import load_start, place_of, tune

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def shards(recipe: Recipe, ranks: Ranks) -> bool:
    """Whether the weights are cut among the processes; a single one holds them all."""
    return recipe.distributed.cuts_weights and ranks.count > 1


def hold_checkpoint(
    checkpoint: Path, recipe: Recipe, base: BaseSource, encoder: Encoder, ranks: Ranks
) -> PreTrainedModel:
    """A checkpoint's model, to be asked and not to be trained; all processes call.

    Args:
        checkpoint: The checkpoint.
        recipe: The run's.
        base: What its adapters belong to.
        encoder: The run's.
        ranks: The processes. Where they cut the weights, they do so by FSDP2, whatever cut them for
            training: DeepSpeed's engine is of no use without an optimizer.
    """
    gc.collect()  # a model that is gone refers to itself
    facts, cut = encoder.family.facts, shards(recipe, ranks)
    model = load_start(recipe, base, checkpoint, encoder.contract.quantization, to_be_cut=cut)
    tuned = tune(model, recipe, facts, base, checkpoint)
    if cut:
        compute = DTYPES[recipe.training.precision]
        shard(tuned.model, facts, ranks, compute=compute, offload=recipe.distributed.offload)
    return tuned.model


def check_strategy(recipe: Recipe, processes: int) -> None:
    """Refuse a strategy that needs what is not installed; a single process needs nothing.

    Raises:
        MissingExtraError: Naming the package.
    """
    if recipe.distributed.zero and processes > 1:
        require_deepspeed()


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
    whole = not zero and not shards(recipe, ranks)  # of slices, each strategy's own way is kept
    optimizer = make_optimizer(parameters, config, rates, fused=whole and fuses(device))
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
