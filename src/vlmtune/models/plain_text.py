"""Encoding a stretch of a row as text, as the tokenizer would have encoded it in its place.

A row's text is encoded in stretches: control tokens divide it, and an answer begins one. Tokenizers
made from SentencePiece put a blank before a text, some before the first stretch, some before each
one that follows a control token; none would put one in the middle of a text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Tokenizer, models

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# Characters beyond which a text is encoded as a batch of one: only that lets other threads run, and
# a server would stand still for the seconds that a million characters take.
LONG = 10_000


class Place(Enum):
    """Where a stretch of text stands."""

    FIRST = "first"  # before anything else
    AFTER_CONTROL = "after control"
    WITHIN = "within"  # in the middle of a text


class TextTokenizer:
    """A tokenizer that knows no control tokens: everything it reads is text.

    It shares the vocabulary with the one it is made from; a copy of a real one takes seconds.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        added = tokenizer.get_added_tokens_decoder().values()
        symbols = [token for token in added if _is_text(tokenizer, token)]
        self._by_place = {place: _text_only(tokenizer, place) for place in Place}
        for text_only in self._by_place.values():
            text_only.add_tokens(symbols)

    def ids(self, text: str, place: Place) -> list[int]:
        """Ids of a text that stands in ``place``."""
        tokenizer = self._by_place[place]
        if len(text) > LONG:
            return list(tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids)
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    def offsets(self, text: str, place: Place) -> list[int]:
        """Where each token of ``ids`` begins in the text, in characters."""
        encoding = self._by_place[place].encode(text, add_special_tokens=False)
        return [start for start, _ in encoding.offsets]


def control_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """Ids of the added tokens that are no text.

    Text are the symbols that an author of SentencePiece's defined as pieces of their own, such as
    Gemma's runs of newlines: not special, and in the vocabulary of the model itself.
    """
    return {
        token.content: identifier
        for identifier, token in tokenizer.get_added_tokens_decoder().items()
        if not _is_text(tokenizer, token)
    }


def _is_text(tokenizer: Tokenizer, token: AddedToken) -> bool:
    return not token.special and tokenizer.model.token_to_id(token.content) is not None


@dataclass(frozen=True)
class Stripping:
    """Control tokens that swallow the white space beside them.

    Attributes:
        before: Ids that swallow what stands before them.
        after: Ids that swallow what stands after them.
    """

    before: frozenset[int]
    after: frozenset[int]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Stripping:
        """Read the flags of a tokenizer's added tokens."""
        added: Mapping[int, Any] = tokenizer.added_tokens_decoder
        return cls(
            before=frozenset(number for number, token in added.items() if token.lstrip),
            after=frozenset(number for number, token in added.items() if token.rstrip),
        )


def _text_only(tokenizer: Tokenizer, place: Place) -> Tokenizer:
    text_only = Tokenizer(tokenizer.model)
    text_only.normalizer = tokenizer.normalizer
    text_only.pre_tokenizer = tokenizer.pre_tokenizer
    if place is Place.FIRST:
        return text_only
    # The parts have no setters; their JSON, around an empty model, is read back instead.
    shell = Tokenizer(models.BPE())
    shell.normalizer, shell.pre_tokenizer = tokenizer.normalizer, tokenizer.pre_tokenizer
    state = json.loads(shell.to_str())
    changed = {**state, **{key: _without_blank(state[key], place) for key in STAGES}}
    if changed != state:
        other = Tokenizer.from_str(json.dumps(changed))
        text_only.normalizer = other.normalizer
        text_only.pre_tokenizer = other.pre_tokenizer
    return text_only


STAGES = ("normalizer", "pre_tokenizer")


def _without_blank(stage: Any, place: Place) -> Any:
    """A normalizer's or pre-tokenizer's JSON without the blank it would put before a text."""
    if stage is None:
        return None
    kind = stage["type"]
    if kind == "Sequence":
        key = next(key for key in ("normalizers", "pretokenizers") if key in stage)
        inner = [_without_blank(each, place) for each in stage[key]]
        return {**stage, key: [each for each in inner if each is not None]}
    if kind == "Metaspace" and (place is Place.WITHIN or stage["prepend_scheme"] == "first"):
        return {**stage, "prepend_scheme": "never"}
    if place is Place.WITHIN and kind == "Prepend":
        return None
    if place is Place.WITHIN and kind == "ByteLevel":
        return {**stage, "add_prefix_space": False}
    return stage
