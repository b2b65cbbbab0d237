"""The configuration of Qwen-VL, as the original's ``config.json`` has it.

The original calls its model type ``qwen``, like the text-only Qwen of 2023; what makes a folder a
Qwen-VL is the entry ``visual``. Saved configurations keep the original's names, so that what reads
the original reads ours.
"""

from __future__ import annotations

from typing import Any, ClassVar, cast

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec


@strict
class QwenVLVisionConfig(PreTrainedConfig):
    """The entry ``visual``: vision transformer and resampler.

    Attributes:
        width: Width of the vision transformer.
        layers: Its blocks.
        heads: Its attention heads.
        mlp_ratio: Width of its feed-forward layers over ``width``.
        patch_size: Side of a patch in pixels.
        image_size: Side of an image in pixels.
        n_queries: Tokens that an image becomes; a square number.
        output_dim: Width of the language model.
        image_start_id: Id of ``<img>``; ``</img>`` and ``<imgpad>`` follow it.
        initializer_range: Standard deviation of fresh weights.
    """

    model_type = "qwen_vl_visual"
    base_config_key = "visual"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "width",
        "num_hidden_layers": "layers",
        "num_attention_heads": "heads",
    }

    width: int = 1664
    layers: int = 48
    heads: int = 16
    mlp_ratio: float = 4.9231
    patch_size: int = 14
    image_size: int = 448
    n_queries: int = 256
    output_dim: int = 4096
    image_start_id: int = 151857
    initializer_range: float = 0.02

    def validate_architecture(self) -> None:
        """Check what ``visual`` says against itself."""
        if round(self.n_queries**0.5) ** 2 != self.n_queries:
            raise ValueError(
                f"visual.n_queries: found {self.n_queries}, expected a square number: the queries "
                "stand on a square grid"
            )
        if self.width % self.heads:
            raise ValueError(
                f"visual.width: found {self.width}, expected a multiple of visual.heads "
                f"({self.heads})"
            )
        if self.image_size % self.patch_size:
            raise ValueError(
                f"visual.image_size: found {self.image_size}, expected a multiple of "
                f"visual.patch_size ({self.patch_size})"
            )


