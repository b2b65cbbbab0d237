"""From the tokens of an answer to its text, piece by piece.

A piece that was told cannot be taken back. So nothing is told that a later token could change: half
of a character, or the beginning of a text that ends the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BROKEN = "\N{REPLACEMENT CHARACTER}"


class Speech:
    """The text of one answer as it grows.

    Args:
        tokenizer: The model's tokenizer.
        lead: What the model writes before an answer; it is no part of the text.
        stops: Texts that end the answer; they are no part of it either.

    Attributes:
        told: What has been told so far.
        stopped: Whether a stop text ended the answer.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, lead: str, stops: Sequence[str] = ()
    ) -> None:
        self._tokenizer, self._lead, self._stops = tokenizer, lead, tuple(stops)
        self._longest = max(map(len, self._stops), default=0)
        self._ids: list[int] = []
        self._window = 0  # where decoding begins: the text of a token depends on those before it
        self._settled = 0  # tokens whose text stands in ``_raw``
        self._raw = ""
        self.told = ""
        self.stopped = False

    @property
    def silent(self) -> bool:
        """Whether something was heard that is not told yet."""
        return self._settled < len(self._ids) or len(self._text) > len(self.told)

    def hear(self, token: int) -> str:
        """Take the next token; what may be told now, after what was told before."""
        self._ids.append(token)
        before = self._decode(self._ids[self._window : self._settled])
        now = self._decode(self._ids[self._window :])
        if len(now) > len(before) and not now.endswith(BROKEN):
            self._raw += now[len(before) :]
            self._window, self._settled = self._settled, len(self._ids)
        return self._tell(final=False)

    def finish(self) -> str:
        """The rest of an answer that has no further tokens."""
        whole = self._decode(self._ids)
        # A decoder may change what it said before, e.g. the blank before a comma: told is told.
        if whole.startswith(self._raw):
            self._raw = whole
        return self._tell(final=True)

    @property
    def _text(self) -> str:
        return self._raw.removeprefix(self._lead)

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def _tell(self, *, final: bool) -> str:
        leading = len(self._raw) < len(self._lead) and self._lead.startswith(self._raw)
        if self.stopped or (leading and not final):
            return ""
        text, start = self._text, len(self.told)
        # What was told ends where a stop could begin, so none begins before it.
        places = [place for stop in self._stops if (place := text.find(stop, start)) >= 0]
        self.stopped = bool(places)
        end = min(places) if places else len(text) - (0 if final else self._held(text))
        self.told = text[:end]
        return text[start:end]

    def _held(self, text: str) -> int:
        """Length of the longest end of the untold text that begins a stop."""
        for length in range(min(self._longest - 1, len(text) - len(self.told)), 0, -1):
            end = text[-length:]
            if any(len(stop) > length and stop.startswith(end) for stop in self._stops):
                return length
        return 0
