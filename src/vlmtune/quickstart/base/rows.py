"""What the base is pretrained on: rows of a picture, a prompt and an answer, without end."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from vlmtune.quickstart.base.cache import Shard
from vlmtune.quickstart.base.model import MERGE, PATCH, Batch, Spots
from vlmtune.quickstart.lines import line_ink, random_line
from vlmtune.quickstart.pictures import SIDE, worn
from vlmtune.quickstart.shapes import (
    Scene,
    Shape,
    cells,
    described,
    draw_scene,
    random_scene,
    reach,
    shares,
    spans,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TASKS = ("formula", "line", "shapes", "spans")
MOST_PATCHES = 2048
FEW, UNLIKE = 16, 1.7  # rows of a batch worth having, and how much larger than the smallest one
PROMPTS = {
    "formula": ("Read this formula aloud.", "Say this formula in words.", "How is this read?",
                "Read the formula.", "What does the formula say?"),
    "line": ("Read the text.", "What is written here?", "Copy this line.", "Read this line.",
             "What does the picture say?"),
    "shapes": ("Describe the picture.", "What do you see?", "What is in the picture?",
               "Which shapes are here?"),
    "spans": ("Describe exactly what is where.", "From where to where does each shape reach?"),
}  # fmt: skip
ASKED = ("How far does the {} reach?", "From where to where does the {} reach?",
         "What place does the {} take?")  # fmt: skip


@dataclass(frozen=True)
class Spot:
    """A shape in a row's picture.

    Attributes:
        words: Its colour and its kind.
        sides: Left, top, right, bottom as shares of the picture.
        cells: Numbers of the visual tokens in it.
        asked: Whether it alone is what the row asks for.
    """

    words: tuple[str, str]
    sides: tuple[float, ...]
    cells: tuple[int, ...]
    asked: bool


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        task: Index into ``TASKS``.
        page: ``(height, width)`` or ``(height, width, 3)``, whole tokens, 0 … 255.
        prompt: The question.
        answer: Its answer.
        spots: The shapes in its picture, where they are told to the base.
    """

    task: int
    page: np.ndarray
    prompt: str
    answer: str
    spots: tuple[Spot, ...] = ()

    @property
    def patches(self) -> int:
        """Patches of its picture."""
        return self.page.shape[0] * self.page.shape[1] // PATCH**2


class Rows:
    """An endless stream of rows, the same for the same seed and step.

    Args:
        seed: Seed of the stream.
        weights: How often each of ``TASKS`` comes.

    Attributes:
        weights: The same; to be changed at will.
        asks: Share of the rows of spans that ask for one shape by its name.
        finds: Whether rows with shapes tell where these are, spans come in any order, and an
            answer about one shape names it.
        longer: Whether of two formulas the longer one comes.
    """

    def __init__(self, seed: int, weights: Sequence[float]) -> None:
        self._seed, self.weights = seed, tuple(weights)
        self._shards: dict[int, Shard] = {}
        self.asks, self.finds, self.longer = 0.0, False, False

    def use(self, numbers: Sequence[int], read: Callable[[int], Shard]) -> None:
        """Take formulas from these shards alone; ``read`` fetches those that are not here yet."""
        if list(self._shards) != list(numbers):
            here = self._shards
            self._shards = {n: here[n] if n in here else read(n) for n in numbers}

    def step(self, number: int, count: int, ease: float) -> list[Row]:
        """The rows of an optimizer step.

        Args:
            number: The step.
            count: How many rows.
            ease: 1 for the shortest rows alone, 0 for all.
        """
        rng = random.Random(f"{self._seed} {number}")
        noise = np.random.default_rng([self._seed, number])
        tasks = rng.choices(range(len(TASKS)), self.weights, k=count)
        return [self._row(task, rng, noise, ease) for task in tasks]

    def _row(self, task: int, rng: random.Random, noise: np.random.Generator, ease: float) -> Row:
        name = TASKS[task]
        prompt = rng.choice(PROMPTS[name])
        if name == "formula":
            page, answer = self._formula(rng, noise, ease)
        elif name == "line":
            text = random_line(rng, rng.randint(1, max(2, round(16 * (1 - ease)))))
            page, answer = worn(line_ink(text, rng, rng.randint(17, 27)), rng, noise), text
        else:
            return self._scene(task, prompt, rng, ease)
        return Row(task, page, prompt, answer)

    def _scene(self, task: int, prompt: str, rng: random.Random, ease: float) -> Row:
        scene = random_scene(rng, 1 if rng.random() < ease else rng.choice((1, 2, 2, 3)))
        asked = None
        if TASKS[task] == "shapes":
            answer = described(scene)
        elif self.asks and rng.random() < self.asks:
            asked = rng.choice(scene.shapes)
            prompt, answer = rng.choice(ASKED).format(asked.kind), reach(asked, scene)
            if self.finds:
                answer = f"{asked.kind} {answer}"
        else:
            order = rng.sample(scene.shapes, len(scene.shapes)) if self.finds else ()
            answer = spans(scene, order)
        spots = tuple(_spot(shape, scene, shape is asked) for shape in scene.shapes)
        return Row(task, draw_scene(scene), prompt, answer, spots if self.finds else ())

    def _formula(
        self, rng: random.Random, noise: np.random.Generator, ease: float
    ) -> tuple[np.ndarray, str]:
        longest = 3 + 40 * (1 - ease)
        shards = list(self._shards.values())

        def drawn() -> tuple[int, Shard, int]:
            while True:
                shard = shards[rng.randrange(len(shards))]
                row = rng.randrange(len(shard.said))
                words = len(shard.said[row].split())
                if words <= longest:
                    return words, shard, row

        _, shard, row = max((drawn() for _ in range(1 + self.longer)), key=lambda drawn: drawn[0])
        return worn(shard.picture(row), rng, noise), shard.said[row]


