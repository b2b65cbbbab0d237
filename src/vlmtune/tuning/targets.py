"""Which layers get adapters, and which modules train in full beside them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from vlmtune.errors import RecipeError
from vlmtune.models.family import FamilyFacts
from vlmtune.models.quantize import within
from vlmtune.tuning.config import ALL_LINEAR, Part, TuningConfig
from vlmtune.tuning.parts import part_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

INDEX = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class Targets:
    """Where adapters go.

    Attributes:
        adapted: Full names of the layers that get adapters.
        saved: Full names of the modules that train in full.
        tied: Whether a saved module is an embedding that shares its weights with the output layer;
            it goes on sharing them.
    """

    adapted: tuple[str, ...]
    saved: tuple[str, ...]
    tied: bool


def find_targets(model: PreTrainedModel, config: TuningConfig, facts: FamilyFacts) -> Targets:
    """The layers and modules that a recipe means.

    Raises:
        RecipeError: If a name or an expression matches nothing, or a part that should train gets
            nothing to train.
    """
    finder = _Finder(model, config, facts)
    adapted = finder.adapted()
    saved, tied = finder.saved(adapted)
    finder.require_parts((*adapted, *saved))
    return Targets(adapted, saved, tied)


def exact_pattern(chosen: Sequence[str], modules: Iterable[str]) -> str:
    """A regular expression that matches these modules and none of the others.

    The number of a layer becomes any number wherever all layers of a shape are chosen, so that
    what an adapter's configuration says stays readable.
    """
    alike: dict[str, set[str]] = defaultdict(set)
    for name in modules:
        alike[INDEX.sub("#", name)].add(name)
    wanted: dict[str, set[str]] = defaultdict(set)
    for name in chosen:
        wanted[INDEX.sub("#", name)].add(name)
    alternatives: list[str] = []
    for shape, names in wanted.items():
        if names == alike[shape]:
            alternatives.append(re.escape(shape).replace(re.escape("#"), r"\d+"))
        else:
            alternatives += [re.escape(name) for name in sorted(names)]
    return "|".join(alternatives)


class _Finder:
    def __init__(self, model: PreTrainedModel, config: TuningConfig, facts: FamilyFacts) -> None:
        self.config, self.facts = config, facts
        self.modules: dict[str, nn.Module] = {name: m for name, m in model.named_modules() if name}
        self.linear = [name for name, m in self.modules.items() if isinstance(m, nn.Linear)]
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        self.head = next((name for name, m in self.modules.items() if m is head), None)
        self.embedding = next((name for name, m in self.modules.items() if m is embedding), None)
        weights: tuple[Any, Any] = (head and head.weight, embedding and embedding.weight)
        self.ties = weights[0] is not None and weights[0] is weights[1]

    def adapted(self) -> tuple[str, ...]:
        targets, parts = self.config.targets, self.config.trained_parts()
        if targets == ALL_LINEAR:
            chosen = {name for name in self.linear if name != self.head}
            return tuple(name for name in self.linear if name in chosen & self._in(parts))
        if isinstance(targets, str):
            return self._by_expression(targets, parts)
        names = targets if targets is not None else self.facts.lora_targets
        if not names:
            raise RecipeError(
                f"tuning.targets: the family {self.facts.name} names no layers of its own; give "
                f"names, or {ALL_LINEAR}"
            )
        chosen = {layer for name in names for layer in self._by_name(name, parts)}
        return tuple(name for name in self.linear if name in chosen)

    def _by_expression(self, expression: str, parts: Sequence[Part]) -> tuple[str, ...]:
        matched = [name for name in self.modules if re.fullmatch(expression, name)]
        if not matched:
            raise RecipeError(
                f"tuning.targets: the expression {expression!r} matches no module of the model; "
                "it is compared with full names like "
                f"{self.linear[0]!r} (a list of short names is written [q_proj, v_proj]). Linear "
                f"layers are named {_short(self.linear)}"
            )
        for name in matched:
            if name not in self.linear:
                raise RecipeError(
                    f"tuning.targets: the expression matches {name}, a "
                    f"{type(self.modules[name]).__name__}; adapters go into linear layers. Narrow "
                    "the expression (modules that train in full stand in tuning.modules_to_save)"
                )
        reached = self._in(parts)
        chosen = tuple(name for name in matched if name in reached)
        if not chosen:
            raise RecipeError(
                f"tuning.targets: all {len(matched)} layers that the expression matches (first: "
                f"{matched[0]}) are in parts that do not train; see tuning.train and tuning.freeze"
            )
        return chosen

    def _by_name(self, name: str, parts: Sequence[Part]) -> list[str]:
        everywhere = [layer for layer in self.linear if _ends(layer, name)]
        reached = self._in(parts)
        found = [layer for layer in everywhere if layer in reached]
        if found:
            return found
        if everywhere:
            others = sorted({part_of(layer, self.facts) for layer in everywhere})
            raise RecipeError(
                f"tuning.targets: {name!r} is a layer of {', '.join(others)} alone, which does not "
                f"train; name the part in tuning.train. Linear layers of {', '.join(parts)} are "
                f"named {_short(layer for layer in self.linear if layer in reached)}"
            )
        raise RecipeError(
            f"tuning.targets: {name!r} matches no module of the model; linear layers are named "
            f"{_short(self.linear)}"
        )

    def saved(self, adapted: Sequence[str]) -> tuple[tuple[str, ...], bool]:
        chosen: list[str] = []
        for name in self.config.modules_to_save:
            found = [module for module in self.modules if _ends(module, name)]
            if not found:
                raise RecipeError(
                    f"tuning.modules_to_save: {name!r} matches no module of the model; the last "
                    f"parts of names are {_short(self.modules)}"
                )
            chosen += [module for module in found if module not in chosen]
        tied = self.ties and any(name in (self.head, self.embedding) for name in chosen)
        if tied:
            # One tensor under two names: it is trained, and saved, as the embedding.
            if self.head in adapted:
                raise RecipeError(
                    f"tuning.modules_to_save: {self.embedding} and {self.head} share their "
                    f"weights, and tuning.targets adapts {self.head}; choose one of the two"
                )
            chosen = [name for name in chosen if name not in (self.head, self.embedding)]
            chosen.append(str(self.embedding))
        for name in chosen:
            self._require_savable(name, chosen, adapted)
        return tuple(chosen), tied

    def _require_savable(self, name: str, chosen: Sequence[str], adapted: Sequence[str]) -> None:
        module = self.modules[name]
        parameters = [f"{name}.{inner}" for inner, _ in module.named_parameters()]
        if not parameters or isinstance(module, nn.ModuleList | nn.ModuleDict):
            raise RecipeError(
                f"tuning.modules_to_save: {name} is a {type(module).__name__}, which has no "
                "weights of its own to train; name modules inside or around it"
            )
        frozen = {part_of(inner, self.facts) for inner in parameters} & set(self.config.freeze)
        if frozen:
            raise RecipeError(
                f"tuning.modules_to_save: {name} belongs to the {min(frozen)} part, which "
                "tuning.freeze freezes; take it out of one of the two"
            )
        if not all(parameter.is_floating_point() for parameter in module.parameters()):
            raise RecipeError(
                f"tuning.modules_to_save: {name} is held in 4 bits, which cannot take small steps; "
                "only what stays unquantised can train in full"
            )
        inside = [layer for layer in adapted if within(layer, (name,))]
        inside += [other for other in chosen if other != name and within(other, (name,))]
        if inside:
            raise RecipeError(
                f"tuning.modules_to_save: {name} trains in full, and {inside[0]} inside it is "
                "named too (tuning.targets, tuning.modules_to_save); choose one of the two"
            )

    def require_parts(self, chosen: Sequence[str]) -> None:
        """Each part that the recipe names gets something to train."""
        having = {part_of(name, self.facts) for name in chosen}
        for part in self.config.train or ():
            if part in self.config.freeze or part in having:
                continue
            own = [name for name in self.linear if part_of(name, self.facts) == part]
            remedy = (
                f"name layers of it in tuning.targets (its linear layers are named {_short(own)}), "
                f"or set tuning.targets={ALL_LINEAR}"
                if own
                else "it has no linear layers, so train it in full: tuning.modules_to_save="
                f"[{_short(self._roots(part))}]"
            )
            raise RecipeError(
                f"tuning.train: the {part} part should train, but no adapter goes into it; {remedy}"
            )

    def _roots(self, part: Part) -> tuple[str, ...]:
        facts = self.facts
        return {
            "vision": (facts.vision_tower,),
            "projector": facts.projector,
            "language": facts.language_model,
        }[part]

    def _in(self, parts: Sequence[Part]) -> set[str]:
        return {name for name in self.linear if part_of(name, self.facts) in parts}


def _ends(module: str, name: str) -> bool:
    return module == name or module.endswith("." + name)


def _short(names: Iterable[str]) -> str:
    return ", ".join(sorted({name.rsplit(".", 1)[-1] for name in names}))
