"""One resolver for every MODEL argument: hub id, local model, run, checkpoint or adapter."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from vlmtune.data.media import ImagePolicy
from vlmtune.errors import UsageError
from vlmtune.hub import Hub, download_model
from vlmtune.models.builtin import BUILTIN, builtin_base
from vlmtune.models.contract import FILE, Contract, make_contract, verify_contract
from vlmtune.models.encode import Encoder
from vlmtune.models.families import load_family
from vlmtune.models.folder import read_json
from vlmtune.models.gptq import is_gptq
from vlmtune.models.load import BaseSource, LoadingConfig, load_model
from vlmtune.models.quantize import Quantization, QuantizationMethod, plan_quantization
from vlmtune.runs.best import chosen_checkpoint
from vlmtune.runs.folder import RunFolder
from vlmtune.tuning.apply import ADAPTER_CONFIG, Tuned, load_adapter

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from vlmtune.models.family import FamilyFacts

logger = logging.getLogger(__name__)

ORIGIN = "origin.json"  # beside a downloaded model: id, hub, revision
HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")


@dataclass(frozen=True)
class Resolved:
    """What a MODEL argument means.

    Attributes:
        kind: What it is.
        name: What the user wrote.
        base: The weights to load first.
        adapter: Folder of an adapter to put into them, or None.
        contract: The contract it was trained under, or None for a plain model.
    """

    kind: Literal["model", "adapter"]
    name: str
    base: BaseSource
    adapter: Path | None
    contract: Contract | None


@dataclass(frozen=True)
class OpenModel:
    """A model ready to be asked.

    Attributes:
        resolved: Where it came from.
        model: The model, adapters inside.
        adapter: peft's handle on the adapters, or None.
        encoder: The encoder of its contract.
    """

    resolved: Resolved
    model: PreTrainedModel
    adapter: PeftModel | None
    encoder: Encoder

    @property
    def contract(self) -> Contract:
        """The contract in force."""
        return self.encoder.contract


def resolve(
    argument: str | Path,
    *,
    base: str | None = None,
    hub: Hub = "huggingface",
    revision: str | None = None,
) -> Resolved:
    """Find out what a MODEL argument is; a hub id is downloaded.

    Args:
        argument: A hub id, a local model, a run, a checkpoint, an adapter, or ``builtin:base``.
        base: Where an adapter's base is now, if it moved; its weights must be the same.
        hub: Where a hub id is fetched from.
        revision: Branch, tag or commit of a hub id.

    Raises:
        UsageError: If it is nothing of the kind.
        HubError: If a hub id cannot be fetched.
    """
    folder = Path(argument)
    if folder.is_dir():
        return _resolve_folder(str(argument), folder, base)
    if isinstance(argument, str) and (argument == BUILTIN or HUB_ID.match(argument)):
        return Resolved("model", argument, fetch_base(argument, hub, revision), None, None)
    raise UsageError(
        f"MODEL: {str(argument)!r} is neither an existing folder (a model, a run, a checkpoint, an "
        "adapter), nor a hub id like Qwen/Qwen2-VL-2B-Instruct, nor builtin:base"
    )


def fetch_base(name: str, hub: Hub, revision: str | None) -> BaseSource:
    """A base by folder or hub id, or the built-in one.

    Raises:
        HubError: If a hub id cannot be fetched.
        ModelError: If this installation lacks the built-in one.
    """
    if name == BUILTIN:
        return builtin_base()
    folder = Path(name)
    if folder.is_dir():
        return _local(folder)
    if not HUB_ID.match(name):
        raise UsageError(
            f"model.base: {name!r} is neither an existing folder nor a hub id like "
            "Qwen/Qwen2-VL-2B-Instruct nor builtin:base"
        )
    downloaded = download_model(name, hub=hub, revision=revision)
    return BaseSource(downloaded.path, name, hub, downloaded.revision)


def base_of(contract: Contract, moved_to: str | None = None) -> BaseSource:
    """The base that a contract names, or the place where it is now.

    Raises:
        UsageError: If it is a folder that is not there any more.
        HubError: If it cannot be fetched.
    """
    identity = contract.base
    if moved_to is None and Path(identity.id).is_absolute() and not Path(identity.id).is_dir():
        raise UsageError(
            f"the base {identity.id} that this was trained on is not there any more; say where it "
            "is with --base DIR"
        )
    return fetch_base(moved_to or identity.id, identity.hub or "huggingface", identity.revision)


def open_model(
    resolved: Resolved,
    loading: LoadingConfig,
    *,
    image: ImagePolicy | None = None,
    backend: Literal["pil", "torchvision"] = "pil",
    before_adapter: Callable[[PreTrainedModel], None] | None = None,
) -> OpenModel:
    """Load a resolved model for asking.

    Args:
        resolved: What to load.
        loading: Device, dtype, and how few bits hold the base; None there means as trained.
        image: Image policy of a plain model, which has no contract; a contract always stands.
        backend: Image processor of a plain model.
        before_adapter: Called with the base before an adapter is put into it.

    Raises:
        ContractMismatchError: If the base is not the one that the adapter was trained on.
        ModelError: If weights or adapter do not fit.
    """
    device, dtype = loading.resolve()
    contract = resolved.contract
    family = load_family(
        str(resolved.base.folder), contract.processor.backend if contract else backend
    )
    if contract is None:
        contract = make_contract(family, resolved.base.identity(), image or ImagePolicy())
    else:
        found = contract.base.weights_sha256
        if resolved.kind == "adapter":
            found = resolved.base.identity().weights_sha256
        verify_contract(contract, family, found)
    quantization = _quantization(resolved, loading.quantization, family.facts)
    model = load_model(
        resolved.base.folder,
        dtype=dtype,
        device=device,
        quantization=quantization,
        device_map=loading.device_map,
    )
    tuned = Tuned(model, None)
    if resolved.adapter is not None:
        if before_adapter is not None:
            before_adapter(model)
        tuned = load_adapter(model, resolved.adapter, trainable=False)
    model.eval()
    in_force = contract.model_copy(update={"quantization": quantization})
    return OpenModel(resolved, model, tuned.adapter, Encoder(family, in_force))


def _quantization(resolved: Resolved, asked: str | None, facts: FamilyFacts) -> Quantization | None:
    """What is held in few bits: as it was trained, unless something else is asked for."""
    contract = resolved.contract
    trained = None if contract is None else contract.quantization
    if asked is None or (trained is not None and asked == trained.method):
        return trained
    if is_gptq(resolved.base.folder):
        raise UsageError(
            f"quantization: found {asked!r}, but the weights of {resolved.base.id} are packed in 4 "
            "bits by GPTQ and stay so; leave the option out"
        )
    if resolved.adapter is not None:
        over = "its own weights" if trained is None else trained.method
        under = "its own weights" if asked == "none" else asked
        logger.warning(
            "%s was trained over a base held in %s and is opened over %s: close to what was "
            "trained, not the same",
            resolved.name,
            over,
            under,
        )
    if asked == "none":
        return None
    return plan_quantization(resolved.base.folder, facts, cast(QuantizationMethod, asked))


def _local(folder: Path) -> BaseSource:
    """A model folder; what ``vlmtune download`` wrote into it says where it came from."""
    origin: dict[str, Any] = {}
    if (folder / ORIGIN).is_file():
        origin = read_json(folder / ORIGIN)
    return BaseSource(folder, str(folder.resolve()), origin.get("hub"), origin.get("revision"))


def _resolve_folder(name: str, folder: Path, base: str | None) -> Resolved:
    run = RunFolder(folder)
    if run.exists:
        return _resolve_folder(name, chosen_checkpoint(run), base)
    contract = Contract.read(folder) if (folder / FILE).is_file() else None
    if (folder / ADAPTER_CONFIG).is_file():
        if contract is None:
            raise UsageError(
                f"{folder} is an adapter without {FILE}: nothing says how its images were "
                "prepared. vlmtune writes the contract beside every adapter; copy it along"
            )
        source = base_of(contract, base)
        return Resolved("adapter", name, source, folder, contract)
    if (folder / "config.json").is_file():
        return Resolved("model", name, _local(folder), None, contract)
    raise UsageError(
        f"MODEL: {folder} holds no model (config.json), adapter ({ADAPTER_CONFIG}) or run "
        "(recipe.yaml)"
    )
