"""The text rules of 2023 to the letter, for comparison with what the original code gave.

In the original an image is a path inside the text, smuggled to the model as the values of its bytes
in the place of token ids. vlmtune takes images as images: nothing outside tests calls this module,
and nothing in it opens a path.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vlmtune.errors import RowError
from vlmtune.models.assemble import IGNORED
from vlmtune.models.qwen_vl.chat import WINDOW, turns_that_fit
from vlmtune.models.qwen_vl.controls import (
    END_OF_TEXT,
    IMAGE_END,
    IMAGE_PAD,
    IMAGE_START,
    TAGS,
    TURN_END,
    TURN_START,
)
from vlmtune.models.qwen_vl.tokenization import (
    ALLOWED,
    Allowed,
    QWenTokenizer,
    text_ids,
    token_bytes,
)

SPAN = 256  # placeholders of an image, and so the most bytes of a path
SYSTEM = "You are a helpful assistant."

Turn = tuple[str, str | None]  # a question and its answer


@dataclass(frozen=True, slots=True)
class Context:
    """What the model is asked: as text, and as ids."""

    text: str
    ids: list[int]


@dataclass(frozen=True, slots=True)
class Example:
    """A training row of the original, padded to its full length.

    Attributes:
        ids: Token ids.
        labels: The id where a token is supervised, -100 elsewhere; not shifted.
        mask: False on padding.
    """

    ids: list[int]
    labels: list[int]
    mask: list[bool]


def encode(tokenizer: QWenTokenizer, text: str, allowed: Allowed = "all") -> list[int]:
    """Ids of a text with its image paths as byte values.

    Raises:
        RowError: ``bad_markup``: an image tag is not closed, its path is too long or holds a tag.
    """
    text = unicodedata.normalize("NFC", text)
    ids: list[int] = []
    start = 0
    while (opening := text.find(IMAGE_START, start)) >= 0:
        closing = text.find(IMAGE_END, opening)
        if closing < 0:
            raise RowError("bad_markup", f"{text[opening : opening + 80]!r}: <img> is not closed")
        path = text[opening + len(IMAGE_START) : closing]
        ids += text_ids(tokenizer, text[start:opening], allowed)
        ids += _span(tokenizer, path, allowed)
        start = closing + len(IMAGE_END)
    return ids + text_ids(tokenizer, text[start:], allowed)


def decode(
    tokenizer: QWenTokenizer,
    ids: Sequence[int],
    *,
    skip_controls: bool = False,
    keep_tags: bool = False,
    errors: str = "replace",
) -> str:
    """The text of ids, image paths included.

    Args:
        tokenizer: Qwen-VL's.
        ids: Token ids, byte values within images.
        skip_controls: Leave out control tokens; paths of images stay.
        keep_tags: With ``skip_controls``, keep the tags of phrases, boxes and quadrangles.
        errors: What happens to bytes that are no text, as for ``bytes.decode``.

    Raises:
        RowError: ``bad_markup``: an image is not closed or has no padding.
    """
    controls = _controls(tokenizer)
    skipped = set(controls.values()) if skip_controls else set()
    if keep_tags:
        skipped -= {controls[tag] for tag in TAGS}
    found = bytearray()
    place = 0
    while place < len(ids):
        if ids[place] not in skipped:
            found += token_bytes(tokenizer, ids[place : place + 1])
        if ids[place] == controls[IMAGE_START]:
            end = _find(ids, controls[IMAGE_END], place, len(ids))
            pad = _find(ids, controls[IMAGE_PAD], place, end)
            found += bytes(ids[place + 1 : pad])
            place = end - 1
        place += 1
    return found.decode("utf-8", errors)


def make_context(
    tokenizer: QWenTokenizer,
    query: str,
    history: Sequence[Turn] = (),
    *,
    system: str = "",
    window: int = WINDOW,
) -> Context:
    """ChatML with as much of the history as the window has room for."""
    line = _line(tokenizer)
    first = _turn(tokenizer, "system", system)
    turns = [_exchange(tokenizer, turn) for turn in history]
    fitting = turns_that_fit(
        [len(turn.ids) for turn in turns], system=len(first.ids), window=window
    )
    asked = _turn(tokenizer, "user", query)
    opening = [_controls(tokenizer)[TURN_START], *text_ids(tokenizer, "assistant"), *line]
    kept = turns[len(turns) - fitting :]
    return Context(
        text="".join(
            (
                first.text,
                *(turn.text for turn in kept),
                "\n",
                asked.text,
                "\n<|im_start|>assistant\n",
            )
        ),
        ids=[
            *first.ids,
            *(identifier for turn in kept for identifier in turn.ids),
            *line,
            *asked.ids,
            *line,
            *opening,
        ],
    )


def stop_words(tokenizer: QWenTokenizer, chat_format: str = "chatml") -> list[list[int]]:
    """Sequences of ids that end an answer; ``raw`` is the format of the model without chat."""
    controls = _controls(tokenizer)
    if chat_format == "raw":
        return [text_ids(tokenizer, "Human:"), [controls[END_OF_TEXT]]]
    return [[controls[TURN_END]], [controls[TURN_START]]]


def decode_answer(tokenizer: QWenTokenizer, context: Context, generated: Sequence[int]) -> str:
    """The answer of generated ids; where no turn ends, the original loses the last token."""
    stops = {word for words in stop_words(tokenizer) for word in words}
    end = next((place for place, each in enumerate(generated) if each in stops), len(generated) - 1)
    text = decode(tokenizer, [*context.ids, *generated[:end]])
    return text[len(context.text) :].strip()


def training_example(
    tokenizer: QWenTokenizer,
    turns: Sequence[Mapping[str, str]],
    length: int,
    *,
    system: str = SYSTEM,
) -> Example:
    """A row as the original trains it.

    Control tokens in a text are obeyed. Of every turn the original supervises ``<|im_start|>``,
    ``<|im_end|>`` and the line break behind it, of an assistant's turn the content as well.

    Args:
        tokenizer: Qwen-VL's.
        turns: ``{"from": role, "value": text}``; an answer before the first question is dropped.
        length: Where the row is cut, or padded to.
        system: The system turn.
    """
    controls, line = _controls(tokenizer), _line(tokenizer)
    if turns and turns[0]["from"] != "user":
        turns = turns[1:]
    ids: list[int] = []
    labels: list[int] = []
    for turn in ({"from": "system", "value": system}, *turns):
        role = [*text_ids(tokenizer, turn["from"]), *line]
        content = encode(tokenizer, turn["value"])
        supervised = turn["from"] == "assistant"
        start, end = controls[TURN_START], [controls[TURN_END], *line]
        ids += [start, *role, *content, *end]
        labels += [start, *[IGNORED] * len(role)]
        labels += content if supervised else [IGNORED] * len(content)
        labels += end
    padding = max(length - len(ids), 0)
    ids = (ids + [controls[END_OF_TEXT]] * padding)[:length]
    labels = (labels + [IGNORED] * padding)[:length]
    return Example(ids, labels, [each != controls[END_OF_TEXT] for each in ids])


def latest_picture(answer: str, history: Sequence[Turn]) -> str | None:
    """The path of the picture that boxes are drawn on: the answer's, or the latest question's."""
    for text in (answer, *(question for question, _ in reversed(history))):
        start = text.rfind(IMAGE_START)
        end = text.find(IMAGE_END, start)
        if 0 <= start < end:
            return text[start + len(IMAGE_START) : end]
    return None


def _span(tokenizer: QWenTokenizer, path: str, allowed: Allowed) -> list[int]:
    controls = _controls(tokenizer)
    values = path.encode()
    if len(values) > SPAN:
        raise RowError(
            "bad_markup", f"an image's path has {len(values)} bytes; expected at most {SPAN}"
        )
    if any(token in path for token in ALLOWED[allowed]):
        raise RowError("bad_markup", f"an image's path holds a tag: {path!r}")
    padding = [controls[IMAGE_PAD]] * (SPAN - len(values))
    return [controls[IMAGE_START], *values, *padding, controls[IMAGE_END]]


def _turn(tokenizer: QWenTokenizer, role: str, content: str) -> Context:
    controls = _controls(tokenizer)
    return Context(
        text=f"{TURN_START}{role}\n{content}{TURN_END}",
        ids=[
            controls[TURN_START],
            *text_ids(tokenizer, role),
            *_line(tokenizer),
            *encode(tokenizer, content, "image"),
            controls[TURN_END],
        ],
    )


def _exchange(tokenizer: QWenTokenizer, turn: Turn) -> Context:
    """A question and its answer, a line break before each."""
    line = _line(tokenizer)
    question, answer = turn
    asked = _turn(tokenizer, "user", question)
    said = Context("", []) if answer is None else _turn(tokenizer, "assistant", answer)
    return Context(f"\n{asked.text}\n{said.text}", [*line, *asked.ids, *line, *said.ids])


def _find(ids: Sequence[int], wanted: int, start: int, end: int) -> int:
    for place in range(start, end):
        if ids[place] == wanted:
            return place
    raise RowError("bad_markup", f"the image at token {start} is not closed or has no padding")


def _line(tokenizer: QWenTokenizer) -> list[int]:
    return text_ids(tokenizer, "\n")


def _controls(tokenizer: QWenTokenizer) -> Mapping[str, int]:
    return tokenizer.get_added_vocab()
