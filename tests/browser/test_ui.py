"""The chat page as a visitor sees it: headless Chromium, tiny models, one of which has learned."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from PIL import Image, ImageDraw

from devtools import Browser, BrowserError, find_browser
from visitor import READY, Visitor
from vlmtune.data.drawing import COLOURS

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(find_browser() is None, reason="no Chromium is installed"),
    # Gradio's own, on import and while it serves.
    pytest.mark.filterwarnings("default"),
    pytest.mark.timeout(600),
]

DESK, PHONE = {"width": 1200, "height": 900}, {"width": 390, "height": 844}
FIND, READ = "Find the round thing.", "Write this formula in LaTeX."
BALL = (40, 60, 140, 160)
FORMULA = r"\frac { a + b } { c ^ { 2 } } = \sqrt { x }"
STEPS = 120


@dataclass
class World:
    """A running page.

    Attributes:
        url: Where it is.
        folder: Pictures, and where screenshots may go.
        engines: What answers: tuned and base.
    """

    url: str
    folder: Path
    engines: list[Any]

    def idle(self, seconds: float = 10.0) -> bool:
        """Whether nothing is answered any more within so many seconds."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if not any(engine.running or engine.waiting for engine in self.engines):
                return True
            time.sleep(0.05)
        return False

    def busy(self, seconds: float = 5.0) -> bool:
        """Whether something is answered within so many seconds."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if any(engine.running for engine in self.engines):
                return True
            time.sleep(0.02)
        return False


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base``, ``run``, which has learned two rows by heart, and ``data`` with these rows."""
    from vlmtune.data.prepare import PrepareOptions, prepare
    from vlmtune.formulas import render
    from vlmtune.recipe import recipe_from
    from vlmtune.testing import TinySize, tiny
    from vlmtune.verbs.train import train

    folder = tmp_path_factory.mktemp("ui")
    ball = Image.new("RGB", (320, 240), "#eef2f7")
    ImageDraw.Draw(ball).ellipse(BALL, fill="#d62728")
    ball.save(folder / "ball.png")
    render(FORMULA).save(folder / "formula.png")
    x1, y1, x2, y2 = (round(v * 1000 / s) for v, s in zip(BALL, (320, 240) * 2, strict=True))
    box = f"<ref>red ball</ref><box>({x1},{y1}),({x2},{y2})</box>"
    rows = [_row(folder / "ball.png", FIND, box), _row(folder / "formula.png", READ, FORMULA)]
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    prepare(folder / "rows.json", folder / "data", PrepareOptions())
    size = TinySize(hidden=64, vision_width=32)
    base = tiny("qwen2_vl", folder / "base", seed=1, size=size)
    recipe = recipe_from(
        {
            "name": "tiny",
            "model": {"base": str(base)},
            "data": {"path": str(folder / "data")},
            "image": {"max_pixels": 6272},
            "tuning": {"method": "full"},
            "training": {
                "max_steps": STEPS,
                "batch_size": 2,
                "learning_rate": 3e-3,
                "schedule": "constant",
                "precision": "fp32",
                "workers": 0,
            },
            "evaluation": {"before": False, "after": False},
        }
    )
    train(recipe, run_dir=folder / "run")
    return folder


def _row(image: Path, question: str, answer: str) -> dict[str, Any]:
    turns = [("user", f"Picture 1: <img>{image}</img>\n{question}"), ("assistant", answer)]
    said = [{"from": role, "value": text} for role, text in turns]
    return {"id": image.stem, "conversations": said}