def _spot(shape: Shape, scene: Scene, asked: bool) -> Spot:
    words = (shape.colour, shape.kind)
    return Spot(words, shares(shape, scene), cells(shape, scene, SIDE), asked)


class Collator:
    """Rows into padded batches, tokens as the one encoder makes them.

    Args:
        tokenizer: The base's.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer.backend_tokenizer
        self._known: dict[str, list[int]] = {}
        ids = tokenizer.get_added_vocab()
        self._image, self.end = ids["<|image_pad|>"], ids["<|im_end|>"]
        self._before = [ids["<|im_start|>"], *self._text("user\n"), ids["<|vision_start|>"]]
        self._after = [ids["<|vision_end|>"]]
        self._turn = [self.end, *self._text("\n"), ids["<|im_start|>"], *self._text("assistant\n")]

    def batches(self, rows: Sequence[Row], most: int = MOST_PATCHES) -> list[Batch]:
        """Rows of like size together, up to ``most`` patches in a batch."""
        chunks: list[list[Row]] = []
        for row in sorted(rows, key=lambda row: (row.patches, row.answer)):
            chunk = chunks[-1] if chunks else []
            full = (len(chunk) + 1) * row.patches > most
            padded = len(chunk) >= FEW and row.patches > UNLIKE * chunk[0].patches
            if not chunk or full or padded:
                chunks.append([])
            chunks[-1].append(row)
        return [self.batch(chunk) for chunk in chunks]

    def batch(self, rows: Sequence[Row]) -> Batch:
        """One padded batch."""
        grids = [(row.page.shape[0] // PATCH, row.page.shape[1] // PATCH) for row in rows]
        tokens = [self._tokens(row, grid) for row, grid in zip(rows, grids, strict=True)]
        # Few different shapes: the matrix library compiles a kernel for each new one.
        longest = _rounded(max(len(ids) for ids, _, _ in tokens), 8)
        most = _rounded(max(height * width for height, width in grids), 16)
        patches = np.zeros((len(rows), most, 3 * PATCH * PATCH), dtype=np.uint8)
        places = np.zeros((len(rows), most, 2), dtype=np.int64)
        seen = np.zeros((len(rows), most), dtype=bool)
        ids = np.full((len(rows), longest), self.end, dtype=np.int64)
        positions = np.zeros((3, len(rows), longest), dtype=np.int64)
        labels = np.full((len(rows), longest), -1, dtype=np.int64)
        for at, (row, grid, (own, trained, where)) in enumerate(
            zip(rows, grids, tokens, strict=True)
        ):
            count = grid[0] * grid[1]
            patches[at, :count], places[at, :count] = _patches(row.page), _places(*grid)
            seen[at, :count] = True
            ids[at, : len(own)] = own
            positions[:, at, : len(own)] = where
            labels[at, len(own) - 1 - trained : len(own) - 1] = own[-trained:]
        labelled = labels >= 0
        tasks = np.broadcast_to(np.array([row.task for row in rows])[:, None], labels.shape)
        return Batch(
            patches=torch.from_numpy(patches),
            places=torch.from_numpy(places),
            seen=torch.from_numpy(seen),
            ids=torch.from_numpy(ids),
            positions=torch.from_numpy(positions),
            predicts=torch.from_numpy(labelled),
            targets=torch.from_numpy(labels[labelled]),
            tasks=torch.from_numpy(tasks[labelled]),
            spots=self._spots(rows, longest),
        )

    def _spots(self, rows: Sequence[Row], longest: int) -> Spots | None:
        spots = [(at, spot) for at, row in enumerate(rows) for spot in row.spots]
        if not spots:
            return None
        sizes = [row.patches // MERGE**2 for row in rows]
        starts = np.cumsum([0, *sizes])
        inside = np.zeros((len(spots), sum(sizes)), dtype=bool)
        keys = np.zeros((len(spots), longest), dtype=bool)
        for number, (at, spot) in enumerate(spots):
            here = np.array(spot.cells)
            inside[number, starts[at] + here] = True
            keys[number, len(self._before) + here] = True
        words = [[self._text(f" {word}")[-1] for word in spot.words] for _, spot in spots]
        return Spots(
            rows=torch.tensor([at for at, _ in spots]),
            words=torch.tensor(words),
            sides=torch.tensor([spot.sides for _, spot in spots]),
            cells=torch.from_numpy(inside),
            keys=torch.from_numpy(keys),
            asked=torch.tensor([spot.asked for _, spot in spots]),
        )

    def _tokens(self, row: Row, grid: tuple[int, int]) -> tuple[list[int], int, np.ndarray]:
        """Ids, the number of trained ones at the end, and M-RoPE positions ``(3, tokens)``."""
        height, width = grid[0] // MERGE, grid[1] // MERGE
        answer = [*self._text(row.answer, keep=False), self.end]
        text = [*self._after, *self._text(row.prompt), *self._turn, *answer]
        start, picture = len(self._before), height * width
        positions = np.empty((3, start + picture + len(text)), dtype=np.int64)
        positions[:, :start] = np.arange(start)
        positions[0, start : start + picture] = start
        positions[1, start : start + picture] = start + np.repeat(np.arange(height), width)
        positions[2, start : start + picture] = start + np.tile(np.arange(width), height)
        positions[:, start + picture :] = start + max(height, width) + np.arange(len(text))
        return [*self._before, *[self._image] * picture, *text], len(answer), positions

    def _text(self, text: str, *, keep: bool = True) -> list[int]:
        if text not in self._known:
            ids = list(self._tokenizer.encode(text, add_special_tokens=False).ids)
            if not keep:
                return ids
            self._known[text] = ids
        return self._known[text]


def _rounded(count: int, unit: int) -> int:
    return -(-count // unit) * unit


def _patches(page: np.ndarray) -> np.ndarray:
    """Pixels of the patches ``(patches, 3 * 14 * 14)``, the four of a token side by side."""
    if page.ndim == 2:
        page = np.repeat(page[:, :, None], 3, axis=2)
    height, width = page.shape[0] // SIDE, page.shape[1] // SIDE
    split = page.reshape(height, MERGE, PATCH, width, MERGE, PATCH, 3)
    return split.transpose(0, 3, 1, 4, 6, 2, 5).reshape(height * width * MERGE**2, -1)


def _places(rows: int, columns: int) -> np.ndarray:
    """Row and column of each patch, in the order of ``_patches``."""
    grid = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), axis=-1)
    blocks = grid.reshape(rows // MERGE, MERGE, columns // MERGE, MERGE, 2)
    return blocks.transpose(0, 2, 1, 3, 4).reshape(-1, 2)