@strict
class QwenVLConfig(PreTrainedConfig):
    """Qwen-VL: the language model's entries at the top, those of the vision tower in ``visual``.

    The defaults are the sizes of Qwen-VL and Qwen-VL-Chat.

    Attributes:
        vocab_size: Rows of embedding and head.
        hidden_size: Width of the language model.
        num_hidden_layers: Its blocks.
        num_attention_heads: Its attention heads.
        kv_channels: Width of a head.
        intermediate_size: Twice the width of the feed-forward layer (the original counts both of
            its inputs).
        seq_length: Length trained on; dynamic NTK and logn attention begin behind it.
        max_position_embeddings: Longest sequence meant to be used.
        layer_norm_epsilon: Epsilon of the language model's norms.
        rotary_emb_base: Base of the rotary frequencies.
        rotary_pct: Share of a head that is rotated; only 1.0.
        scale_attn_weights: Whether scores are divided by the root of the head's width; only True.
        use_dynamic_ntk: Stretch the rotary base of long prompts, in evaluation.
        use_logn_attn: Scale the queries of far positions, in evaluation.
        attn_dropout_prob: Dropout of attention weights.
        emb_dropout_prob: Dropout of embeddings.
        no_bias: No bias in output projections.
        initializer_range: Standard deviation of fresh weights.
        use_cache: Whether a forward keeps keys and values.
        tie_word_embeddings: Whether head and embedding are one; only False.
        visual: The vision tower.
    """

    model_type = "qwen"
    sub_configs_defaults: ClassVar[dict[str, SubConfigSpec]] = {
        "visual": SubConfigSpec(QwenVLVisionConfig)
    }
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {
        "head_dim": "kv_channels",
        "num_key_value_heads": "num_attention_heads",
    }

    vocab_size: int = 151936
    hidden_size: int = 4096
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    kv_channels: int = 128
    intermediate_size: int = 22016
    seq_length: int = 2048
    max_position_embeddings: int = 8192
    layer_norm_epsilon: float = 1e-6
    rotary_emb_base: int | float = 10000
    rotary_pct: int | float = 1.0
    scale_attn_weights: bool = True
    use_dynamic_ntk: bool = True
    use_logn_attn: bool = True
    attn_dropout_prob: int | float = 0.0
    emb_dropout_prob: int | float = 0.0
    no_bias: bool = True
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    visual: dict[str, Any] | PreTrainedConfig | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Forget where the original's code is: it is never run, and a saved folder lacks it."""
        kwargs.pop("auto_map", None)
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Read a ``config.json``.

        Raises:
            ValueError: If there is no entry ``visual``: a text-only Qwen has the same model type.
        """
        if not config_dict.get("visual"):
            raise ValueError(
                "config.json has the model type 'qwen' and no entry 'visual': this is a text-only "
                "Qwen of 2023, not a Qwen-VL. Choose Qwen-VL or Qwen-VL-Chat"
            )
        return super().from_dict(config_dict, **kwargs)

    @property
    def vision(self) -> QwenVLVisionConfig:
        """The entry ``visual``, typed."""
        return cast("QwenVLVisionConfig", self.visual)

    @property
    def image_token_id(self) -> int:
        """Id of ``<imgpad>``, the placeholder of an image token."""
        return self.vision.image_start_id + 2

    def validate_architecture(self) -> None:
        """Refuse what no published Qwen-VL has, and what the network therefore does not do."""
        only = (
            ("rotary_pct", self.rotary_pct, 1.0),
            ("scale_attn_weights", self.scale_attn_weights, True),
            ("tie_word_embeddings", self.tie_word_embeddings, False),
        )
        for name, found, expected in only:
            if found != expected:
                raise ValueError(
                    f"{name}: found {found!r}, expected {expected!r} as in every published Qwen-VL"
                )
        if self.kv_channels * self.num_attention_heads != self.hidden_size:
            raise ValueError(
                f"kv_channels: {self.num_attention_heads} heads of {self.kv_channels} are "
                f"{self.kv_channels * self.num_attention_heads} wide, expected hidden_size "
                f"({self.hidden_size})"
            )
        if self.vision.output_dim != self.hidden_size:
            raise ValueError(
                f"visual.output_dim: found {self.vision.output_dim}, expected hidden_size "
                f"({self.hidden_size})"
            )


def tiny_config(  # noqa: PLR0913
    *,
    vocab_size: int,
    image_start_id: int,
    hidden_size: int = 64,
    layers: int = 2,
    vision_width: int = 32,
    vision_layers: int = 2,
    n_queries: int = 16,
    seq_length: int = 2048,
) -> QwenVLConfig:
    """The smallest sensible Qwen-VL, for tests and for tiny models on disk.

    Args:
        vocab_size: Rows of embedding and head.
        image_start_id: Id of ``<img>``; ``</img>`` and ``<imgpad>`` must follow it.
        hidden_size: Width of the language model; a multiple of 32.
        layers: Blocks of the language model.
        vision_width: Width of the vision transformer; a multiple of 16.
        vision_layers: Its blocks.
        n_queries: Tokens of an image; a square number.
        seq_length: Where dynamic NTK and logn attention begin.
    """
    return QwenVLConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 32,
        kv_channels=32,
        intermediate_size=4 * hidden_size,
        seq_length=seq_length,
        visual={
            "width": vision_width,
            "layers": vision_layers,
            "heads": vision_width // 16,
            "mlp_ratio": 2.0,
            "image_size": 56,
            "n_queries": n_queries,
            "output_dim": hidden_size,
            "image_start_id": image_start_id,
        },
    )
