"""Packed layers in transformers' own loader, through the hooks that it has for quantised models.

Its own way of reading GPTQ needs two more packages, and a GPU for one of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin, QuantizationMethod

from vlmtune.models.folder import load_config
from vlmtune.models.gptq import Packing, put_packed_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

METHOD = "gptq_plain_torch"


class _PlainTorchConfig(QuantizationConfigMixin):
    """What the quantizer needs to know.

    Args:
        packing: What is packed, and how.
        settings: What the folder says of it.
    """

    def __init__(self, packing: Packing, settings: dict[str, Any]) -> None:
        self.quant_method = cast(QuantizationMethod, METHOD)
        self.packing, self.settings = packing, settings

    def get(self, name: str, default: Any = None) -> Any:
        """As of a dictionary, which the loader takes for what a folder says."""
        return self.quant_method if name == "quant_method" else default

    def to_dict(self) -> dict[str, Any]:
        """What the folder says."""
        return dict(self.settings)


class _PlainTorchQuantizer(HfQuantizer):
    """Puts packed layers in before weights are read."""

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        put_packed_layers(model, cast(_PlainTorchConfig, self.quantization_config).packing)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        # peft refuses to merge into what is called so, and transformers to cast it.
        cast(Any, model).quantization_method = QuantizationMethod.GPTQ

    def is_serializable(self) -> bool:
        """Whether it may be saved as it is."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether adapters may train over it."""
        return True


register_quantization_config(METHOD)(_PlainTorchConfig)
register_quantizer(METHOD)(_PlainTorchQuantizer)


def loading_options(folder: Path, packing: Packing) -> dict[str, Any]:
    """Keyword arguments of ``from_pretrained`` for a packed folder."""
    config: Any = load_config(str(folder))
    config.quantization_config = _PlainTorchConfig(packing, config.quantization_config)
    return {"config": config}
