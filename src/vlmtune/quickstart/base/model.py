"""The base's architecture, and a forward for training it: padded batches of small pictures.

The stock forward attends picture by picture and packs rows under a dense mask; with pictures of 30
to 100 patches much of a step would be overhead. Here all pictures of a batch go through each block
at once, and all rows. Attention is written out: the fused kernel's backward is ten times slower in
bfloat16 on a CPU. The numbers are the same, see the tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from vlmtune.models.torchvision import torchvision_fault
from vlmtune.quickstart.base.tokenizer import VOCABULARY

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLForConditionalGeneration

PATCH, MERGE = 14, 2
MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)
MASKED = -1e4  # added to what may not be looked at


@dataclass(frozen=True, kw_only=True)
class BaseSize:
    """The numbers that decide how big the base is.

    Attributes:
        hidden: Width of the language model; a multiple of 32.
        layers: Layers of the language model.
        intermediate: Width of its MLP.
        vision_width: Width of the vision tower; a multiple of 32.
        vision_layers: Layers of the vision tower.
        vision_ratio: Width of its MLP over its own.
    """

    hidden: int = 256
    layers: int = 4
    intermediate: int = 640
    vision_width: int = 192
    vision_layers: int = 6
    vision_ratio: int = 3


def build_model(
    size: BaseSize, tokenizer: PreTrainedTokenizerFast, seed: int
) -> Qwen2VLForConditionalGeneration:
    """The base with random weights, in float32."""
    torchvision_fault()
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    def control(token: str) -> int:
        return int(tokenizer.get_added_vocab()[token])

    heads = size.hidden // 32
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": size.hidden,
            "intermediate_size": size.intermediate,
            "num_hidden_layers": size.layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads // 2,
            "max_position_embeddings": 32768,
            # Widths get the slowest rotations. With the usual theta of a million they would not
            # turn by a hundredth of a radian across a whole line.
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 30.0,
                "mrope_section": [4, 4, 8],
            },
            "tie_word_embeddings": True,
            "bos_token_id": control("<|endoftext|>"),
            "eos_token_id": control("<|im_end|>"),
            "pad_token_id": control("<|endoftext|>"),
        },
        vision_config={
            "depth": size.vision_layers,
            "embed_dim": size.vision_width,
            "num_heads": size.vision_width // 32,
            "hidden_size": size.hidden,
            "mlp_ratio": size.vision_ratio,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
        },
        image_token_id=control("<|image_pad|>"),
        video_token_id=control("<|video_pad|>"),
        vision_start_token_id=control("<|vision_start|>"),
        vision_end_token_id=control("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen2VLForConditionalGeneration(config)
    ends = [control("<|im_end|>"), control("<|endoftext|>")]
    model.generation_config.update(eos_token_id=ends, pad_token_id=control("<|endoftext|>"))
    return model


@dataclass(frozen=True)
class Batch:
    """Rows padded to the same lengths.

    Attributes:
        patches: Pixels 0 … 255, ``(rows, patches, 3 * 14 * 14)``, in the order of merging.
        places: Row and column of each patch, ``(rows, patches, 2)``.
        seen: Which patches are not padding, ``(rows, patches)``.
        ids: Token ids, ``(rows, tokens)``.
        positions: Time, height and width of each token, ``(3, rows, tokens)``.
        predicts: Where the next token is trained, ``(rows, tokens)``, bool.
        targets: The ids to predict there, ``(labels,)``.
        tasks: Task of each label, ``(labels,)``.
        spots: The shapes in its pictures, where rows tell them.
    """

    patches: Tensor
    places: Tensor
    seen: Tensor
    ids: Tensor
    positions: Tensor
    predicts: Tensor
    targets: Tensor
    tasks: Tensor
    spots: Spots | None = None


@dataclass(frozen=True)
class Spots:
    """The shapes in a batch's pictures: what they are and where, for ``hints``.

    Attributes:
        rows: Row of each, ``(spots,)``.
        words: Ids of its colour and of its kind, ``(spots, 2)``.
        sides: Left, top, right, bottom as shares of the picture, ``(spots, 4)``.
        cells: Which of the batch's visual tokens lie in it, ``(spots, visual tokens)``, bool.
        keys: The same among its row's tokens, ``(spots, tokens)``, bool.
        asked: Whether it alone is what the row asks for, ``(spots,)``, bool.
    """

    rows: Tensor
    words: Tensor
    sides: Tensor
    cells: Tensor
    keys: Tensor
    asked: Tensor


def batch_logits(
    model: Qwen2VLForConditionalGeneration,
    batch: Batch,
    features: Tensor | None = None,
    scores: dict[int, Tensor] | None = None,
) -> Tensor:
    """Logits of the trained places, ``(labels, vocabulary)``.

    Args:
        model: The base.
        batch: Rows.
        features: What ``see`` returns for them, where it is known.
        scores: Its keys are layers; each gets what the attention of the heads that share the first
            key head weighs, before softmax: ``(rows, heads, tokens, tokens)``.
    """
    if features is None:
        features = see(model, batch)
    embeddings = model.get_input_embeddings()(batch.ids)
    slots = (batch.ids == model.config.image_token_id).unsqueeze(-1)
    embeddings = embeddings.masked_scatter(slots, features.to(embeddings.dtype))
    return model.lm_head(_speak(model.model.language_model, embeddings, batch, scores))


def see(model: Qwen2VLForConditionalGeneration, batch: Batch) -> Tensor:
    """Features of the visual tokens of all pictures, ``(visual tokens, hidden)``."""
    visual: Any = model.model.visual
    rows, count, _ = batch.patches.shape
    weight = visual.patch_embed.proj.weight  # (width, 3, 2, 14, 14)
    deviation = torch.tensor(DEVIATION).view(3, 1) * 255
    mean = torch.tensor(MEAN).view(3, 1) * 255
    pixels = ((batch.patches.view(rows, count, 3, -1) - mean) / deviation).to(weight.dtype)
    # An image is a film of two equal frames.
    hidden = functional.linear(pixels.flatten(2), weight.sum(dim=2).flatten(1))
    cos, sin = visual.rotary_pos_emb(hidden, batch.places.flatten(0, 1))
    cos, sin = (part.view(rows, 1, count, -1).to(hidden.dtype) for part in (cos, sin))
    mask = torch.zeros(rows, 1, 1, count, dtype=hidden.dtype)
    mask.masked_fill_(~batch.seen[:, None, None, :], MASKED)
    for block in visual.blocks:
        hidden = hidden + _attend(block.attn, block.norm1(hidden), cos, sin, mask)
        hidden = hidden + block.mlp(block.norm2(hidden))
    merged = visual.merger.ln_q(hidden).view(rows, count // MERGE**2, -1)
    return visual.merger.mlp(merged[batch.seen[:, :: MERGE**2]])


def _attend(attention: Any, hidden: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
    rows, count, width = hidden.shape
    parts = attention.qkv(hidden).view(rows, count, 3, attention.num_heads, -1)
    query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)  # (rows, heads, patches, dim)
    query, key = _rotated(query, cos, sin), _rotated(key, cos, sin)
    scores = (query * attention.scaling) @ key.transpose(2, 3) + mask
    output = scores.softmax(dim=-1) @ value
    return attention.proj(output.transpose(1, 2).reshape(rows, count, width))


def _speak(language: Any, hidden: Tensor, batch: Batch, scores: dict[int, Tensor] | None) -> Tensor:
    """Last states of the trained places, ``(labels, hidden)``."""
    count = hidden.shape[1]
    cos, sin = (part.unsqueeze(1) for part in language.rotary_emb(hidden, batch.positions))
    # Padding stands on the right, where no token of a causal model looks.
    mask = torch.full((count, count), MASKED, dtype=hidden.dtype).triu(1)
    for number, layer in enumerate(language.layers):
        own, weighed = _attend_back(layer.self_attn, layer.input_layernorm(hidden), cos, sin, mask)
        if scores is not None and number in scores:
            scores[number] = weighed[:, 0]
        hidden = hidden + own
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return language.norm(hidden[batch.predicts])


def _attend_back(
    attention: Any, hidden: Tensor, cos: Tensor, sin: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """The output, and the scores ``(rows, key heads, groups, tokens, tokens)``."""
    rows, count, width = hidden.shape
    groups, head = attention.num_key_value_groups, attention.head_dim

    def heads(projection: Any) -> Tensor:
        return projection(hidden).view(rows, count, -1, head).transpose(1, 2)

    query = _rotated(heads(attention.q_proj), cos, sin) * attention.scaling
    key, value = _rotated(heads(attention.k_proj), cos, sin), heads(attention.v_proj)
    # The heads that share a key ask one after the other: (rows, key heads, groups * tokens, dim)
    query = query.reshape(rows, -1, groups * count, head)
    scores = (query @ key.transpose(2, 3)).view(rows, -1, groups, count, count) + mask
    shares = scores.softmax(dim=-1).view(rows, -1, groups * count, count)
    output = (shares @ value).view(rows, -1, count, head)
    return attention.o_proj(output.transpose(1, 2).reshape(rows, count, width)), scores


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
