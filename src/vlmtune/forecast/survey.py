"""What the rows of a split cost, from their headers alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from vlmtune.batching.planner import Plan
from vlmtune.data.answers import Answers, acceptable_answers, answering
from vlmtune.data.conversation import Conversation
from vlmtune.errors import DataError
from vlmtune.models.encode import Encoder
from vlmtune.training.prepare_rows import UNUSABLE, Dropped, Measured

MOST_STEPS = 5_000  # looked at one by one; of longer plans, so many spread over it


@dataclass(frozen=True)
class Survey:
    """A split, row by row.

    Attributes:
        measured: What the planner needs.
        labels: Tokens trained on, ``(rows,)``.
        areas: Pixels at which the model sees a row's images, ``(rows,)``.
        squares: The sum of the squares of each image's, ``(rows,)``.
        images: Number of images, ``(rows,)``.
    """

    measured: Measured
    labels: np.ndarray
    areas: np.ndarray
    squares: np.ndarray
    images: np.ndarray


def survey(
    rows: Sequence[Conversation],
    encoder: Encoder,
    progress: Callable[[int, int], None],
    answers: Answers = "fixed",
) -> Survey:
    """Look at every row's tokens and at the sizes of its images; nothing is decoded."""
    count = len(rows)
    lengths = np.zeros(count, dtype=np.int64)
    labels, areas, squares, images = (np.zeros(count) for _ in range(4))
    visual = [0] * count
    choices = np.ones(count, dtype=np.int64)
    unusable = []
    for index in range(count):
        row = rows[index]
        others = acceptable_answers(row) if answers == "drawn" else ()
        choices[index] = len(others)
        try:
            spoken = [answering(row, text) for text in others] if len(others) > 1 else [row]
            tokens = max((encoder.tokens(each) for each in spoken), key=len)
        except DataError as error:
            lengths[index] = UNUSABLE
            unusable.append(Dropped(row.id, error.code, str(error)))
        else:
            policy = encoder.family.row_policy(encoder.contract.image, len(tokens.image_sizes))
            seen = [encoder.family.resized(size, policy) for size in tokens.image_sizes]
            pixels = [float(size.width * size.height) for size in seen]
            lengths[index], labels[index] = len(tokens), tokens.trained
            visual[index] = tokens.visual
            areas[index], images[index] = sum(pixels), len(pixels)
            squares[index] = sum(each * each for each in pixels)
        progress(index + 1, count)
    measured = Measured(
        lengths=[int(length) for length in lengths],
        choices=[int(choice) for choice in choices] if answers == "drawn" else None,
        unusable=unusable,
        packs=encoder.family.facts.packs,
        visual=visual,
    )
    return Survey(measured, labels, areas, squares, images)


@dataclass(frozen=True)
class Amounts:
    """What FLOPs are proportional to, of a pack or of a whole run.

    Attributes:
        tokens: Tokens.
        token_squares: Sum of the squares of the rows' tokens.
        labels: Tokens trained on.
        area: Pixels.
        area_squares: Sum of the squares of the images' pixels.
    """

    tokens: float
    token_squares: float
    labels: float
    area: float
    area_squares: float


def amounts(
    found: Survey, plan: Plan, rows: Sequence[int] | np.ndarray, scale: float = 1.0
) -> Amounts:
    """The amounts of some rows, each as often as it stands there, times a scale."""
    places = np.array(rows, dtype=np.int64)
    lengths = plan.lengths[places].astype(np.float64)
    return Amounts(
        tokens=scale * float(lengths.sum()),
        token_squares=scale * float((lengths * lengths).sum()),
        labels=scale * float(found.labels[places].sum()),
        area=scale * float(found.areas[places].sum()),
        area_squares=scale * float(found.squares[places].sum()),
    )


@dataclass(frozen=True)
class Cut:
    """How a plan is cut into forwards.

    Attributes:
        forwards: Of a step, on average.
        most: Of a step, at most.
        longest: The pack with the most tokens, as indices of rows.
        largest: The pack with the most visual tokens.
        rows: The rows of the steps that were looked at, each as often as it is trained.
        scale: By how much the whole run is longer than these.
    """

    forwards: float
    most: int
    longest: tuple[int, ...]
    largest: tuple[int, ...]
    rows: np.ndarray
    scale: float


def cut(plan: Plan) -> Cut:
    """Pack the steps of a plan, or ``MOST_STEPS`` of them."""
    visual = np.zeros(len(plan.lengths)) if plan.visual is None else plan.visual
    numbers = np.unique(np.linspace(1, plan.steps, min(plan.steps, MOST_STEPS)).astype(np.int64))
    counts: list[int] = []
    seen: list[int] = []
    longest: tuple[float, tuple[int, ...]] = (-1.0, ())
    largest: tuple[float, tuple[int, ...]] = (-1.0, ())
    for number in numbers:
        step = plan.step(int(number))
        packs = step.packs
        counts.append(len(packs))
        seen += step.rows
        for pack in packs:
            rows = list(pack)
            longest = max(longest, (float(plan.lengths[rows].sum()), pack))
            largest = max(largest, (float(visual[rows].sum()), pack))
    # A row that stands alone is longer than what was seen, where not all was.
    single = int(plan.kept[np.argmax(plan.lengths[plan.kept])])
    longest = max(longest, (float(plan.lengths[single]), (single,)))
    return Cut(
        forwards=float(np.mean(counts)),
        most=max(counts),
        longest=longest[1],
        largest=largest[1],
        rows=np.array(seen, dtype=np.int64),
        scale=plan.samples / len(seen),
    )
