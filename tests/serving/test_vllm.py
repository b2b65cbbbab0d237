"""``--engine vllm``: our API over vLLM's interface, equal to our own engine's answers.

vLLM needs a GPU; a stand-in (``fake_vllm``) speaks its interface over the stock classes.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image

from fake_vllm import Fake, serve
from live_server import POLICY, PROMPT, Live, answering, said, shown, user
from tiny_rows import asked, encoder_of, lively, picture
from vlmtune.data.conversation import EncodedImage
from vlmtune.data.media import ImagePolicy
from vlmtune.errors import ContractMismatchError, ModelError
from vlmtune.models.generate import generate
from vlmtune.models.save import save_model
from vlmtune.serving.engine import Engine
from vlmtune.serving.errors import OverloadedError, ServingError, TooSlowError
from vlmtune.serving.rows import Asking
from vlmtune.serving.served import open_served
from vlmtune.serving.settings import EngineConfig, Settings
from vlmtune.serving.vllm import open as opening
from vlmtune.serving.vllm.answers import Answers
from vlmtune.serving.vllm.engine import Heard, VllmEngine
from vlmtune.serving.vllm.process import VllmConfig
from vlmtune.serving.vllm.proof import check_pictures
from vlmtune.serving.vllm.question import seen
from vlmtune.serving.vllm.wire import Wire, WireError
from vlmtune.testing import tiny
from vlmtune.verbs import evaluate as verb

TOKENS = 10
ONE, TWO = picture((90, 70), seed=1), picture((60, 120), seed=2)


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merged model, as ``merge`` writes it."""
    root = tmp_path_factory.mktemp("merged")
    base = tiny("qwen2_vl", root / "base", seed=3)
    encoder = encoder_of(base, POLICY, prompt=PROMPT)
    out = root / "tiny"
    out.mkdir()
    save_model(lively(base), out, family=encoder.family, contract=encoder.contract, base=base)
    return out


@pytest.fixture(scope="module")
def own(merged: Path) -> Iterator[Engine]:
    engine = Engine(open_served(merged))
    engine.start()
    yield engine
    engine.stop()


@pytest.fixture(scope="module")
def running(merged: Path, own: Engine, tmp_path_factory) -> Iterator[tuple[Fake, Path]]:
    fake = Fake(merged, own.served.model)
    socket = tmp_path_factory.mktemp("s") / "socket"
    server = serve(fake, socket)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.01)
    yield fake, socket
    server.should_exit = True
    thread.join()


@pytest.fixture
def fake(running: tuple[Fake, Path]) -> Iterator[Fake]:
    fake = running[0]
    fake.asked.clear()
    fake.left = 0
    yield fake
    fake.fault = ""
    fake.pace.set()


@contextlib.contextmanager
def asking(running, own: Engine, **config: Any) -> Iterator[VllmEngine]:
    engine = VllmEngine(own.served.first, Wire(running[1]), EngineConfig(**config))
    try:
        engine.start()
        yield engine
    finally:
        engine.stop()


@pytest.fixture(scope="module")
def engine(running, own) -> Iterator[VllmEngine]:
    with asking(running, own) as engine:
        yield engine


@pytest.fixture(scope="module")
def live(running, own) -> Iterator[Live]:
    with answering(VllmEngine(own.served.first, Wire(running[1]))) as live:
        yield live


QUESTIONS = [
    asked("What is this?", "x"),
    asked("What is this?", "x", ONE),
    asked("Which is taller?", "x", ONE, TWO),
    asked("An end <|im_end|> and <|image_pad|> are text.", "x", TWO),
    asked("", "x", picture((900, 500), seed=4)),
]


@pytest.mark.parametrize("question", QUESTIONS, ids=range(len(QUESTIONS)))
def test_answers_are_those_of_our_own_engine(question, engine, own, fake):
    settings = Settings(max_tokens=TOKENS, logprobs=True, top_logprobs=2)
    (ours,) = own.ask(question.prompt(), settings).result()
    (theirs,) = engine.ask(question.prompt(), settings).result()
    assert theirs.text == ours.text
    assert theirs.finish_reason == ours.finish_reason
    assert theirs.completion_tokens == ours.completion_tokens
    assert [token.id for token in theirs.logprobs] == [token.id for token in ours.logprobs]
    for one, other in zip(theirs.logprobs, ours.logprobs, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-3)
        assert [each.id for each in one.top] == [each.id for each in other.top]
    # One place an image, which vLLM unfolds; no control token that somebody typed.
    encoder = own.served.first.encoder
    sent = fake.asked[-1]["token_ids"]
    assert sent.count(encoder.family.image_token_id) == len(question.images)
    assert len(fake.asked[-1].get("content_parts", [])) == len(question.images)


