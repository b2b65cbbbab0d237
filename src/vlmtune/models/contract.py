"""The preprocessing contract: what training, evaluation, API and UI must agree on to the byte.

It is written beside every checkpoint, adapter and merged model. ``Encoder`` is built from it, and
from nothing else, so that what is trained is what is served.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import PIL
import transformers
from pydantic import ValidationError

import vlmtune
from vlmtune.config import Config
from vlmtune.data.media import ImagePolicy
from vlmtune.errors import ContractMismatchError, ModelError
from vlmtune.hub import Hub
from vlmtune.models.family import Family
from vlmtune.models.folder import template_hash
from vlmtune.models.quantize import Quantization

FILE = "contract.json"
FORMAT = 1
SIZE_LIMITS = ("size", "min_pixels", "max_pixels")


class BaseModelIdentity(Config):
    """Which weights an adapter or a run stands on."""

    id: str
    hub: Hub | None = None
    revision: str | None = None
    weights_sha256: str


class ProcessorIdentity(Config):
    """What turns a picture into numbers. Backends differ by up to 0.03 in a normalised pixel."""

    backend: Literal["pil", "torchvision"]
    settings: dict[str, Any]
    transformers: str
    pillow: str


class Contract(Config):
    """Everything that decides how a conversation becomes tokens and pixels.

    Attributes:
        format: Version of this file's form.
        vlmtune: Version that wrote it.
        family: Name of the model family.
        base: The weights underneath.
        image: The image policy, with nothing left open.
        template_sha256: Sha256 of the chat template.
        vocabulary_size: Number of tokens of the tokenizer, control tokens included.
        system_prompt: System turn of conversations that have none; None leaves the template's own.
        prompt: Text after the images of a user turn that has no text of its own.
        instruction: Text before the images of a user turn that begins with an image.
        processor: What turns a picture into numbers.
        trained: Parts of the model whose weights differ from the base's; empty before training.
        quantization: How the base underneath is held in few bits, or None for its own weights.
    """

    format: int = FORMAT
    vlmtune: str
    family: str
    base: BaseModelIdentity
    image: ImagePolicy
    template_sha256: str
    vocabulary_size: int
    system_prompt: str | None = None
    prompt: str | None = None
    instruction: str | None = None
    processor: ProcessorIdentity
    trained: tuple[str, ...] = ()
    quantization: Quantization | None = None

    def write(self, folder: Path) -> None:
        """Write ``contract.json`` into a folder."""
        text = json.dumps(
            self.model_dump(mode="json"), indent=2, ensure_ascii=False, sort_keys=True
        )
        (folder / FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Contract:
        """Read ``contract.json`` of a checkpoint, adapter or merged model.

        Raises:
            ModelError: If it is damaged or of a newer format than this version knows.
        """
        path = folder / FILE
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(value, dict) and value.get("format", 0) > FORMAT:
                raise ModelError(
                    f"{path} has format {value['format']}, written by vlmtune "
                    f"{value.get('vlmtune')}; this version "
                    f"({vlmtune.__version__}) knows up to {FORMAT}. Upgrade vlmtune"
                )
            return cls.model_validate(value)
        except (OSError, ValueError, TypeError, ValidationError) as error:
            raise ModelError(f"{path} cannot be read as a contract: {error}") from error

    def differences(self, other: Contract) -> list[str]:
        """What differs so that tokens or pixels would, as ``field: ours != theirs`` lines.

        Versions of vlmtune, transformers and Pillow are recorded, but do not count here.
        """
        found = []
        for name in (
            "family",
            "image",
            "template_sha256",
            "vocabulary_size",
            "system_prompt",
            "prompt",
            "instruction",
        ):
            ours, theirs = self.model_dump()[name], other.model_dump()[name]
            if ours != theirs:
                found.append(f"{name}: {ours} != {theirs}")
        if self.base.weights_sha256 != other.base.weights_sha256:
            found.append(
                f"base.weights_sha256: {self.base.id} and {other.base.id} hold other weights"
            )
        if self.processor.backend != other.processor.backend:
            found.append(
                f"processor.backend: {self.processor.backend} != {other.processor.backend}"
            )
        if self.processor.settings != other.processor.settings:
            found.append("processor.settings: the image processors are configured differently")
        return found


def make_contract(
    family: Family,
    base: BaseModelIdentity,
    image: ImagePolicy,
    *,
    system_prompt: str | None = None,
    prompt: str | None = None,
    instruction: str | None = None,
) -> Contract:
    """The contract of a model as it stands, under an image policy."""
    return Contract(
        vlmtune=vlmtune.__version__,
        family=family.facts.name,
        base=base,
        image=family.settle(image),
        template_sha256=template_hash(family.parts.template),
        vocabulary_size=len(family.parts.tokenizer),
        system_prompt=system_prompt,
        prompt=prompt,
        instruction=instruction,
        processor=ProcessorIdentity.model_validate(
            {
                "backend": family.parts.backend,
                "settings": _settings(family, image),
                "transformers": transformers.__version__,
                "pillow": PIL.__version__,
            }
        ),
    )


def _settings(family: Family, image: ImagePolicy) -> dict[str, Any]:
    """The image processor's settings under a policy, but for what the policy itself holds."""
    config = json.loads(json.dumps(family.image_processor_config(image), default=str))
    held = SIZE_LIMITS if "max_pixels" in family.facts.image_options else ()
    return {key: value for key, value in config.items() if key not in held}


def verify_contract(contract: Contract, family: Family, weights_sha256: str) -> None:
    """Refuse a model that would not see what was trained.

    Args:
        contract: What was trained.
        family: The model about to be used.
        weights_sha256: Hash of the base weights about to be used.

    Raises:
        ContractMismatchError: With every difference.
    """
    base = contract.base.model_copy(update={"weights_sha256": weights_sha256})
    here = make_contract(
        family,
        base,
        contract.image,
        system_prompt=contract.system_prompt,
        prompt=contract.prompt,
        instruction=contract.instruction,
    )
    differences = contract.differences(here)
    if differences:
        listing = "; ".join(differences)
        raise ContractMismatchError(
            f"this model is not the one the contract was made for (contract != found): {listing}. "
            f"Use {contract.base.id}"
            + (f" at revision {contract.base.revision}" if contract.base.revision else "")
        )
