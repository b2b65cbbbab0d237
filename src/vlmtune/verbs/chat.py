"""``chat``: talk to a model in the terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlmtune.data.conversation import EncodedImage
from vlmtune.data.media import ImagePolicy, read_header
from vlmtune.errors import ImageError, UsageError, VlmtuneError
from vlmtune.models.load import LoadingConfig
from vlmtune.serving.dialogue import Dialogue
from vlmtune.serving.engine import Engine
from vlmtune.serving.served import Served, open_served
from vlmtune.serving.settings import MAX_NEW_TOKENS, EngineConfig, Settings

HELP = """/image PATH  show a picture with the next message; may be repeated
/clear       forget everything and begin anew
/exit        leave (or end of input)
Ctrl-C       break an answer off
"""
JOINERS = "\u200c\u200d"  # they shape letters and emoji, and move nothing


def chat(  # noqa: PLR0913
    model: str | Path,
    *,
    settings: Settings | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    image: ImagePolicy | None = None,
    base: str | None = None,
    loading: LoadingConfig | None = None,
    read: Callable[[], str],
    write: Callable[[str], None],
) -> dict[str, Any]:
    """Talk until the input ends.

    Args:
        model: Hub id, local model, run, checkpoint or adapter.
        settings: How to answer.
        max_new_tokens: Longest answer; what the context leaves where that is less.
        image: Image policy of a plain model; what was trained keeps its contract.
        base: Where an adapter's base is now, if it moved.
        loading: Device, dtype, quantization.
        read: The next line; raises ``EOFError`` at the end.
        write: Shows a piece of text at once.

    Returns:
        The keys of ``vlmtune chat --json``.
    """
    served = open_served(model, image=image, base=base, loading=loading)
    engine = Engine(served, EngineConfig(max_new_tokens=max_new_tokens))
    engine.start()
    try:
        talk = Talk(engine, served, settings or Settings(), write)
        with contextlib.suppress(EOFError):
            while talk.hear(read()):
                pass
    finally:
        engine.stop()
    return {"turns": talk.turns, "tokens": {"completion": talk.tokens}}


class Talk:
    """What each line of input does.

    Args:
        engine: What answers.
        served: The model.
        settings: How to answer.
        write: Shows a piece of text at once.

    Attributes:
        turns: Answers given.
        tokens: Tokens said.
    """

    def __init__(
        self, engine: Engine, served: Served, settings: Settings, write: Callable[[str], None]
    ) -> None:
        self._dialogue = Dialogue(engine, settings)
        self._contract = served.first.encoder.contract
        self._prompted = (self._contract.prompt or self._contract.instruction) is not None
        self._write = write
        self._pictures: list[EncodedImage] = []
        self.turns = self.tokens = 0

    def hear(self, line: str) -> bool:
        """Take one line; False to leave."""
        word, _, rest = line.strip().partition(" ")
        try:
            if word in ("/exit", "/quit"):
                return False
            if word == "/image":
                self._show(rest.strip())
            elif word == "/clear":
                self._dialogue.clear()
                self._pictures = []
            elif word.startswith("/") and not rest:
                self._write(HELP)
            elif line.strip() or (self._pictures and self._prompted):
                self._ask(line.strip())
        except VlmtuneError as error:
            self._write(f"{visible(str(error))}\n")
        return True

    def _show(self, name: str) -> None:
        path = Path(name).expanduser()
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UsageError(f"/image: {name!r} cannot be read: {error.strerror}") from None
        header = read_header(data, self._contract.image)
        self._pictures.append(EncodedImage(data, str(path)))
        size = f"{header.size.width} x {header.size.height}"
        self._write(f"{header.format}, {size}; it goes with the next message\n")

    def _ask(self, text: str) -> None:
        pictures, self._pictures = self._pictures, []
        try:
            for piece in self._dialogue.ask(text, pictures):
                self._write(visible(piece))
        except KeyboardInterrupt:
            self._write("\n(broken off)\n")
            return
        except ImageError:
            raise
        except VlmtuneError:
            self._pictures = pictures  # they may be asked about once more
            raise
        self._write("\n")
        answer = self._dialogue.last
        assert answer is not None
        self.turns, self.tokens = self.turns + 1, self.tokens + answer.completion_tokens
        for box in answer.boxes:
            corners = ", ".join(f"{value:.1f}" for value in box.xyxy)
            self._write(f"  picture {box.image + 1}: {visible(box.label)} [{corners}]\n")
        if answer.finish_reason == "length":
            self._write("(cut at the longest answer; --max-new-tokens allows more)\n")


def visible(text: str) -> str:
    """Text with everything escaped that could move a terminal's cursor or turn its direction."""
    return "".join(
        char
        if char in "\n\t" or char in JOINERS or char.isprintable()
        else char.encode("unicode_escape").decode()
        for char in text
    )
