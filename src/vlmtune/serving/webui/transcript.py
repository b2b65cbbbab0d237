"""A conversation as the messages of Gradio's chat window."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmtune.serving.webui import markup
from vlmtune.serving.webui.history import History, Reply, Truth, Turn
from vlmtune.serving.webui.words import Language, say

Shown = dict[str, Any]


def transcript(history: History, side: int, language: Language) -> list[Shown]:
    """What one model was asked and said.

    Args:
        history: The conversation.
        side: Which model.
        language: Of what the page itself says.
    """
    messages = []
    for turn in history.turns:
        messages.append(_question(turn))
        if side < len(turn.replies):
            messages += _reply(turn.replies[side], language)
            if turn.truth is not None and turn.replies[side].state != "speaking":
                messages += _truth(turn.truth, language)
    return messages


def turn_at(history: History, side: int, index: int) -> int:
    """The turn that a message of ``transcript`` belongs to; the last one for what is beyond."""
    place = 0
    for number, turn in enumerate(history.turns):
        place += 1
        if side < len(turn.replies):
            place += len(_reply(turn.replies[side], "en"))
            if turn.truth is not None and turn.replies[side].state != "speaking":
                place += len(_truth(turn.truth, "en"))
        if index < place:
            return number
    return len(history.turns) - 1


def _question(turn: Turn) -> Shown:
    text = markup.question(turn.text)
    content = [
        *_files([picture.preview for picture in turn.pictures]),
        *([_text(text)] * bool(text)),
    ]
    return {"role": "user", "content": content}


def _reply(reply: Reply, language: Language) -> list[Shown]:
    whole = reply.state != "speaking"
    shown = markup.answer(reply.text, whole=whole)
    if not shown.strip():
        shown = "…" if not whole else "" if reply.fault else f"*{say(language, 'silent')}*"
    shown = "\n\n".join(filter(None, (shown, _note(reply, language))))
    content = [_text(shown), *_files(reply.drawn)]
    messages: list[Shown] = [{"role": "assistant", "content": content}]
    if whole and reply.text:
        count = say(
            language, "count",
            prompt=reply.prompt_tokens, tokens=reply.tokens, seconds=reply.seconds,
        )  # fmt: skip
        messages.append(
            {
                "role": "assistant",
                "content": [_text(markup.code(reply.text))],
                "metadata": {"title": say(language, "raw"), "log": count, "status": "done"},
            }
        )
    return messages


def _note(reply: Reply, language: Language) -> str:
    if reply.state == "failed":
        return "⚠️ " + markup.question(say(language, "failed", reason=reply.fault))
    if reply.state == "length":
        return f"*{say(language, 'cut')}*"
    return f"*{say(language, 'stopped')}*" if reply.state == "stopped" else ""


def _truth(truth: Truth, language: Language) -> list[Shown]:
    # One part a message: Gradio gives every part a frame and a title of its own.
    parts = [_text(markup.answer(truth.text))] if truth.text.strip() else []
    title = f"✓ {say(language, 'truth')}"
    return [
        {"role": "assistant", "content": [part], "metadata": {"title": title}}
        for part in [*parts, *_files(truth.drawn)]
    ]


def _text(text: str) -> Shown:
    return {"type": "text", "text": text}


def _files(paths: Sequence[Path]) -> list[Shown]:
    return [{"path": str(path)} for path in paths]
