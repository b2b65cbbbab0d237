"""Tiny Qwen-VL networks, the original's golden data, and a second, naive implementation."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image as Pictures
from torch import Tensor

from vlmtune.models.qwen_vl.configuration import tiny_config
from vlmtune.models.qwen_vl.pixels import pixel_values
from vlmtune.models.qwen_vl.register import register

START, END, PAD = 80, 81, 0  # of the tiny network; below them is text
QUERIES = 16


def tiny_network(*, seed: int = 0, seq_length: int = 2048, attention: str = "sdpa") -> Any:
    """A random Qwen-VL of 0.2 million parameters, lively enough that its logits differ."""
    register()
    from vlmtune.models.qwen_vl.modeling import QwenVLForConditionalGeneration

    config = tiny_config(vocab_size=96, image_start_id=START, seq_length=seq_length)
    config._attn_implementation = attention
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = QwenVLForConditionalGeneration(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("pos_embed"):
                    continue
                if parameter.dim() > 1:
                    parameter.normal_(0.0, 0.5 * parameter[0].numel() ** -0.5)
                else:
                    parameter.add_(0.1 * torch.randn_like(parameter))
            model.lm_head.weight.mul_(4.0)
            for block in model.transformer.h:
                block.attn.c_attn.weight.mul_(3.0)  # attention that looks somewhere
    model.generation_config.pad_token_id = PAD
    return model.eval()


def text(length: int, *, seed: int = 0) -> list[int]:
    """Ids of a text; none is padding or belongs to an image."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, START, (length,), generator=generator).tolist()


def image(*, seed: int = 0) -> list[int]:
    """Ids of an image; what stands in the placeholders does not matter."""
    return [START, *text(QUERIES, seed=1000 + seed), END]


def pixels(count: int, *, seed: int = 0, side: int = 56) -> Tensor:
    """Random normalised images ``(count, 3, side, side)``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, side, side, generator=generator)


def padded(rows: Sequence[Sequence[int]], side: str) -> tuple[Tensor, Tensor]:
    """Ids and attention mask of rows padded on one side."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), PAD)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for index, row in enumerate(rows):
        start = longest - len(row) if side == "left" else 0
        ids[index, start : start + len(row)] = torch.tensor(row)
        mask[index, start : start + len(row)] = 1
    return ids, mask


def batch(ids: Sequence[int]) -> Tensor:
    """One row."""
    return torch.tensor([list(ids)])


