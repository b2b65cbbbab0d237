"""Qwen-VL as transformers 5 classes, with the parameter names of the original checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation.configuration_utils import GenerationConfig
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.utils import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
)
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from vlmtune.models.qwen_vl.configuration import QwenVLConfig
from vlmtune.models.qwen_vl.language import QwenVLAttention, QwenVLBlock, QwenVLRMSNorm
from vlmtune.models.qwen_vl.placing import features_per_row, image_spans, place_images
from vlmtune.models.qwen_vl.pretrained import QwenVLPreTrainedModel
from vlmtune.models.qwen_vl.rotary import (
    LEVELS,
    inverse_frequencies,
    logn_scale,
    ntk_levels,
    rotary_angles,
)
from vlmtune.models.qwen_vl.stopping import StopSequences, end_of_sequence
from vlmtune.models.qwen_vl.vision import QwenVLVisionModel

Encoded = Mapping[str, BaseModelOutputWithPooling]
FREQUENCIES = "rotary_frequencies"  # what a cache's keys were turned with


class QwenVLModel(QwenVLPreTrainedModel):
    """Embeddings, images and layers, without the head."""

    _input_embed_layer = "wte"
    _can_record_outputs = {"hidden_states": QwenVLBlock, "attentions": QwenVLAttention}  # noqa: RUF012

    def __init__(self, config: QwenVLConfig) -> None:
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.drop = nn.Dropout(config.emb_dropout_prob)
        self.h = nn.ModuleList(
            QwenVLBlock(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.ln_f = QwenVLRMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.visual = QwenVLVisionModel._from_config(config.visual)
        self.gradient_checkpointing = False
        self.post_init()

    def get_image_features(
        self, pixel_values: Tensor, **options: Any
    ) -> BaseModelOutputWithPooling:
        """Tokens of images: ``pooler_output (images, n_queries, hidden_size)``."""
        return self.visual(pixel_values, **options)

    @merge_with_config_defaults  # type: ignore[untyped-decorator]
    @capture_outputs  # type: ignore[untyped-decorator]
    def forward(  # noqa: PLR0913  # the names are transformers'
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        pixel_values: Tensor | None = None,
        mm_encoder_outputs: Encoded | None = None,
        **options: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states of every token; arguments as ``QwenVLForConditionalGeneration`` has them.

        Raises:
            ValueError: If not exactly one of ``input_ids`` and ``inputs_embeds`` is given, or the
                images do not fit the ids.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected exactly one of input_ids and inputs_embeds")
        features = self._features(pixel_values, mm_encoder_outputs)
        if input_ids is not None:
            spans = self.image_spans(input_ids)
            states = place_images(self.drop(self.wte(input_ids)), spans, features)
        elif features is None:
            states = self.drop(inputs_embeds)
        else:
            raise ValueError(
                "images need input_ids, which say where they stand; inputs_embeds must hold their "
                "features already"
            )
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        if position_ids is None:
            position_ids = torch.arange(seen, seen + states.shape[1], device=states.device)[None]
        # Before a cache is made: with one, packed rows would not be told apart by their positions.
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=states,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        angles = self._angles(position_ids, past_key_values, prompt=not seen)
        sharpened = self.config.use_logn_attn and not self.training
        query_scale = logn_scale(position_ids, self.config.seq_length) if sharpened else None
        for block in self.h:
            states = block(
                states,
                angles=angles,
                query_scale=query_scale,
                attention_mask=mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **options,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.ln_f(states), past_key_values=past_key_values
        )

    def image_spans(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Row and place of every complete image among the ids."""
        vision = self.config.vision
        return image_spans(input_ids, vision.image_start_id, vision.n_queries)

    def _features(self, pixel_values: Tensor | None, encoded: Encoded | None) -> Tensor | None:
        """Tokens of the images ``(images, n_queries, hidden_size)``, encoded now or before."""
        ready = None if encoded is None else encoded.get("image")
        if pixel_values is not None and ready is not None:
            raise ValueError("expected pixel_values or mm_encoder_outputs['image'], found both")
        if pixel_values is not None:
            ready = self.get_image_features(pixel_values)
        if ready is None:
            return None
        tokens = torch.cat(list(cast("Sequence[Tensor]", ready.pooler_output)))
        return tokens.unflatten(0, (-1, self.config.vision.n_queries))

    def _angles(
        self, position_ids: Tensor, cache: Cache | None, *, prompt: bool
    ) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the tokens.

        A prompt decides how far its rotary base is stretched. What is generated after it must turn
        its queries as the cached keys were turned, so the frequencies go with the cache: kept in
        the module, as in the original, they would leak from one call into the next.
        """
        config, device = self.config, position_ids.device
        state = {} if cache is None else vars(cache)
        if not prompt and FREQUENCIES in state:
            return rotary_angles(position_ids, state[FREQUENCIES])
        stretched = config.use_dynamic_ntk and not self.training
        levels = torch.zeros_like(position_ids[:, :1])
        if stretched:
            levels = ntk_levels(position_ids, config.seq_length)
        table = inverse_frequencies(
            config.kv_channels, config.rotary_emb_base, LEVELS if stretched else 1, device
        )
        # A row's padding is at level 0.
        state[FREQUENCIES] = table[levels.amax(dim=1, keepdim=True)]
        return rotary_angles(position_ids, table[levels])


class QwenVLForConditionalGeneration(QwenVLPreTrainedModel, GenerationMixin):
    """Qwen-VL with its head: what is trained, merged, served."""

    _input_embed_layer = "wte"

    def __init__(self, config: QwenVLConfig) -> None:
        super().__init__(config)
        self.transformer = QwenVLModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *arguments: Any, **options: Any) -> Any:
        """As in transformers; the resampler's positions stay frozen, as in a fresh model."""
        loaded: Any = super().from_pretrained(*arguments, **options)
        model: Self = loaded[0] if isinstance(loaded, tuple) else loaded
        model.transformer.visual.attn_pool.pos_embed.requires_grad_(False)
        return loaded

    def get_image_features(
        self, pixel_values: Tensor, **options: Any
    ) -> BaseModelOutputWithPooling:
        """Tokens of images: ``pooler_output (images, n_queries, hidden_size)``."""
        return self.transformer.get_image_features(pixel_values, **options)

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(  # noqa: PLR0913  # the names are transformers'
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        pixel_values: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        mm_encoder_outputs: Encoded | None = None,
        **options: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the next token, and the loss where labels are given.

        Args:
            input_ids: Token ids, shape ``(rows, tokens)``. The placeholders between ``<img>`` and
                ``</img>`` may be any ids.
            attention_mask: 1 at tokens, 0 at padding on either side, ``(rows, tokens)``.
            position_ids: Positions, ``(rows, tokens)``. Left out, every place of a row counts, the
                padding too, as in the original. Given without a mask and a cache, positions that
                start anew keep packed rows apart. Length and place in dynamic NTK and logn
                attention are read from them.
            past_key_values: Keys and values seen before.
            inputs_embeds: Embeddings ``(rows, tokens, hidden_size)`` instead of ids, images in
                their places.
            labels: Ids to predict, not shifted, -100 where none, ``(rows, tokens)``.
            use_cache: Whether to return keys and values.
            pixel_values: Normalised images ``(images, 3, side, side)``, in reading order.
            logits_to_keep: How many last logits, or the places, or a boolean mask of the places.
            mm_encoder_outputs: ``{"image": …}`` with the ``pooler_output`` of
                ``get_image_features``, instead of ``pixel_values``.
            options: ``output_hidden_states`` and the like.

        Raises:
            ValueError: If ids, embeddings and images do not fit each other.
        """
        outputs = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            pixel_values=pixel_values,
            mm_encoder_outputs=mm_encoder_outputs,
            **options,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **options
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *arguments: Any,
        stop_words_ids: Sequence[Sequence[int]] = (),
        **options: Any,
    ) -> Any:
        """As in transformers, and stop sequences given as ids.

        Args:
            inputs: Prompts, shape ``(rows, tokens)``; or pass ``input_ids``.
            generation_config: Instead of the model's own.
            arguments: As transformers has them.
            stop_words_ids: Sequences that end an answer. The sequence stays in it, the end of
                sequence follows.
            options: As transformers has them; ``stop_strings`` among them.

        Raises:
            ValueError: If prompts are to be read in pieces: the length of the whole prompt decides
                how far the rotary base is stretched, and an image cannot be cut.
        """
        own = self.generation_config
        config = generation_config or own
        if options.get("prefill_chunk_size") or config.prefill_chunk_size:
            raise ValueError("prefill_chunk_size: expected none, Qwen-VL reads a prompt as a whole")
        if options.get("pixel_values") is None:  # transformers would encode what is not there
            options.pop("pixel_values", None)
        if stop_words_ids:
            prompt = options.get("input_ids") if inputs is None else inputs
            length = 0 if prompt is None else prompt.shape[1]
            ends = (options.get("eos_token_id"), config.eos_token_id, own.eos_token_id)
            end = end_of_sequence(next((found for found in ends if found is not None), None))
            processors = options.get("logits_processor") or ()
            stop = StopSequences(stop_words_ids, end, length)
            options["logits_processor"] = LogitsProcessorList([*processors, stop])
        return cast(Any, super()).generate(inputs, generation_config, *arguments, **options)

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **options: Any,
    ) -> tuple[Any, dict[str, Any]]:
        """Repeat rows for beams and samples, and the images of each row with it.

        transformers would find a row's images by counting ``<imgpad>``, of which the original's
        rows have fewer than there are image tokens.
        """
        encoded = options.pop("mm_encoder_outputs", None)
        expanded, options = cast(Any, super())._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **options
        )
        if encoded and input_ids is not None and expand_size > 1:
            image = encoded["image"]
            per_row = features_per_row(
                self.transformer.image_spans(input_ids), len(input_ids), image.pooler_output
            )
            repeated = [tokens for row in per_row for tokens in row * expand_size]
            encoded = {"image": BaseModelOutputWithPooling(pooler_output=torch.stack(repeated))}
        if encoded is not None:
            options["mm_encoder_outputs"] = encoded
        return expanded, options
