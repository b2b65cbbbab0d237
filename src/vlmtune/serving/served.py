"""The models that a server answers with: a base, adapters on it, or merged weights."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmtune.data.media import ImagePolicy
from vlmtune.errors import UsageError
from vlmtune.models.contract import verify_contract
from vlmtune.models.encode import Encoder
from vlmtune.models.families import load_family
from vlmtune.models.load import LoadingConfig
from vlmtune.runs.folder import RunFolder
from vlmtune.runs.resolve import OpenModel, Resolved, open_model, resolve
from vlmtune.serving.errors import UnknownModelError
from vlmtune.serving.limits import MAX_SOURCE_PIXELS
from vlmtune.tuning.apply import load_adapter

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

FIRST = "default"  # peft's name of the adapter that comes with the model


@dataclass(frozen=True)
class ServedModel:
    """What answers under one name.

    Attributes:
        name: What requests call it.
        encoder: The encoder of its contract.
        adapter: peft's name of its adapter; None is the base.
    """

    name: str
    encoder: Encoder
    adapter: str | None


class Catalogue:
    """The names that something answers under, each with its encoder."""

    def __init__(self, models: Mapping[str, ServedModel]) -> None:
        self.models = dict(models)

    @property
    def first(self) -> ServedModel:
        """What is asked where no name is given."""
        return next(iter(self.models.values()))

    def named(self, name: str | None) -> ServedModel:
        """What answers under a name.

        Raises:
            UnknownModelError: If nothing does.
        """
        if name is None:
            return self.first
        if name not in self.models:
            known = ", ".join(self.models)
            raise UnknownModelError(
                f"the model {name[:200]!r} is not served here; there is {known}", param="model"
            )
        return self.models[name]


class Served(Catalogue):
    """Weights in memory once, and the names they answer under. Used by one thread at a time."""

    def __init__(
        self, model: PreTrainedModel, adapter: PeftModel | None, models: Mapping[str, ServedModel]
    ) -> None:
        super().__init__(models)
        self.model = model
        self._peft: Any = adapter
        self._active = self.first.adapter
        if adapter is not None:
            self._activate(self._active)

    def use(self, served: ServedModel) -> None:
        """Let the weights answer as one of the models."""
        if served.adapter != self._active:
            self._activate(served.adapter)
            self._active = served.adapter

    def _activate(self, adapter: str | None) -> None:
        if adapter is None:
            self._peft.base_model.disable_adapter_layers()
        else:
            self._peft.base_model.enable_adapter_layers()
            self._peft.set_adapter(adapter, inference_mode=True)

    @property
    def context(self) -> int | None:
        """Most tokens of a question and its answer together; None where the model does not say."""
        text = self.model.config.get_text_config().to_dict()
        length = text.get("max_position_embeddings")
        return length if isinstance(length, int) else None


def open_served(  # noqa: PLR0913
    model: str | Path,
    *,
    name: str | None = None,
    adapters: Mapping[str, str | Path] | None = None,
    base_name: str | None = None,
    image: ImagePolicy | None = None,
    base: str | None = None,
    loading: LoadingConfig | None = None,
    max_source_pixels: int = MAX_SOURCE_PIXELS,
) -> Served:
    """Load what is to be served.

    Args:
        model: Hub id, local model, run, checkpoint or adapter.
        name: What requests call it; None takes the folder's name or the hub id.
        adapters: Further adapters on the same base, by the name that requests use.
        base_name: Where ``model`` is an adapter, serve its base under this name too, with the
            adapter's contract: the same question, before and after.
        image: Image policy of a plain model.
        base: Where an adapter's base is now, if it moved.
        loading: Device, dtype, quantization.
        max_source_pixels: Refuse larger images from their header; the contract's own limit stands.

    Raises:
        UsageError: If a name is given twice, or what should be an adapter is none.
        ContractMismatchError: If an adapter was trained on another base.
    """
    resolved = resolve(model, base=base)
    own_name = name or default_name(model)
    if base_name is not None and resolved.adapter is None:
        raise UsageError(f"{model} is no adapter: it has no base beside it to compare with")
    names = [own_name, *([base_name] if base_name else []), *(adapters or {})]
    if len(set(names)) < len(names):
        raise UsageError(f"--adapter, --name: a name is given twice: {', '.join(names)}")
    further = {each: _adapter(each, path, resolved) for each, path in (adapters or {}).items()}
    opened = open_model(resolved, loading or LoadingConfig(), image=image)
    first = FIRST if opened.adapter is not None else None
    models = [ServedModel(own_name, opened.encoder, first)]
    if base_name is not None:
        models.append(ServedModel(base_name, opened.encoder, None))
    peft = opened.adapter
    for number, (served_as, found) in enumerate(further.items()):
        assert found.adapter is not None
        encoder, inner = _encoder(served_as, found, opened), f"adapter{number}"
        peft = load_adapter(
            opened.model, found.adapter, trainable=False, beside=peft, name=inner
        ).adapter
        models.append(ServedModel(served_as, encoder, inner))
    opened.model.eval()
    models = [limited(each, max_source_pixels) for each in models]
    return Served(opened.model, peft, {each.name: each for each in models})


def default_name(model: str | Path) -> str:
    """What requests call a model: a hub id, or the name of the folder; never a path."""
    folder = Path(model)
    if not folder.is_dir():
        return str(model)
    path = folder.resolve()
    if path.parent.name == "checkpoints" and RunFolder(path.parent.parent).exists:
        return f"{path.parent.parent.name}-{path.name}"
    return path.name


def limited(served: ServedModel, pixels: int = MAX_SOURCE_PIXELS) -> ServedModel:
    """A model that refuses larger images from their header; the contract's own limit stands."""
    contract = served.encoder.contract
    if contract.image.max_source_pixels <= pixels:
        return served
    image = contract.image.model_copy(update={"max_source_pixels": pixels})
    contract = contract.model_copy(update={"image": image})
    return replace(served, encoder=Encoder(served.encoder.family, contract))


def _adapter(name: str, folder: str | Path, base: Resolved) -> Resolved:
    """A further adapter, whose base must be the one that is served."""
    resolved = resolve(folder, base=str(base.base.folder))
    if resolved.adapter is None:
        raise UsageError(
            f"--adapter {name}: {folder} is no adapter, nor a run that trained one; serve it by "
            "itself"
        )
    return resolved


def _encoder(name: str, resolved: Resolved, opened: OpenModel) -> Encoder:
    """The encoder of a further adapter's own contract.

    Raises:
        ContractMismatchError: If it was trained on another base.
    """
    contract = resolved.contract
    assert contract is not None  # an adapter without one is refused by ``resolve``
    family = load_family(str(resolved.base.folder), contract.processor.backend)
    verify_contract(contract, family, resolved.base.identity().weights_sha256)
    trained, held = contract.quantization, opened.contract.quantization
    if trained != held:
        logger.warning(
            "--adapter %s was trained over a base held in %s and answers over %s: close to what "
            "was trained, not the same",
            name,
            trained.method if trained else "its own weights",
            held.method if held else "its own weights",
        )
    return Encoder(family, contract.model_copy(update={"quantization": held}))
