"""A recipe: each part's own configuration, composed. YAML plus ``a.b=c``; all mistakes at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from vlmtune.config import Config
from vlmtune.data.answers import Answers
from vlmtune.data.media import ImagePolicy
from vlmtune.data.options import DataSource
from vlmtune.errors import RecipeError
from vlmtune.evaluation.config import EvaluationConfig
from vlmtune.hub import Hub
from vlmtune.training.config import Precision, TrainingConfig
from vlmtune.training.distributed.config import DistributedConfig
from vlmtune.training.tracking.config import TrackingConfig
from vlmtune.tuning.config import TuningConfig

QuantizationMethod = Literal["nf4", "int8"]


class ModelConfig(Config):
    """The recipe's ``model`` section.

    Attributes:
        base: Hub id or local folder of the base; ``builtin:base`` is the quickstart's own.
        hub: Where a hub id is fetched from.
        revision: Branch, tag or commit; the commit it meant is recorded.
        dtype: Number format of the base's weights; None: ``training.precision`` for adapters, fp32
            for full fine-tuning.
        device: A torch device; None: a GPU if there is one.
        quantization: ``nf4`` holds the language model's weights in 4 bits; ``tuning.method: qlora``
            implies it. ``int8`` is for ``eval`` and ``predict``.
        device_map: ``auto`` spreads the layers over all GPUs.
        backend: What resizes images; recorded in the contract.
    """

    base: str
    hub: Hub = "huggingface"
    revision: str | None = None
    dtype: Precision | None = None
    device: str | None = None
    quantization: QuantizationMethod | None = None
    device_map: Literal["auto"] | None = None
    backend: Literal["pil", "torchvision"] = "pil"


class DataConfig(Config):
    """The recipe's ``data`` section.

    Attributes:
        path: A prepared dataset.
        sources: Several of them instead, each with a weight; see ``vlmtune.data.mixture``.
        prompt: Text after the images of a user turn that has no text of its own; it becomes part of
            the contract, so that serving asks the same.
        instruction: Text before the images of a user turn that begins with an image; part of the
            contract like ``prompt``. ``predict --instruction`` puts another one there.
        system_prompt: System turn of rows that have none; None: the template's own.
        answers: What a row with several references is trained on: always the answer that
            ``prepare`` put into it, or one of them, ``drawn`` by seed each time. All of them remain
            references for the metrics.
        max_length: Most tokens of a row; longer ones are never cut.
        too_long: Leave longer rows out (with an entry in the ledger), or refuse to start.
    """

    path: str | None = None
    sources: tuple[DataSource, ...] = ()
    prompt: str | None = None
    instruction: str | None = None
    system_prompt: str | None = None
    answers: Answers = "fixed"
    max_length: int = Field(default=8192, ge=1)
    too_long: Literal["drop", "error"] = "drop"

    @model_validator(mode="after")
    def _has_one_place(self) -> Self:
        if self.path is not None and self.sources:
            raise ValueError(
                "path and sources exclude each other; name one prepared dataset in data.path, or "
                "all in data.sources"
            )
        return self


class Recipe(Config):
    """All that decides a run.

    Attributes:
        name: Name of the run's folder unless ``--run`` says otherwise.
        description: One line for ``vlmtune recipes``.
        model: The base.
        data: What is trained on.
        image: What happens to every image.
        tuning: Which parameters train.
        training: How they move.
        evaluation: What is measured.
        tracking: Trackers to report to.
        distributed: How several processes hold the weights.
    """

    name: str = Field(pattern=r"^[\w.-]+$")
    description: str = ""
    model: ModelConfig
    data: DataConfig = DataConfig()
    image: ImagePolicy = ImagePolicy()
    tuning: TuningConfig = TuningConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    tracking: TrackingConfig = TrackingConfig()
    distributed: DistributedConfig = DistributedConfig()

    @property
    def quantization(self) -> QuantizationMethod | None:
        """How the base is held while it is trained over."""
        return "nf4" if self.tuning.method == "qlora" else self.model.quantization

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        faults = list(self._faults())
        if faults:
            raise ValueError("; ".join(faults))
        return self

    def _faults(self) -> Iterator[str]:
        """What each section may say, but not together."""
        model, tuning = self.model, self.tuning
        if tuning.method == "full" and model.dtype == "fp16":
            yield "model.dtype: full fine-tuning of fp16 weights diverges; use bf16 or fp32"
        if tuning.method == "full" and model.quantization is not None:
            yield (
                f"model.quantization: full fine-tuning changes the weights themselves, and those "
                f"of {model.quantization} cannot take small steps; use tuning.method=qlora"
            )
        elif model.quantization == "int8":
            yield (
                "model.quantization: int8 rounds the activations too, so that no merged weights "
                "would be what was trained; train over nf4, and give --quantization int8 to eval "
                "or predict"
            )
        if tuning.init == "orthogonal" and model.quantization == "nf4":
            yield "tuning.init: orthogonal cannot begin over 4 bits; use default or gaussian"
        if model.device_map is not None and model.device is not None:
            yield (
                f"model.device_map: auto spreads the layers over all GPUs, model.device="
                f"{model.device} puts them on one; give one of the two"
            )
        if self.distributed.cuts and self.quantization is not None:
            yield (
                f"distributed.strategy: {self.distributed.strategy} cannot cut a base in "
                f"{self.quantization} among the processes; use ddp, where each holds it whole"
            )
        if self.distributed.zero and self.training.precision == "fp16":
            yield (
                f"distributed.strategy: {self.distributed.strategy} would scale the loss in a way "
                "of its own; train in bf16 or fp32, or use ddp or fsdp2"
            )
        if self.distributed.cuts and model.device_map is not None:
            yield (
                "model.device_map: auto spreads the layers over all GPUs, distributed.strategy="
                f"{self.distributed.strategy} cuts each layer; give one of the two"
            )

    def to_yaml(self) -> str:
        """The resolved recipe, every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def as_recipe(recipe: Recipe | str | Path, overrides: Mapping[str, Any]) -> Recipe:
    """A recipe as the verbs' functions are given it.

    Args:
        recipe: A recipe, the name of a shipped one, or a YAML file.
        overrides: Options with ``__`` for the dot, for a recipe that has to be loaded.
    """
    if isinstance(recipe, Recipe):
        return recipe
    return load_recipe(recipe, [f"{n.replace('__', '.')}={v}" for n, v in overrides.items()])


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply overrides.

    Args:
        source: Name of a shipped recipe, or a YAML file.
        overrides: ``training.batch_size=8`` and the like; values are YAML.

    Raises:
        RecipeError: With every mistake, each with its dotted name.
    """
    name, text = _read(source)
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{name} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{name} holds no options; expected sections like model, data, training")
    for override in overrides:
        _override(values, override)
    return recipe_from(values, name)


def recipe_from(values: Mapping[str, Any], name: str = "recipe") -> Recipe:
    """A recipe from nested values.

    Raises:
        RecipeError: With every mistake.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        lines = [_explain(fault["loc"], fault["msg"], fault["type"]) for fault in error.errors()]
        raise RecipeError(f"{name} has {len(lines)} mistake(s): " + "; ".join(lines)) from error