@pytest.fixture(scope="module")
def world(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """The page on a free port, in a thread of this process."""
    folder = tmp_path_factory.mktemp("page")
    patch = pytest.MonkeyPatch()
    patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    patch.setenv("GRADIO_TEMP_DIR", str(folder / "uploads"))
    from vlmtune.serving import server
    from vlmtune.serving.engine import Engine
    from vlmtune.verbs import ui

    servers: list[Any] = []
    loops: list[asyncio.AbstractEventLoop] = []
    urls: list[str] = []
    engines: list[Engine] = []

    def remembered(*arguments: Any) -> Engine:
        engines.append(Engine(*arguments))
        return engines[-1]

    def kept_loop() -> asyncio.AbstractEventLoop:  # Gradio makes some, and leaves them open
        loops.append(asyncio.get_event_loop_policy().new_event_loop())
        return loops[-1]

    def run(made: Any) -> None:  # without signals, which are for main threads
        servers.append(made)
        made.run()

    def show() -> None:
        ui.ui(
            models / "run",
            folder=folder,
            compare=models / "base",
            data=models / "data",
            port=0,
            max_new_tokens=64,
            ready=lambda url, _: urls.append(url),
        )

    patch.setattr(asyncio, "new_event_loop", kept_loop)
    patch.setattr(ui, "Engine", remembered)
    patch.setattr(server, "run", run)
    thread = threading.Thread(target=show)
    thread.start()
    while not urls and thread.is_alive():
        time.sleep(0.05)
    yield World(urls[0], models, engines)
    servers[0].should_exit = True
    thread.join(30)
    patch.undo()
    for loop in loops:
        loop.close()
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture
def come(world: World, browser: Browser, tmp_path: Path) -> Iterator[Any]:
    """Open the page as a new visitor, who leaves with the test."""
    visitors = []

    def come(**options: Any) -> Visitor:
        visitor = Visitor.come(browser, world.url, tmp_path / "blank.html", **{**DESK, **options})
        visitors.append(visitor)
        visitor.wait(READY)
        visitor.wait("document.body.innerText.includes('Regenerate') || "
                     "document.body.innerText.includes('重新生成')")  # fmt: skip
        return visitor

    yield come
    # Each holds a connection, and a browser opens only six to one host.
    for visitor in visitors:
        with contextlib.suppress(BrowserError):  # one that has left closes a moment later
            visitor.tab.call("Page.close")
    assert world.idle()


def slow(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Let every token take its time."""
    from vlmtune.serving.batches import Batch

    step = Batch.step

    def slowly(batch: Batch) -> Any:
        time.sleep(seconds)
        return step(batch)

    monkeypatch.setattr(Batch, "step", slowly)


def column(side: int) -> str:
    return f".pair > :nth-child({side + 1}) .chat"


def answered(visitor: Visitor, count: int) -> None:
    """Wait until both columns hold so many answers, and the page takes questions again."""
    for side in (0, 1):
        raw = f"document.querySelector('{column(side)}').innerText.match(/Raw text|原始文本/g)"
        visitor.wait(f"({raw} || []).length == {count}")
    visitor.wait("!!document.querySelector('#question .submit-button')")


def ask(visitor: Visitor, text: str, count: int, *files: Path) -> None:
    if files:
        visitor.upload(files)
    visitor.write(text)
    visitor.send()
    answered(visitor, count)


def drawn(visitor: Visitor, side: int, where: str = ".message") -> list[str]:
    """Addresses of the pictures in the model's own messages; ``.thought-group``: of the truth."""
    code = f"[...document.querySelectorAll('{column(side)} .bot-row img')]"
    found: list[str] = visitor.look(
        f"{code}.filter(e => e.closest('.thought-group, .message').matches('{where}'))"
        ".map(e => e.src)"
    )
    return found


def watch(visitor: Visitor, side: int) -> None:
    """Let the page record what a column says as it changes, in ``said``."""
    visitor.look(
        "window.said = []; new MutationObserver(() => {"
        f"const e = document.querySelector('{column(side)}'); const t = e ? e.innerText : '';"
        "if (window.said.at(-1) !== t) window.said.push(t) })"
        ".observe(document.body, {subtree: true, childList: true, characterData: true})"
    )


def test_a_picture_a_question_a_box(come, world):
    visitor = come()
    ask(visitor, FIND, 1, world.folder / "ball.png")
    assert "red ball" in visitor.text(column(0))
    (address,) = drawn(visitor, 0)
    with urllib.request.urlopen(address, timeout=10) as answer:
        picture = Image.open(io.BytesIO(answer.read())).convert("RGB")
    line = tuple(int(COLOURS[0][place : place + 2], 16) for place in (1, 3, 5))
    scale = picture.width / 320
    edge = picture.crop(tuple(round(v * scale) for v in (BALL[0] - 6, 95, BALL[0] + 6, 125)))
    assert any(
        max(abs(a - b) for a, b in zip(pixel, line, strict=True)) < 50
        for _, pixel in edge.getcolors(99_999)
    )
    # The control: nothing is drawn where an answer has no box, as the base's.
    assert drawn(visitor, 1) == []


def test_an_answer_is_seen_while_it_is_spoken(come, world, monkeypatch):
    slow(monkeypatch, 0.05)
    visitor = come()
    watch(visitor, 0)
    ask(visitor, FIND, 1, world.folder / "ball.png")
    texts = visitor.look("window.said.filter(t => !/Raw text/.test(t))")
    grown = list(dict.fromkeys(text.split(FIND)[-1].strip() for text in texts if FIND in text))
    spoken = [text for text in grown if text and text != "…"]
    assert len(spoken) >= 3, grown
    assert all(after.startswith(before) for before, after in pairwise(spoken)), spoken
    assert world.idle()


def test_formulas_are_set_and_raw_text_is_a_click_away(come, world):
    visitor = come()
    ask(visitor, READ, 1, world.folder / "formula.png")
    assert visitor.look(f"document.querySelectorAll('{column(0)} .katex .sqrt').length") >= 1
    assert FORMULA not in visitor.text(f"{column(0)} pre")
    visitor.click(f"{column(0)} [role=button]", "Raw text")
    visitor.wait(f"document.querySelector('{column(0)}').innerText.includes({json.dumps(FORMULA)})")


def test_base_beside_tuned_and_the_truth(come, world):
    visitor = come()
    ask(visitor, FIND, 1, world.folder / "ball.png")
    tuned, base = visitor.text(column(0)), visitor.text(column(1))
    assert "red ball" in tuned
    assert "red ball(" not in base
    assert "Expected answer" in tuned
    for side in (0, 1):
        assert len(drawn(visitor, side, ".thought-group")) == 1


def test_an_example_is_chosen(come):
    visitor = come()
    visitor.click("#examples button.thumbnail-lg, #examples .thumbnail-item", "")
    visitor.wait("document.querySelector('#question textarea').value.length > 0")
    visitor.wait("document.querySelectorAll('#question .thumbnail-item').length == 1")
    visitor.send()
    answered(visitor, 1)
    assert "Expected answer" in visitor.text(column(0))


def test_paste_edit_again_and_clear(come, world):
    visitor = come()
    visitor.paste((world.folder / "ball.png").read_bytes())
    ask(visitor, FIND, 1)
    assert "red ball" in visitor.text(column(0))
    ask(visitor, "And now?", 2)
    # The first question is edited: what came after it is gone, its picture stays.
    visitor.click(f"{column(0)} button[title=Edit]")
    visitor.wait(f"!!document.querySelector('{column(0)} textarea')")
    visitor.write("Find <b>it</b> <|im_end|>", f"{column(0)} textarea")
    visitor.click(f"{column(0)} button[title=Submit]")
    visitor.wait(f"!document.querySelector('{column(0)}').innerText.includes('And now?')")
    answered(visitor, 1)
    assert "<|im_end|>" in visitor.text(column(0))
    assert visitor.look(f"document.querySelectorAll('{column(0)} .user-row img').length") >= 1
    visitor.click("#actions button", "Regenerate")
    time.sleep(0.3)
    answered(visitor, 1)
    visitor.click("#actions button", "Clear")
    visitor.wait("document.body.innerText.includes('Show a picture and ask.')")
    assert visitor.look("document.querySelectorAll('.chat img').length") == 0


def test_two_languages(come):
    visitor = come()
    visitor.click("#language label", "中文")
    visitor.wait("document.body.innerText.includes('重新生成')")
    text = visitor.text("body")
    for english in ("Regenerate", "Clear", "Sampling", "Examples", "tuned"):
        assert english not in text
    assert "拖入" in visitor.look("document.querySelector('#question textarea').placeholder")
    visitor.click("#language label", "English")
    visitor.wait("document.body.innerText.includes('Regenerate')")
    chinese = come(language="zh-CN,zh;q=0.9")
    chinese.wait("document.body.innerText.includes('重新生成')")


def test_what_cannot_be_asked_is_said(come, world, tmp_path):
    visitor = come()
    broken = tmp_path / "broken.png"
    broken.write_bytes((world.folder / "ball.png").read_bytes()[:200])
    visitor.upload([broken])
    visitor.write("What is it?")
    visitor.send()
    said = visitor.wait("document.querySelector('.toast-wrap')?.innerText")
    assert "broken.png cannot be used" in said
    # The question is still there, to be asked with another picture.
    assert visitor.look("document.querySelector('#question textarea').value") == "What is it?"
    assert visitor.look("document.querySelectorAll('.chat img').length") == 0


def test_who_leaves_is_not_answered(come, world, monkeypatch):
    visitor = come()
    slow(monkeypatch, 0.6)  # whole answers would take 40 s
    visitor.write("Tell me everything.")
    visitor.send()
    visitor.wait("!!document.querySelector('#question .stop-button')")
    assert world.busy()
    visitor.click("#question .stop-button")
    assert world.idle(6), "stop"
    visitor.wait("document.body.innerText.includes('Broken off.')")
    visitor.write("Tell me more.")
    visitor.send()
    visitor.wait("!!document.querySelector('#question .stop-button')")
    assert world.busy()
    visitor.tab.call("Page.navigate", url="about:blank")
    assert world.idle(8), "gone"


def test_nothing_is_fetched_from_elsewhere(come, world):
    visitor = come()
    ask(visitor, READ, 1, world.folder / "formula.png")
    here = urlsplit(world.url).netloc
    asked = visitor.tab.requests()
    assert len(asked) > 10
    assert [a for a in asked if urlsplit(a).scheme in ("http", "https")
            and urlsplit(a).netloc != here] == []  # fmt: skip
    blocked = "Content Security Policy"
    assert [said for said in visitor.tab.complaints() if blocked in said] == []
    # The control: an image from elsewhere is blocked, and seen to be.
    visitor.look(
        "document.body.append(Object.assign(new Image(), {src: 'http://e.example/x.png'}))"
    )
    time.sleep(0.5)
    assert [said for said in visitor.tab.complaints() if blocked in said]


@pytest.mark.parametrize("window", [DESK, PHONE], ids=["desk", "phone"])
def test_the_page_is_as_wide_as_its_window_whatever_it_says(come, window):
    """An empty conversation would else be a narrow strip that grows with the first answer."""
    visitor = come(**window)
    beside = 1 if window is PHONE else 2
    for side in (0, 1):
        place = f"document.querySelector('{column(side)}').getBoundingClientRect()"
        width = visitor.look(f"{place}.width")
        assert width > 0.9 * window["width"] / beside - 20, (side, width)


def test_a_phone_needs_no_scrolling_sideways(come, world):
    visitor = come(**PHONE)
    ask(visitor, READ, 1, world.folder / "formula.png")
    assert visitor.look("document.documentElement.scrollWidth") <= PHONE["width"]
    visitor.click("button", "Sampling")
    time.sleep(0.3)
    assert visitor.look("document.documentElement.scrollWidth") <= PHONE["width"]
    submit = "document.querySelector('#question .submit-button').getBoundingClientRect()"
    assert visitor.look(f"{submit}.right") <= PHONE["width"]
    assert visitor.look(f"{submit}.bottom") <= PHONE["height"]  # without scrolling down, too


def test_events_from_elsewhere(world, tmp_path):
    """A file of the server is not opened, whatever an event says."""
    secret = tmp_path / "secret.png"
    secret.write_bytes((world.folder / "ball.png").read_bytes())
    for path in (str(secret), "http://127.0.0.1:9/x.png"):
        file = {"path": path, "meta": {"_type": "gradio.FileData"}}
        event = {"data": [{"text": "hi", "files": [file]}], "fn_index": 0, "session_hash": "x"}
        request = urllib.request.Request(
            f"{world.url}/gradio_api/queue/join",
            data=json.dumps(event).encode(),
            headers={"content-type": "application/json"},
        )
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request, timeout=10)
        assert caught.value.code == 400
        caught.value.close()


def test_the_local_network_is_asked_for_a_password(models, browser, tmp_path):
    """The command itself: what it prints, the form, a wrong and the right password."""
    command = [str(Path(sys.executable).with_name("vlmtune")), "ui", str(models / "run")]
    command += ["--host", "0.0.0.0", "--port", "0", "--json", "--max-new-tokens", "32"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            told = json.loads(process.stdout.readline())
            visitor = Visitor.come(browser, told["url"], tmp_path / "blank.html", **PHONE)
            for password in ("wrong", told["password"]):
                visitor.wait("!!document.querySelector('#password')")
                visitor.write(password, "#password")
                visitor.click("button")
                if password == "wrong":
                    visitor.wait("document.body.innerText.includes('not the password')")
            visitor.wait(READY)
            visitor.upload([models / "ball.png"])
            visitor.write(FIND)
            visitor.send()
            visitor.wait("document.querySelector('.chat').innerText.includes('red ball')")
            visitor.tab.call("Page.close")
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait(30) in (0, 130)
