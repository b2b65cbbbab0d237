"""Packed batches ahead of the model: threads decode and encode while it computes."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from vlmtune.batching.collate import PackedBatch, pack
from vlmtune.batching.planner import Plan, Step
from vlmtune.data.answers import acceptable_answers, answering
from vlmtune.data.dataset import Rows
from vlmtune.models.encode import Encoder
from vlmtune.training.distributed.dealing import Share, share_out
from vlmtune.training.distributed.ranks import Ranks

AHEAD = 2  # steps prepared while one is trained


class Loader:
    """Makes the batches of a plan's steps, in the plan's order whatever the number of workers.

    Args:
        rows: The split.
        encoder: The model's encoder.
        plan: Which rows make which step.
        workers: Threads; 0 does the work in the calling thread.
        ranks: The processes that share each step's packs.
        in_step: Whether all processes must forward equally often, see ``deal_in_step``.
    """

    def __init__(
        self,
        rows: Rows,
        encoder: Encoder,
        plan: Plan,
        workers: int,
        ranks: Ranks | None = None,
        *,
        in_step: bool = False,
    ) -> None:
        self._rows = rows
        self._encoder = encoder
        self.plan = plan  # another from the next ``steps`` on, where memory halved its budget
        self._workers = workers
        self._ranks = ranks or Ranks()
        self._in_step = in_step
        self._reading = threading.Lock()  # the reader keeps a cache; encoding needs no lock

    def row_id(self, index: int) -> str:
        """Id of a row of the split."""
        return self._rows.ids[index]

    def batches(self, step: Step) -> list[PackedBatch]:
        """This process's batches of a step, made now."""
        return [self._pack(step, share) for share in self._own(step)]

    def batch(self, step: Step, pack: int) -> PackedBatch:
        """One pack of a step, whoever trains it."""
        return self._pack(step, Share(pack))

    def steps(self, start: int) -> Iterator[tuple[Step, list[PackedBatch]]]:
        """Steps after ``start`` (steps done so far) with this process's batches, maybe none."""
        numbers = range(start + 1, self.plan.steps + 1)
        if self._workers == 0:
            for number in numbers:
                step = self.plan.step(number)
                yield step, self.batches(step)
            return
        pool = ThreadPoolExecutor(self._workers, thread_name_prefix="vlmtune-loader")
        try:
            yield from self._ahead(pool, numbers)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _ahead(
        self, pool: ThreadPoolExecutor, numbers: range
    ) -> Iterator[tuple[Step, list[PackedBatch]]]:
        waiting: deque[tuple[Step, list[Future[PackedBatch]]]] = deque()
        for number in numbers:
            step = self.plan.step(number)
            futures = [pool.submit(self._pack, step, share) for share in self._own(step)]
            waiting.append((step, futures))
            if len(waiting) > AHEAD:
                ready, futures = waiting.popleft()
                yield ready, [future.result() for future in futures]
        while waiting:
            ready, futures = waiting.popleft()
            yield ready, [future.result() for future in futures]

    def _own(self, step: Step) -> list[Share]:
        """What this process forwards."""
        loads = [int(self.plan.lengths[list(pack)].sum()) for pack in step.packs]
        visual = self.plan.visual
        sees = [visual is None or bool(visual[list(pack)].any()) for pack in step.packs]
        return share_out(loads, sees, self._ranks, in_step=self._in_step)

    def _pack(self, step: Step, share: Share) -> PackedBatch:
        batch = self._rows_together(step, step.packs[share.pack])
        if torch.cuda.is_available():
            batch = batch.pinned()  # here, in the worker: the copy takes time
        return batch.without_labels() if share.stands_in else batch

    def _rows_together(self, step: Step, indices: Sequence[int]) -> PackedBatch:
        answers = dict(zip(step.rows, step.answers, strict=False))  # empty where none is drawn
        rows = []
        for index in indices:
            with self._reading:
                row = self._rows[index]
            number = answers.get(index)
            if number is not None:
                row = answering(row, acceptable_answers(row)[number])
            rows.append(row)
        return pack(self._encoder.family, self._encoder.encode_together(rows))