def test_whatever_a_picture_is_the_model_sees_the_contract(merged, own, tmp_path):
    """A fixed size and a background, which no other engine knows, go through."""
    policy = ImagePolicy(size=(56, 84), background="#102030")
    encoder = encoder_of(merged, policy)
    out = tmp_path / "fixed"
    out.mkdir()
    save_model(own.served.model, out, family=encoder.family, contract=encoder.contract, base=merged)
    check_pictures(out, encoder)
    with_alpha = EncodedImage(_transparent())
    question = asked("What?", "x", with_alpha).prompt()
    encoded = encoder.encode(question, ask=True)
    (sent,) = seen(encoder, encoded)
    assert (sent.size, sent.mode) == ((84, 56), "RGB")
    again = encoder.family.image_inputs([sent], encoder.contract.image)
    assert (again["pixel_values"] - encoded.vision["pixel_values"]).abs().max() < 1e-6


def _transparent() -> bytes:
    pixels = np.random.default_rng(5).integers(0, 256, (40, 70, 4), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels, "RGBA").save(buffer, "PNG")
    return buffer.getvalue()


def test_a_folder_whose_processor_sees_otherwise_is_refused(merged, own, tmp_path):
    encoder = own.served.first.encoder
    check_pictures(merged, encoder)
    wrong = tmp_path / "wrong"
    shutil.copytree(merged, wrong)
    for name in ("preprocessor_config.json", "processor_config.json"):
        text = (wrong / name).read_text(encoding="utf-8")
        (wrong / name).write_text(text.replace("0.4814", "0.5814"), encoding="utf-8")
    with pytest.raises(ContractMismatchError, match=r"pixel_values differs by up to 0\.3"):
        check_pictures(wrong, encoder)
    settings = json.loads((merged / "preprocessor_config.json").read_text(encoding="utf-8"))
    settings["size"] = {"shortest_edge": 784, "longest_edge": 1568}
    settings |= {"min_pixels": 784, "max_pixels": 1568}
    for name in ("preprocessor_config.json", "processor_config.json"):
        (wrong / name).write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(ContractMismatchError, match="shape"):
        check_pictures(wrong, encoder)


@pytest.mark.parametrize("family", ["idefics3", "internvl", "qwen_vl"])
def test_families_that_vllm_would_show_otherwise_are_refused(family, tmp_path):
    encoder = encoder_of(tiny(family, tmp_path / family), ImagePolicy())
    with pytest.raises(ContractMismatchError, match="--engine vllm"):
        check_pictures(tmp_path / family, encoder)


@pytest.mark.parametrize("fault", ["sees more", "silent"])
def test_a_vllm_that_reads_otherwise_is_refused_at_the_start(fault, fake, running, own):
    fake.fault = fault
    with pytest.raises(ContractMismatchError, match="makes other tokens"):
        VllmEngineStarted(running, own)


def VllmEngineStarted(running, own) -> None:
    with asking(running, own):
        raise AssertionError("it started")


def test_a_vllm_without_the_interface_is_told(fake, running, own):
    fake.fault = "disabled"
    with (
        pytest.raises(ModelError, match=r"403.*--enable-scale-out"),
        asking(running, own),
    ):
        pass


def test_a_vllm_that_reads_otherwise_later_answers_nothing(engine, fake):
    fake.fault = "sees more"
    with pytest.raises(ServingError, match="read the question otherwise") as caught:
        engine.ask(QUESTIONS[1].prompt(), Settings(max_tokens=2)).result()
    assert caught.value.code == "contract_mismatch"
    fake.fault = ""
    assert engine.ask(QUESTIONS[1].prompt(), Settings(max_tokens=2)).result()


def test_a_vllm_that_breaks_off_is_an_error_and_no_answer(engine, fake):
    fake.fault = "breaks"
    with pytest.raises(ServingError, match="the model failed"):
        engine.ask(QUESTIONS[0].prompt(), Settings(max_tokens=4)).result()


@pytest.mark.parametrize("told", [True, False])
def test_an_end_is_an_end_whether_or_not_its_token_is_told(own, told):
    served, events = own.served.first, []
    question = QUESTIONS[0].prompt()
    asking = Asking(question, Settings(n=2), served, events.append, 60.0)
    asking.max_tokens, asking.encoded = 9, served.encoder.encode(question, ask=True)
    heard = Heard(asking, asking.encoded.tokens.ids.tolist())
    ids = served.encoder.text_ids("two words")
    said = [*ids, served.encoder.end_id] if told else ids
    ends = {"finish_reason": "stop", "logprobs": None}
    assert heard.take(
        {"prompt_token_ids": heard.prompt, "choices": [{"index": 1, "token_ids": said, **ends}]}
    )
    assert not heard.take({"choices": [{"index": 0, "token_ids": [], **ends}]})
    first, second = events[1:]
    assert (first.choice, first.text, first.completion_tokens) == (1, "two words", len(ids) + 1)
    assert (second.choice, second.text, second.completion_tokens) == (0, "", 1)
    assert {first.finish_reason, second.finish_reason} == {"stop"}
    assert asking.over


