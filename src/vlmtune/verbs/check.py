"""``check``: a dataset before training, alone or against the model that will be trained."""

from __future__ import annotations

from pathlib import Path

from vlmtune.checking.check import check_dataset
from vlmtune.checking.findings import CheckResult, Limits
from vlmtune.data.media import ImagePolicy
from vlmtune.models.contract import BaseModelIdentity, make_contract
from vlmtune.models.encode import Encoder
from vlmtune.models.families import load_family
from vlmtune.runs.resolve import resolve
from vlmtune.verbs.observer import Observer


def check(
    data: str | Path,
    model: str | Path | None = None,
    *,
    image: ImagePolicy | None = None,
    prompt: str | None = None,
    max_length: int = 8192,
    limits: Limits | None = None,
    observer: Observer | None = None,
) -> CheckResult:
    """Look at every row, and with a model at what it would see.

    Args:
        data: A prepared dataset.
        model: Hub id, local model, run, checkpoint or adapter; weights are not loaded.
        image: Image policy of a plain model; what was trained keeps its contract.
        prompt: Prompt of a plain model, as the recipe's ``data.prompt``.
        max_length: Most tokens of a row.
        limits: Findings that are accepted, by code: a count, or (a float) a part of all rows.
        observer: Who is told how it goes.
    """
    observer = observer or Observer()
    encoder = None
    if model is not None:
        observer.stage("opening the model")
        encoder = encoder_of(model, image or ImagePolicy(), prompt)
    return check_dataset(
        data,
        encoder,
        max_length=max_length,
        limits=limits,
        stage=observer.stage,
        progress=observer.progress,
    )


def encoder_of(model: str | Path, image: ImagePolicy, prompt: str | None = None) -> Encoder:
    """The encoder of a MODEL argument, without loading weights.

    Args:
        model: Hub id, local model, run, checkpoint or adapter.
        image: Image policy of a plain model; what was trained keeps its contract.
        prompt: Prompt of a plain model.
    """
    resolved = resolve(model)
    contract = resolved.contract
    family = load_family(
        str(resolved.base.folder), contract.processor.backend if contract else "pil"
    )
    if contract is None:
        # Nothing is compared with the weights here: hashing gigabytes would tell nothing.
        base = BaseModelIdentity(id=resolved.base.id, weights_sha256="")
        contract = make_contract(family, base, image, prompt=prompt)
    return Encoder(family, contract)
