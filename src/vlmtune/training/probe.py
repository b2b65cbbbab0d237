"""The rows whose loss is followed during training."""

from __future__ import annotations

from collections.abc import Sequence

from vlmtune.batching.collate import PackedBatch, pack
from vlmtune.batching.planner import pack_indices
from vlmtune.data.conversation import Conversation
from vlmtune.models.encode import Encoder
from vlmtune.training.distributed.dealing import share_out
from vlmtune.training.distributed.ranks import Ranks


def probe_batches(
    rows: Sequence[Conversation], encoder: Encoder, budget: int, ranks: Ranks, *, in_step: bool
) -> list[PackedBatch] | None:
    """This process's share of the probe, packed once and for all; None where it has no rows.

    Args:
        rows: The probe, in every process.
        encoder: The model's encoder.
        budget: Most tokens of one forward.
        ranks: The processes.
        in_step: Whether all of them must forward equally often.
    """
    if not rows:
        return None
    lengths = [len(encoder.tokens(row)) for row in rows]
    packs = pack_indices(range(len(rows)), lengths, budget)
    loads = [sum(lengths[index] for index in indices) for indices in packs]
    sees = [any(rows[index].images for index in indices) for indices in packs]
    batches = []
    for share in share_out(loads, sees, ranks, in_step=in_step):
        chosen = encoder.encode_together([rows[index] for index in packs[share.pack]])
        batch = pack(encoder.family, chosen)
        batches.append(batch.without_labels() if share.stands_in else batch)
    return batches
