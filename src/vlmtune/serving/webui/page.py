"""The page itself: what stands where, and what happens when somebody touches it."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from vlmtune.errors import ImageError
from vlmtune.serving.limits import MIB, Limits
from vlmtune.serving.settings import MAX_NEW_TOKENS
from vlmtune.serving.webui import markup
from vlmtune.serving.webui.asking import Panel
from vlmtune.serving.webui.controls import settings_of
from vlmtune.serving.webui.examples import Example, system_of, turn_of
from vlmtune.serving.webui.history import History, Picture
from vlmtune.serving.webui.pictures import Pictures
from vlmtune.serving.webui.transcript import transcript, turn_at
from vlmtune.serving.webui.words import LANGUAGES, NAMES, Language, chosen, preferred, say

AT_ONCE = 64  # visitors whose answers are followed; the engine has its own queue
FORGOTTEN = 6 * 3600  # seconds after which a visitor who left is forgotten, pictures and all
TOAST_SECONDS = 15.0

Update = Any  # what Gradio takes for a component: a value, or properties to change


class Page:
    """One page for all visitors; each has a history of their own.

    Args:
        panel: What is asked.
        pictures: Opens what visitors show.
        examples: Rows to choose from; may be none.
        limits: How much a conversation may hold.
        max_new_tokens: Longest answer at first.
    """

    def __init__(
        self,
        panel: Panel,
        pictures: Pictures,
        examples: Sequence[Example] = (),
        limits: Limits | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
    ) -> None:
        self._panel, self._pictures, self._examples = panel, pictures, tuple(examples)
        self._limits = limits or Limits()
        self._max_new_tokens = max_new_tokens
        self._prompt = panel.sides[0].model.encoder.contract.prompt

    def build(self) -> gr.Blocks:
        """The page, ready to be mounted."""
        with gr.Blocks(
            title=f"vlmtune · {self._panel.sides[0].name}",
            analytics_enabled=False,
            delete_cache=(FORGOTTEN // 4, FORGOTTEN),
        ) as blocks:
            self._lay_out()
            self._connect(blocks)
        blocks.queue(default_concurrency_limit=AT_ONCE, max_size=4 * AT_ONCE, api_open=False)
        return blocks

    # What stands where

    def _lay_out(self) -> None:
        sides = self._panel.sides
        self._titles: list[gr.Markdown] = []
        self._history = gr.State(History(), time_to_live=FORGOTTEN)
        with gr.Row(elem_id="head"):
            gr.HTML(f"<h1>vlmtune<small>{html.escape(sides[0].name)}</small></h1>")
            self._language = gr.Radio(
                [NAMES[each] for each in LANGUAGES],
                value=NAMES["en"],
                show_label=False,
                container=False,
                elem_id="language",
                min_width=150,
            )
        with gr.Row(elem_classes="pair" if len(sides) > 1 else None):
            self._chats = [self._lay_out_chat(side) for side in range(len(sides))]
        self._box = gr.MultimodalTextbox(
            placeholder=self._invitation("en"),
            show_label=False,
            file_types=["image"],
            file_count="multiple",
            max_plain_text_length=100_000,
            max_lines=8,
            elem_id="question",
            autofocus=True,
        )
        with gr.Row(elem_id="actions"):
            self._again = gr.Button(say("en", "again"), size="sm")
            self._clear = gr.Button(say("en", "clear"), size="sm")
        if self._examples:
            self._lay_out_examples()
        with gr.Accordion(say("en", "sampling"), open=False) as self._sampling:
            self._temperature = gr.Slider(0, 2, 0, step=0.05, label=say("en", "temperature"))
            self._top_p = gr.Slider(0.05, 1, 1, step=0.05, label=say("en", "top_p"))
            with gr.Row():
                self._most = gr.Number(self._max_new_tokens, precision=0, minimum=1)
                self._seed = gr.Textbox(max_lines=1, max_length=19)  # a number cannot be empty

    def _lay_out_chat(self, side: int) -> gr.Chatbot:
        with gr.Column(min_width=280):
            if len(self._panel.sides) > 1:
                # Gradio's own label would lie on the text.
                self._titles.append(gr.Markdown(self._title(side, "en"), elem_classes="title"))
            return gr.Chatbot(
                label=self._panel.sides[side].name,
                show_label=False,
                elem_classes="chat",
                editable="user",
                group_consecutive_messages=False,  # of a picture and a text, none could be edited
                buttons=[],
                latex_delimiters=markup.DELIMITERS,
                placeholder=say("en", "empty"),
                feedback_options=None,
                allow_tags=False,
                allow_file_downloads=False,
            )

    def _lay_out_examples(self) -> None:
        # Not folded: Gradio measures a gallery when it is laid out.
        self._gallery_head = gr.Markdown(elem_id="examples-head")
        self._gallery = gr.Gallery(
            [(str(one.pictures[0].preview), _caption(one)) for one in self._examples],
            show_label=False,
            columns=6,
            fit_columns=False,
            height="auto",
            allow_preview=False,
            object_fit="contain",
            interactive=False,
            buttons=[],
            elem_id="examples",
        )

    # What happens

    def _connect(self, blocks: gr.Blocks) -> None:
        quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        settings = [self._temperature, self._top_p, self._most, self._seed, self._language]
        shown = [self._box, *self._chats]
        inputs = [self._history, *settings]
        asked: list[Any] = [
            self._box.submit(self.ask, [self._box, *inputs], shown, **quiet),
            self._again.click(self.again, inputs, shown, **quiet),
        ]
        for side, chat in enumerate(self._chats):
            asked += [
                chat.retry(self._retry(side), inputs, shown, **quiet),
                chat.edit(self._edit(side), inputs, shown, **quiet),
            ]
        said = [self._history, self._language]
        ended = [self._box.stop(self.stopped, said, shown, cancels=asked, **quiet)]
        ended += [
            clear(self.clear, self._history, shown, cancels=asked, **quiet)
            for clear in (self._clear.click, *(chat.clear for chat in self._chats))
        ]
        for event in ended:
            # What the cancelled event had sent before may arrive after this one's answer.
            event.then(self.settled, said, self._chats, **quiet)
        worded = self._worded()
        self._language.change(
            self.speak, [self._language, self._history], [*worded, *self._chats], **quiet
        )
        blocks.load(self.greet, None, self._language, **quiet)
        # Also where the language is English already: labels are written in one place.
        blocks.load(self.speak, [self._language, self._history], [*worded, *self._chats], **quiet)
        if self._examples:
            self._gallery.select(self.choose, None, [self._box, self._gallery], **quiet)

    def ask(self, value: dict[str, Any], history: History, *settings: Any) -> Iterator[Any]:
        """Answer what was typed."""
        language = chosen(settings[-1])
        text, files = value["text"].strip(), [Path(file) for file in value["files"]]
        try:
            pictures = self._read(files, language)
            self._judge(text, pictures, history, language)
        except _Refusal as refusal:
            gr.Warning(markup.question(str(refusal)), duration=TOAST_SECONDS)
            yield [gr.skip()] * (1 + len(self._chats))
            return
        if not history.turns:
            history.system = system_of(text, pictures, self._examples)
        history.add(turn_of(text, pictures, self._examples))
        yield from self._answer(history, settings, {"value": {"text": "", "files": []}})

    def again(self, history: History, *settings: Any) -> Iterator[Any]:
        """Answer the last question once more."""
        if history.turns:
            history.again(len(history.turns) - 1)
            yield from self._answer(history, settings)

    def _retry(self, side: int) -> Any:
        def retry(data: gr.RetryData, history: History, *settings: Any) -> Iterator[Any]:
            """Answer the question of a message once more."""
            if history.turns:
                history.again(turn_at(history, side, _place(data.index)))
                yield from self._answer(history, settings)

        return retry

    def _edit(self, side: int) -> Any:
        def edit(data: gr.EditData, history: History, *settings: Any) -> Iterator[Any]:
            """Ask another question in place of an earlier one."""
            language = chosen(settings[-1])
            text = markup.typed(str(data.value)).strip()
            if not text or len(text) > self._limits.max_characters:
                gr.Warning(say(language, "nothing_asked"), duration=TOAST_SECONDS)
                yield [gr.skip(), *self._transcripts(history, language)]
            elif history.turns:
                history.edit(turn_at(history, side, _place(data.index)), text)
                yield from self._answer(history, settings)

        return edit

    def stopped(self, history: History, language: str) -> list[Update]:
        """What stands there when an answer was broken off."""
        history.run += 1
        for reply in history.turns[-1].replies if history.turns else ():
            if reply.state == "speaking":
                reply.state = "stopped"
        return [_ready(), *self._transcripts(history, chosen(language))]

    def settled(self, history: History, language: str) -> list[Update]:
        """What stands there, once more."""
        return self._transcripts(history, chosen(language))

    def clear(self, history: History) -> list[Update]:
        """Forget everything."""
        history.clear()
        return [_ready(), *([] for _ in self._chats)]

    def choose(self, data: gr.SelectData) -> list[Update]:
        """Put an example into the box, ready to be sent."""
        example = self._examples[_place(data.index)]
        files = [str(file) for file in example.files]
        return [{"text": example.text, "files": files}, gr.Gallery(selected_index=None)]

    def greet(self, request: gr.Request) -> str:
        """The language of the visitor's browser."""
        return NAMES[preferred(request.headers.get("accept-language", ""))]

    # Words

    def _worded(self) -> list[Any]:
        components = [
            self._box, self._again, self._clear, self._sampling,
            self._temperature, self._top_p, self._most, self._seed, *self._titles,
        ]  # fmt: skip
        return [*components, self._gallery_head] if self._examples else components

    def speak(self, name: str, history: History) -> list[Update]:
        """Everything in the chosen language."""
        language = chosen(name)

        def word(key: str) -> str:
            return say(language, key)

        updates: list[Update] = [
            gr.MultimodalTextbox(placeholder=self._invitation(language)),
            gr.Button(word("again")),
            gr.Button(word("clear")),
            gr.Accordion(label=word("sampling")),
            gr.Slider(label=word("temperature"), info=word("temperature_info")),
            gr.Slider(label=word("top_p"), info=word("top_p_info")),
            gr.Number(label=word("max_tokens")),
            gr.Textbox(label=word("seed"), info=word("seed_info")),
        ]
        updates += [self._title(side, language) for side in range(len(self._titles))]
        if self._examples:
            updates.append(f"**{word('examples')}.** {word('examples_info')}")
        return updates + [
            gr.Chatbot(shown, placeholder=word("empty"))
            for shown in self._transcripts(history, language)
        ]

    def _title(self, side: int, language: Language) -> str:
        name = markup.question(self._panel.sides[side].name)
        return f"**{say(language, ('tuned', 'base')[side])}** · {name}"

    def _invitation(self, language: Language) -> str:
        if self._prompt is None:
            return say(language, "ask")
        return say(language, "ask_default", prompt=self._prompt)

    # Answers

    def _answer(
        self, history: History, settings: Sequence[Any], box: dict[str, Any] | None = None
    ) -> Iterator[list[Update]]:
        *numbers, name = settings
        language = chosen(name)
        run = history.run
        busy = gr.MultimodalTextbox(submit_btn=False, stop_btn=True, **(box or {}))
        yield [busy, *self._transcripts(history, language)]
        for _ in self._panel.answers(history, settings_of(*numbers)):
            yield [gr.skip(), *self._transcripts(history, language)]
        if history.run == run:  # nothing newer is being answered
            yield [_ready(), *self._transcripts(history, language)]

    def _transcripts(self, history: History, language: Language) -> list[Update]:
        return [transcript(history, side, language) for side in range(len(self._chats))]

    # What visitors bring

    def _read(self, files: Sequence[Path], language: Language) -> list[Picture]:
        """Pictures from uploaded files; the gate lets no other files through.

        Raises:
            _Refusal: If one is too large, or cannot be opened.
        """
        most = self._limits.max_image_bytes
        if len(files) > self._limits.max_images:
            counts = {"found": len(files), "most": self._limits.max_images}
            raise _Refusal(say(language, "too_many", **counts))
        pictures = []
        for file in files:
            try:
                size = file.stat().st_size
                if size > most:
                    sizes = {"found": size / MIB, "most": most / MIB}
                    raise _Refusal(say(language, "too_large", name=file.name, **sizes))
                pictures.append(self._pictures.show(file.read_bytes()))
            except ImageError as error:
                values = {"name": file.name, "reason": error}
                raise _Refusal(say(language, "bad_picture", **values)) from None
            except OSError as error:
                values = {"name": file.name, "reason": error.strerror}
                raise _Refusal(say(language, "bad_picture", **values)) from None
        return pictures

    def _judge(
        self, text: str, pictures: Sequence[Picture], history: History, language: Language
    ) -> None:
        """Refuse what cannot be asked.

        Raises:
            _Refusal: Saying why.
        """
        found = len(pictures) + history.pictures
        if not text and not pictures:
            raise _Refusal(say(language, "nothing_asked"))
        if not text and self._prompt is None:
            raise _Refusal(say(language, "no_prompt"))
        if found > (most := self._limits.max_images):
            raise _Refusal(say(language, "too_many", found=found, most=most))
        if (long := len(text) + history.characters) > (most := self._limits.max_characters):
            raise _Refusal(say(language, "too_long", found=long, most=most))


class _Refusal(Exception):  # noqa: N818 - a sentence for the visitor, no error of ours
    """Why something is not asked."""


def _ready() -> Update:
    return gr.MultimodalTextbox(submit_btn=True, stop_btn=False)


def _caption(example: Example) -> str:
    text = " ".join((example.text or example.truth.text).split())
    return text if len(text) <= 40 else text[:39] + "…"


def _place(index: Any) -> int:
    """A message's place; Gradio gives a message's part as a pair."""
    return int(index[0] if isinstance(index, list | tuple) else index)
