"""Rows with and without images, what runs on them are made of, and what came of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from distributed.processes import together
from tiny_rows import asked, picture, row, turn
from tiny_world import lines, tiny_recipe
from vlmtune.data.conversation import Conversation
from vlmtune.models.load import DTYPES
from vlmtune.recipe import Recipe
from vlmtune.runs.checkpoints import checkpoints
from vlmtune.training.saving import Saver
from vlmtune.tuning import apply
from vlmtune.verbs.train import train

MakeMixed = Callable[..., Recipe]
STEPS = 4
EVERYWHERE = {
    "rank": 4,
    "alpha": 8,
    "dropout": 0.0,
    "targets": "all-linear",
    "train": ["vision", "projector", "language"],
}
TUNINGS = {"lora": EVERYWHERE, "full": {"method": "full"}}
FILES = ("adapter_model.safetensors", "model.safetensors")


def mixed_rows(name: str, count: int) -> list[Conversation]:
    """A third has no image, a third one, a third several."""
    rows = []
    for number in range(count):
        images = [picture((30 + 7 * number, 40), seed=n) for n in range((0, 1, 3)[number % 3])]
        if images:
            made = asked(f"What is number {number}?", f"It is {number}.", *images)
        else:
            made = row(turn("user", f"Say {number}."), turn("assistant", f"{number}!"))
        rows.append(Conversation(f"{name}-{number}", made.messages, made.images))
    return rows


def mixed_recipe(base: Path, data: Path, **changes: Any) -> Recipe:
    """A recipe without dropout, whose steps are several forwards."""
    values = {
        "tuning": EVERYWHERE,
        "training__max_steps": STEPS,
        "training__batch_size": 6,
        "training__token_budget": 120,
        "training__learning_rate": 1e-3,
        "evaluation__probe": 0,
    }
    return tiny_recipe(base, data, **{**values, **changes})


def figures(run: Path) -> Tensor:
    """Loss, norm of the gradient, labels and tokens of each step."""
    names = ("loss", "gradient_norm", "labels", "tokens")
    steps = lines(run / "metrics.jsonl")
    return torch.tensor([[step[name] for name in names] for step in steps], dtype=torch.float64)


def weights(run: Path) -> dict[str, Tensor]:
    """What the last checkpoint holds of the model."""
    last = checkpoints(run / "checkpoints")[-1]
    (file,) = (last / name for name in FILES if (last / name).exists())
    return load_file(file)


def distance(run: Path, other: Path) -> float:
    """The largest difference between the weights of two runs."""
    ours, theirs = weights(run), weights(other)
    assert ours.keys() == theirs.keys()
    return max(float((ours[name].double() - theirs[name].double()).abs().max()) for name in ours)


class CutShortError(Exception):
    """Stands for a kill after the first checkpoint."""


def _save_and_stop(original: Callable[..., None]) -> Callable[..., None]:
    def save(self: Saver, state: Any) -> None:
        original(self, state)
        self.wait()
        raise CutShortError

    return save


def count_in_double() -> None:
    """Hold and train weights in float64, in this process, which should end soon."""

    def train_in_double(model: PreTrainedModel) -> None:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.double()

    DTYPES["fp32"] = torch.float64
    apply._train_in_fp32 = train_in_double


def trained(
    recipe: Recipe, run: Path, count: int = 1, *, cut: bool = False, double: bool = False
) -> Path:
    """A run of some processes; goes on with one that is there.

    Args:
        recipe: A recipe.
        run: The folder.
        count: How many processes.
        cut: End at the first checkpoint.
        double: Count in float64.
    """

    def work(_: Any) -> str:
        if double:
            count_in_double()
        if cut:
            Saver.save = _save_and_stop(Saver.save)  # type: ignore[method-assign]
        try:
            train(recipe, run_dir=run, resume=True)
        except CutShortError:
            return "cut"
        return "done"

    ends = together(count, work)
    assert ends == dict.fromkeys(range(count), "cut" if cut else "done"), ends
    return run