def naive_logits(
    model: Any,
    ids: Sequence[int],
    *,
    prompt: int | None = None,
    padding: int = 0,
    evaluation: bool = True,
) -> Tensor:
    """Logits of one text by the formulas, in float64, shape ``(tokens, vocabulary)``.

    No cache, no batch, no library attention; rotation by complex numbers.

    Args:
        model: Gives weights and configuration.
        ids: The text.
        prompt: How many of the ids were there when the first pass was made; None means all.
        padding: How many first ids are padding, which is not seen and yet counts.
        evaluation: Whether dynamic NTK and logn attention are on, as the configuration says.
    """
    config = model.config
    weights = {name: value.detach().double() for name, value in model.state_dict().items()}
    length, width = len(ids), config.kv_channels
    alpha = 1
    if evaluation and config.use_dynamic_ntk:
        levels = math.ceil(math.log2((prompt or length) / config.seq_length) + 1)
        alpha = max(2**levels - 1, 1)
    base = config.rotary_emb_base * alpha ** (width / (width - 2))
    turns = torch.tensor(
        [[place * base ** (-2 * k / width) for k in range(width // 2)] for place in range(length)],
        dtype=torch.float64,
    )
    rotation = torch.polar(torch.ones_like(turns), turns)
    sharp = torch.ones(length, 1, dtype=torch.float64)
    if evaluation and config.use_logn_attn:
        for place in range(config.seq_length + 1, length + 1):
            sharp[place - 1] = math.log(place) / math.log(config.seq_length)
    seen = torch.ones(length, length).tril().bool()
    seen[:, :padding] = False
    seen |= torch.eye(length).bool()  # padding sees itself; nobody looks

    def normal(states: Tensor, name: str) -> Tensor:
        scale = (states**2).mean(-1, keepdim=True) + config.layer_norm_epsilon
        return states / scale.sqrt() * weights[name]

    def turned(states: Tensor) -> Tensor:
        half = width // 2
        pairs = torch.complex(states[:, :half], states[:, half:]) * rotation
        return torch.cat((pairs.real, pairs.imag), dim=1)

    states = weights["transformer.wte.weight"][list(ids)]
    for layer in range(config.num_hidden_layers):
        name = f"transformer.h.{layer}"
        entered = normal(states, f"{name}.ln_1.weight")
        joint = entered @ weights[f"{name}.attn.c_attn.weight"].T
        joint = joint + weights[f"{name}.attn.c_attn.bias"]
        query, key, value = joint.split(config.hidden_size, dim=1)
        heads = []
        for head in range(config.num_attention_heads):
            part = slice(head * width, (head + 1) * width)
            scores = (turned(query[:, part]) * sharp) @ turned(key[:, part]).T / width**0.5
            shares = scores.masked_fill(~seen, -torch.inf).softmax(dim=1)
            heads.append(shares @ value[:, part])
        states = states + torch.cat(heads, dim=1) @ weights[f"{name}.attn.c_proj.weight"].T
        entered = normal(states, f"{name}.ln_2.weight")
        gate = entered @ weights[f"{name}.mlp.w2.weight"].T
        inner = (entered @ weights[f"{name}.mlp.w1.weight"].T) * gate * gate.sigmoid()
        states = states + inner @ weights[f"{name}.mlp.c_proj.weight"].T
    return normal(states, "transformer.ln_f.weight") @ weights["lm_head.weight"].T


@dataclass(frozen=True)
class Golden:
    """A tiny checkpoint in the original layout, and what the original computes from it."""

    folder: Path

    @cached_property
    def facts(self) -> dict[str, Any]:
        return json.loads((self.folder / "golden.json").read_text(encoding="utf-8"))

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        return load_file(self.folder / "golden.safetensors")

    @property
    def stride(self) -> int:
        return self.facts["vis_out_stride"]

    def ids(self, prompt: str) -> list[int]:
        return self.facts["prompts"][prompt]["input_ids"]

    def images(self, *names: str) -> Tensor | None:
        side = json.loads((self.folder / "config.json").read_text())["visual"]["image_size"]
        found = [pixel_values(Pictures.open(self.folder / f"{name}.png"), side) for name in names]
        return torch.stack(found) if found else None

    def images_of(self, *prompts: str) -> Tensor | None:
        pictures = {"text": "", "one": "a", "two": "ab", "gray_rgba": "gr"}
        return self.images(*"".join(pictures[prompt] for prompt in prompts))

    def padded(self, prompts: Sequence[str], side: str) -> tuple[Tensor, Tensor]:
        ids, mask = padded([self.ids(prompt) for prompt in prompts], side)
        return ids.where(mask.bool(), self.facts["ids"]["eod"]), mask

    def load(self, **options: Any) -> Any:
        register()
        from transformers import AutoModelForImageTextToText

        options = {"dtype": torch.float32, "attn_implementation": "sdpa", **options}
        return AutoModelForImageTextToText.from_pretrained(
            str(self.folder), trust_remote_code=False, local_files_only=True, **options
        ).eval()

    def training_batch(self, name: str) -> dict[str, Any]:
        """``img`` (two pictures), ``txt`` (none) or ``both``."""
        rows = ["img", "txt"] if name == "both" else [name]
        train = self.facts["train"]
        ids = torch.tensor([train[row]["input_ids"][0] for row in rows])
        return {
            "input_ids": ids,
            "labels": torch.tensor([train[row]["labels"][0] for row in rows]),
            "attention_mask": ids.ne(self.facts["ids"]["eod"]).long(),
            "pixel_values": self.images("a", "b") if "img" in rows else None,
        }


def difference(found: Tensor, expected: Tensor) -> float:
    """Largest absolute difference; shapes must be equal."""
    assert found.shape == expected.shape
    return float((found.detach().double() - expected.double()).abs().max())