def shipped_recipes() -> dict[str, str]:
    """Names of the shipped recipes and their YAML."""
    folder = resources.files("vlmtune") / "recipes"
    return {
        entry.name.removesuffix(".yaml"): entry.read_text(encoding="utf-8")
        for entry in sorted(folder.iterdir(), key=lambda entry: entry.name)
        if entry.name.endswith(".yaml")
    }


def option_names(model: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[str]:
    """Dotted names of all options, in order."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from option_names(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


def _read(source: str | Path) -> tuple[str, str]:
    path = Path(source)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        try:
            return str(path), path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"the recipe {path} cannot be read: {error}") from error
    recipes = shipped_recipes()
    if str(source) in recipes:
        return str(source), recipes[str(source)]
    nearest = get_close_matches(str(source), recipes, n=1)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    raise RecipeError(
        f"there is no recipe {str(source)!r}; {hint}shipped are {', '.join(recipes)}. A recipe of "
        "your own is a .yaml file: vlmtune recipes copy NAME FILE"
    )


def _override(values: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name.strip():
        raise RecipeError(
            f"{override!r} is no override; expected a.b=c, e.g. training.batch_size=8"
        )
    try:
        value = yaml.safe_load(text) if text else None
    except yaml.YAMLError:
        value = text
    *sections, last = name.strip().split(".")
    place = values
    for section in sections:
        below = place.setdefault(section, {})
        if not isinstance(below, dict):
            raise RecipeError(_explain(tuple(name.split(".")), "", "extra_forbidden"))
        place = below
    place[last] = value


def _explain(location: tuple[int | str, ...], message: str, kind: str) -> str:
    name = ".".join(str(part) for part in location)
    if kind == "extra_forbidden":
        known = [*Recipe.model_fields, *option_names()]
        last = name.rsplit(".", 1)[-1]
        nearest = get_close_matches(name, known, n=1) or [
            option for option in known if option.rsplit(".", 1)[-1] == last
        ]
        return f"{name}: no such option" + (f", did you mean {nearest[0]}?" if nearest else "")
    if kind == "missing":
        return f"{name}: missing"
    message = message.removeprefix("Value error, ")
    return f"{name}: {message}" if name else message
