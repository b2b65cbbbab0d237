"""``inspect``: rows of a dataset as a model sees them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vlmtune.checking.inspect import SeenRow, see
from vlmtune.checking.inspect_page import write_inspect_page
from vlmtune.data.dataset import PreparedDataset
from vlmtune.data.media import ImagePolicy
from vlmtune.errors import UsageError
from vlmtune.verbs.check import encoder_of
from vlmtune.verbs.observer import Observer


def inspect(  # noqa: PLR0913
    data: str | Path,
    model: str | Path,
    *,
    rows: int = 3,
    ids: Sequence[str] = (),
    split: str = "train",
    html: str | Path | None = None,
    image: ImagePolicy | None = None,
    prompt: str | None = None,
    observer: Observer | None = None,
) -> list[SeenRow]:
    """Encode rows as training would, and take them apart for people to look at.

    Args:
        data: A prepared dataset.
        model: Hub id, local model, run, checkpoint or adapter; weights are not loaded.
        rows: The first so many rows, where no ``ids`` are given.
        ids: The rows of these ids.
        split: Their split.
        html: A page to write.
        image: Image policy of a plain model; what was trained keeps its contract.
        prompt: Prompt of a plain model, as the recipe's ``data.prompt``.
        observer: Who is told how it goes.

    Raises:
        UsageError: If there is no such row.
        DataError: If a row cannot be encoded, as training could not either.
    """
    observer = observer or Observer()
    observer.stage("opening the model")
    encoder = encoder_of(model, image or ImagePolicy(), prompt)
    chosen = PreparedDataset.open(data).split(split)
    places = _places(chosen.ids, ids) if ids else range(min(rows, len(chosen)))
    seen = [see(chosen[place], encoder, f"{split}:{place}") for place in places]
    if html is not None:
        write_inspect_page(Path(html), seen, str(data), str(model))
    return seen


def _places(known: Sequence[str], wanted: Sequence[str]) -> list[int]:
    place = {identity: number for number, identity in enumerate(known)}
    missing = [identity for identity in wanted if identity not in place]
    if missing:
        raise UsageError(
            f"--ids: no row {missing[0]!r} in this split; ids look like {', '.join(known[:3])}"
        )
    return [place[identity] for identity in wanted]
