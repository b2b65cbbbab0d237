"""Rows that are answered together, one token a step, joining and leaving as they like.

The loop is ours so that one engine serves everything: an evaluation drops a row when it is
answered, a server lets a new question join those that are running, and both see the same logits as
a row alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlmtune.errors import ModelError
from vlmtune.models.encode import Encoded, Encoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import DynamicCache


class Decoding:
    """Some rows, what was said so far in the cache, and the logits of what comes next.

    Attributes:
        logits: Of the next token of each row, ``(rows, vocabulary)``, in the model's precision.
    """

    def __init__(self, model: PreTrainedModel, encoder: Encoder, rows: Sequence[Encoded]) -> None:
        """Read the questions in one forward.

        Args:
            model: The model in evaluation mode, adapter included.
            encoder: Its encoder.
            rows: Questions, encoded with ``ask=True``.
        """
        from transformers.cache_utils import DynamicCache

        self._model = model
        self._family = encoder.family
        self._cache = DynamicCache(config=model.config)
        batch = {name: tensor.to(model.device) for name, tensor in pad_left(encoder, rows).items()}
        self._mask = batch["attention_mask"]
        # The next position follows the highest so far: of text its number, of M-RoPE's other axes
        # one that an image may have left behind.
        highest = [row.positions.amax(dim=1) for row in rows]
        self._next = torch.stack(highest, dim=1).to(model.device) + 1  # (rows of positions, rows)
        self.logits = self._forward(self._family.prefill_inputs(batch))

    def __len__(self) -> int:
        return len(self._mask)

    @property
    def length(self) -> int:
        """Tokens in the cache, padding included."""
        return self._mask.shape[1]

    @torch.no_grad()
    def step(self, tokens: Tensor) -> None:
        """Say one token in every row, ``(rows,)``, and find the logits of the next."""
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(self), 1)], dim=1)
        positions = self._family.position_arguments(self._next.unsqueeze(-1))
        self._next = self._next + 1
        self.logits = self._forward(
            {
                "input_ids": tokens.to(self._mask.device).unsqueeze(1),
                "attention_mask": self._mask,
                **positions,
            }
        )

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with some of the rows, in this order."""
        chosen = torch.tensor(rows, dtype=torch.long, device=self._mask.device)
        self._mask, self._next = self._mask[chosen], self._next[:, chosen]
        self.logits = self.logits[chosen]
        self._cache.batch_select_indices(chosen)
        for name, state in _states(self._cache).items():
            vars(self._cache)[name] = state[chosen]
        # Where all that are left began late, the columns before are padding to every one of them.
        idle = int((self._mask.cumsum(dim=1) == 0).all(dim=0).sum()) if rows else 0
        if idle and self.joinable:
            self._mask = self._mask[:, idle:]
            for layer in _layers(self._cache):
                layer.keys, layer.values = layer.keys[:, :, idle:], layer.values[:, :, idle:]

    def split(self, rows: Sequence[int]) -> Decoding:
        """Let some of the rows go on by themselves; the others stay."""
        other = copy(self)
        other._cache = copy(self._cache)
        other._cache.layers = [copy(layer) for layer in self._cache.layers]
        other.keep(rows)
        self.keep([row for row in range(len(self)) if row not in set(rows)])
        return other

    @property
    def joinable(self) -> bool:
        """Whether the cache holds every token, so that caches of two lengths can be aligned."""
        from transformers.cache_utils import DynamicLayer

        return all(type(layer) is DynamicLayer for layer in self._cache.layers)

    def join(self, other: Decoding) -> None:
        """Let the rows of another decoding join; the shorter ones are padded on the left.

        Raises:
            ModelError: If the model keeps only a window of what was said.
        """
        if not (self.joinable and other.joinable):
            raise ModelError("the model's attention has a window: its rows cannot join others")
        longest = max(self.length, other.length)
        self._mask = torch.cat([_padded(self._mask, longest, 1), _padded(other._mask, longest, 1)])
        self._next = torch.cat([self._next, other._next], dim=1)
        self.logits = torch.cat([self.logits, other.logits])
        for mine, joining in zip(_layers(self._cache), _layers(other._cache), strict=True):
            keys = (_padded(layer.keys, longest, 2) for layer in (mine, joining))
            values = (_padded(layer.values, longest, 2) for layer in (mine, joining))
            mine.keys, mine.values = torch.cat(list(keys)), torch.cat(list(values))
        theirs = _states(other._cache)
        for name, state in _states(self._cache).items():
            vars(self._cache)[name] = torch.cat([state, theirs[name]])

    @torch.no_grad()
    def _forward(self, inputs: dict[str, Any]) -> Tensor:
        model: Any = self._model
        output = model(**inputs, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        logits: Tensor = output.logits
        return logits[:, -1]


def pad_left(encoder: Encoder, rows: Sequence[Encoded]) -> dict[str, Tensor]:
    """Rows side by side, right-aligned: ``input_ids (rows, longest)`` and what belongs to it."""
    longest = max(len(row.tokens) for row in rows)
    input_ids = torch.full((len(rows), longest), encoder.pad_id, dtype=torch.long)
    image_mask = torch.zeros((len(rows), longest), dtype=torch.bool)
    attention_mask = torch.zeros((len(rows), longest), dtype=torch.long)
    positions = torch.zeros((len(rows[0].positions), len(rows), longest), dtype=torch.long)
    for index, row in enumerate(rows):
        start = longest - len(row.tokens)
        input_ids[index, start:] = torch.from_numpy(row.tokens.ids)
        image_mask[index, start:] = torch.from_numpy(row.tokens.image_mask)
        attention_mask[index, start:] = 1
        positions[:, index, start:] = row.positions
    return {
        "input_ids": input_ids,
        "image_mask": image_mask,
        "attention_mask": attention_mask,
        "positions": positions,
        **encoder.family.join_vision([row.vision for row in rows]),
    }


def _layers(cache: DynamicCache) -> list[Any]:
    return list(cache.layers)


def _states(cache: DynamicCache) -> dict[str, Tensor]:
    """What a model notes on its cache besides keys and values; the first dimension is the rows.

    How far a prompt's length stretched its rotary frequencies, say, which its keys were turned by.
    """
    return {name: value for name, value in vars(cache).items() if isinstance(value, Tensor)}


def _padded(tensor: Tensor, length: int, axis: int) -> Tensor:
    """Zeros before a tensor, up to a length along an axis."""
    shape = list(tensor.shape)
    shape[axis] = length - shape[axis]
    return torch.cat([tensor.new_zeros(shape), tensor], dim=axis) if shape[axis] else tensor