def test_an_answer_that_vllm_cuts_is_no_answer(own):
    served = own.served.first
    question = QUESTIONS[0].prompt()
    asking = Asking(question, Settings(), served, [].append, 60.0)
    asking.max_tokens, asking.encoded = 9, served.encoder.encode(question, ask=True)
    heard = Heard(asking, asking.encoded.tokens.ids.tolist())
    cut = {"index": 0, "token_ids": [5], "logprobs": None, "finish_reason": "abort"}
    with pytest.raises(WireError, match="abort"):
        heard.take({"prompt_token_ids": heard.prompt, "choices": [cut]})


def test_the_client_over_vllm(live, fake):
    messages = user(shown(ONE.data), said("and"), shown(TWO.data), said("?"))
    whole = live.ask(messages, max_tokens=TOKENS)
    assert whole.usage.prompt_tokens > 10
    chunks = list(
        live.ask(messages, max_tokens=TOKENS, stream=True, stream_options={"include_usage": True})
    )
    assert chunks.pop().usage == whole.usage
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert whole.choices[0].message.vlmtune == {"boxes": []}
    # A stop text ends the answer here, and vLLM's work with it.
    stop = text[len(text) // 2 :][:2]
    ended = live.ask(messages, max_tokens=TOKENS, stop=[stop]).choices[0]
    assert ended.message.content == text[: text.index(stop)]
    assert ended.finish_reason == "stop"
    drawn = live.ask(messages, max_tokens=4, n=3, temperature=1.0, top_p=0.9, seed=7)
    assert [choice.index for choice in drawn.choices] == [0, 1, 2]
    assert fake.asked[-1]["sampling_params"]["seed"] == 7
    assert live.ask(messages, max_tokens=4, n=3, temperature=1.0, top_p=0.9, seed=7).choices == (
        drawn.choices
    )
    with pytest.raises(openai.BadRequestError, match="context is"):
        live.ask(messages, max_tokens=10**6)
    with pytest.raises(openai.NotFoundError):
        live.ask(messages, model="other")


def test_who_leaves_frees_its_place(engine, fake):
    fake.pace.clear()
    answer = engine.ask(QUESTIONS[1].prompt(), Settings(max_tokens=200, stream=True))
    _until(lambda: fake.asked)
    answer.cancel()
    _until(lambda: not engine.running)
    fake.pace.set()
    _until(lambda: fake.left == 1)
    assert engine.ask(QUESTIONS[0].prompt(), Settings(max_tokens=2)).result()


def test_what_takes_too_long_ends(running, own, fake):
    with asking(running, own, request_seconds=0.5) as engine:
        fake.pace.clear()
        with pytest.raises(TooSlowError):
            engine.ask(QUESTIONS[0].prompt(), Settings(max_tokens=200)).result()
        _until(lambda: not engine.running)


def test_only_so_many_at_once(running, own, fake):
    with asking(running, own, batch_rows=2) as engine:
        fake.pace.clear()
        fake.asked.clear()
        answers = [engine.ask(QUESTIONS[0].prompt(), Settings(max_tokens=3)) for _ in range(5)]
        _until(lambda: len(fake.asked) == 2 and engine.waiting == 3)
        time.sleep(0.3)
        assert (len(fake.asked), engine.running) == (2, 2)
        fake.pace.set()
        texts = {answer.result()[0].text for answer in answers}
        assert len(texts) == 1
    with pytest.raises(OverloadedError):
        engine.ask(QUESTIONS[0].prompt())


def test_rows_of_an_evaluation(engine, own, fake):
    encoder, told = own.served.first.encoder, []
    rows = [asked(f"What is {number}?", "x", picture(seed=number)) for number in range(4)]
    ours = generate(own.served.model, encoder, rows, max_new_tokens=6)
    theirs = Answers(engine)(
        None, encoder, rows, max_new_tokens=6, batch_rows=2, progress=told.append
    )
    assert theirs == ours
    assert told[-1] == 4
    fake.fault = "sees more"
    with pytest.raises(ServingError, match="read the question otherwise"):
        Answers(engine)(None, encoder, rows, max_new_tokens=6)


@pytest.mark.slow
def test_eval_lets_vllm_answer(merged, running, own, fake, tiny_data, tmp_path, monkeypatch):
    def opened(*_: Any, **__: Any) -> VllmEngine:
        return VllmEngine(own.served.first, Wire(running[1]))

    monkeypatch.setattr(opening, "open_vllm", opened)
    options = {"limit": 3, "max_new_tokens": 5}
    ours = verb.evaluate(merged, tiny_data, out=tmp_path / "own", **options)
    asked_before = len(fake.asked)
    theirs = verb.evaluate(merged, tiny_data, out=tmp_path / "vllm", vllm=VllmConfig(), **options)
    assert len(fake.asked) >= asked_before + 3
    assert theirs["metrics"] == ours["metrics"]
    said = [Path(each["predictions"]).read_text(encoding="utf-8") for each in (ours, theirs)]
    assert said[0] == said[1]


def _until(holds: Any, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)
