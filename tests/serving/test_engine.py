"""Answers given together are those given one at a time, and nobody's fault is another's."""

from __future__ import annotations

import math
import threading
import time

import pytest
import torch

from generic_models import aya_vision
from live_server import PROMPT, plain
from tiny_rows import asked, encoder_of, lively, mixed_rows, picture, row, turn
from vlmtune.data.conversation import EncodedImage
from vlmtune.data.media import ImagePolicy
from vlmtune.errors import ContractMismatchError, DataError, ModelError, UsageError
from vlmtune.models.generate import generate
from vlmtune.serving import batches
from vlmtune.serving import engine as module
from vlmtune.serving.engine import Engine
from vlmtune.serving.errors import (
    BadRequestError,
    BusyError,
    OverloadedError,
    ServingError,
    TooSlowError,
    UnknownModelError,
)
from vlmtune.serving.events import Began, Delta
from vlmtune.serving.sampling import Pick
from vlmtune.serving.served import Served, ServedModel, open_served
from vlmtune.serving.settings import EngineConfig, Settings
from vlmtune.testing import tiny

TOKENS = 20
LONG = Settings(max_tokens=400)


def questions(count=24, seed=5):
    return [each.prompt() for each in mixed_rows(count, seed)]


@pytest.fixture(scope="module")
def serial(served):
    """What ``predict`` and an evaluation say: one question at a time."""
    encoder = served.first.encoder
    answers = generate(served.model, encoder, questions(), max_new_tokens=TOKENS, batch_rows=1)
    assert len({answer.text for answer in answers}) > 20
    assert {bool(answer.finished) for answer in answers} <= {True, False}
    return answers


def same(answer, reference):
    assert answer.text == reference.text
    assert answer.boxes == reference.boxes
    assert answer.completion_tokens == reference.completion_tokens
    assert (answer.finish_reason == "stop") == reference.finished


@pytest.mark.parametrize(
    "config",
    [{}, {"batch_rows": 3}, {"cache_tokens": 300}, {"prefill_tokens": 1}, {"encoders": 1}],
    ids=str,
)
def test_together_as_one_at_a_time(make_engine, serial, config):
    engine = make_engine(**config)
    answers = [engine.ask(each, Settings(max_tokens=TOKENS)) for each in questions()]
    for answer, reference in zip(answers, serial, strict=True):
        same(answer.result()[0], reference)
    assert (engine.running, engine.waiting) == (0, 0)


def test_those_who_come_later_join(make_engine, serial):
    engine = make_engine()
    rows = questions()
    first = engine.ask(rows[0], Settings(max_tokens=300, stream=True))
    events = iter(first)
    while not isinstance(next(events), Delta):
        pass
    later = [engine.ask(each, Settings(max_tokens=TOKENS)) for each in rows[1:]]
    for answer, reference in zip(later, serial[1:], strict=True):
        same(answer.result()[0], reference)
    assert engine.running == 1  # the long one was not waited for
    first.cancel()


def test_full_caches_make_the_younger_wait(make_engine, served, monkeypatch):
    """And when there is room they go on where they were."""
    rows, settings = questions(8), Settings(max_tokens=40)
    encoder = served.first.encoder
    reference = generate(served.model, encoder, rows, max_new_tokens=40, batch_rows=1)
    budget, held, parked = 700, [], set()
    original = Engine._take_turns

    def watched(self):
        held.append(sum(batch.tokens for batch in self._batches))
        for batch in self._batches:
            parked.update(row.asking for row in batch.rows if batch.parked)
        original(self)

    monkeypatch.setattr(Engine, "_take_turns", watched)
    monkeypatch.setattr(module, "AHEAD", 10)
    monkeypatch.setattr(batches, "AHEAD", 10)
    engine = make_engine(cache_tokens=budget)
    answers = [engine.ask(each, settings) for each in rows]
    for answer, expected in zip(answers, reference, strict=True):
        same(answer.result()[0], expected)
    longest = max(len(encoder.tokens(each, ask=True)) for each in rows) + 40
    assert max(held) < budget + longest + 100
    assert len(parked) > 1
    # The control: with room enough the same answers take more than that.
    held.clear()
    parked.clear()
    answers = [make_engine().ask(each, settings) for each in rows[:1]]
    engine = make_engine(cache_tokens=100_000)
    answers += [engine.ask(each, settings) for each in rows]
    for answer in answers:
        answer.result()
    assert max(held) > budget + longest + 100
    assert not parked


def test_a_wrong_join_would_be_seen(make_engine, serial, monkeypatch):
    """The control: rows that take each other's places answer each other's questions."""
    original = batches.Batch.join

    def crossed(self, other):
        original(self, other)
        self.rows.reverse()

    monkeypatch.setattr(batches.Batch, "join", crossed)
    engine = make_engine()
    settings = Settings(max_tokens=TOKENS)
    answers = [engine.ask(each, settings).result for each in questions()]
    texts = [answer()[0].text for answer in answers]
    assert texts != [reference.text for reference in serial]


def test_a_stream_is_the_answer_in_pieces(make_engine, serial):
    engine = make_engine()
    settings = Settings(max_tokens=TOKENS, stream=True)
    answers = [engine.ask(each, settings) for each in questions()]
    for answer, reference in zip(answers, serial, strict=True):
        began, *pieces, ended = answer
        assert began == Began(reference.prompt_tokens)
        assert "".join(piece.text for piece in pieces) == ended.text == reference.text


def test_windows_and_families_that_are_asked_alone(make_engine, tmp_path):
    """Caches with a window take turns; what we cannot decode is asked by its own ``generate``."""
    for name, folder in (
        ("window", tiny("gemma3", tmp_path / "gemma")),
        ("alone", aya_vision(tmp_path / "aya")),
    ):
        model = lively(folder)
        encoder = encoder_of(folder, ImagePolicy())
        rows = [each for each in questions(10) if each.messages[0].role != "system"]
        rows = [each for each in rows if len(each.messages) == 1]
        rows += [asked("Hi " * times, "x").prompt() for times in (1, 40)]
        reference = generate(model, encoder, rows, max_new_tokens=8, batch_rows=1)
        engine = make_engine(plain(model, encoder))
        answers = [engine.ask(each, Settings(max_tokens=8)) for each in rows]
        for answer, expected in zip(answers, reference, strict=True):
            same(answer.result()[0], expected)
        assert module.side_by_side(engine.served.first) == (name == "window")
        drawn = Settings(max_tokens=8, temperature=1.0, seed=3, n=2, stream=True)
        once, twice = (engine.ask(rows[0], drawn).result() for _ in range(2))
        assert [each.text for each in once] == [each.text for each in twice]
        assert once[0].text != once[1].text


# What is asked for


def test_chance_is_the_requests_own(make_engine):
    engine = make_engine()
    rows = questions(8)
    drawn = Settings(max_tokens=TOKENS, temperature=1.2, top_p=0.9, seed=11, n=3)
    alone = engine.ask(rows[0], drawn).result()
    crowd = [engine.ask(each, drawn.model_copy(update={"seed": 5})) for each in rows[1:]]
    beside = engine.ask(rows[0], drawn).result()
    for answer in crowd:
        answer.result()
    assert [each.text for each in beside] == [each.text for each in alone]
    assert [each.choice for each in beside] == [0, 1, 2]
    assert len({each.text for each in alone}) == 3
    other = engine.ask(rows[0], drawn.model_copy(update={"seed": 12})).result()
    assert [each.text for each in other] != [each.text for each in alone]
    unseeded = Settings(max_tokens=TOKENS, temperature=1.2)
    assert len({engine.ask(rows[0], unseeded).result()[0].text for _ in range(3)}) > 1


def test_a_stop_is_not_told_and_ends_the_answer(make_engine, serial):
    engine = make_engine()
    place = next(i for i, each in enumerate(serial) if len(each.text) > 12)
    question, whole = questions()[place], serial[place].text
    stop = whole[5:8]
    cut = whole[: whole.find(stop)]
    for stream in (False, True):
        settings = Settings(max_tokens=TOKENS, stop=(stop, "never"), stream=stream, logprobs=True)
        *events, ended = engine.ask(question, settings)
        assert (ended.text, ended.finish_reason) == (cut, "stop")
        assert ended.completion_tokens < serial[place].completion_tokens
        assert len(ended.logprobs) < ended.completion_tokens
        pieces = [event for event in events if isinstance(event, Delta)]
        if stream:
            assert "".join(piece.text for piece in pieces) == cut
            assert tuple(one for piece in pieces for one in piece.logprobs) == ended.logprobs
        else:
            assert pieces == []


def test_logprobs_are_those_of_one_forward(make_engine, served):
    engine = make_engine()
    question = asked("What is this?", "x", picture()).prompt()
    settings = Settings(max_tokens=6, logprobs=True, top_logprobs=3, stream=True)
    *events, ended = engine.ask(question, settings)
    told = [one for event in events if isinstance(event, Delta) for one in event.logprobs]
    assert tuple(told) == ended.logprobs
    assert len(ended.logprobs) == ended.completion_tokens - (ended.finish_reason == "stop")
    for one in ended.logprobs:
        assert one.logprob <= 0
        assert one.top[0].logprob == one.logprob  # greedy: the likeliest was said
        assert [other.logprob for other in one.top] == sorted(
            (other.logprob for other in one.top), reverse=True
        )
    encoder = served.first.encoder
    inputs = encoder.family.prefill_inputs(
        batches.pad_left(encoder, [encoder.encode(question, ask=True)])
    )
    with torch.no_grad():
        logits = served.model(**inputs).logits[0, -1]
    expected = logits.log_softmax(dim=-1)
    assert ended.logprobs[0].id == int(expected.argmax())
    assert ended.logprobs[0].logprob == pytest.approx(float(expected.max()), abs=1e-4)


def test_boxes_are_in_pixels_of_the_picture(make_engine, served, monkeypatch):
    """Whatever the model says: here it is made to say a box."""
    encoder = served.first.encoder
    ids = [
        encoder.control_id("<|object_ref_start|>"), *encoder.text_ids("dog"),
        encoder.control_id("<|object_ref_end|>"), encoder.control_id("<|box_start|>"),
        *encoder.text_ids("(100,200),(500,999)"), encoder.control_id("<|box_end|>"),
        encoder.end_id,
    ]  # fmt: skip
    spoken = iter(ids)
    engine = make_engine()
    monkeypatch.setattr(batches, "choose", lambda logits, _: [Pick(next(spoken)) for _ in logits])
    question = asked("Where?", "x", picture((40, 30)), picture((200, 100))).prompt()
    (ended,) = engine.ask(question, Settings(max_tokens=90)).result()
    (box,) = ended.boxes
    assert (box.label, box.image) == ("dog", 1)
    assert box.xyxy == pytest.approx((20.0, 20.0, 100.0, 99.9))
    assert ended.text == "dog(100,200),(500,999)"
    assert (ended.finish_reason, ended.completion_tokens) == ("stop", len(ids))


def test_the_prompt_of_the_contract(make_engine):
    engine = make_engine()
    image = picture()
    silent = row(turn("user", 0), images=(image,))
    said = row(turn("user", 0, PROMPT), images=(image,))
    settings = Settings(max_tokens=8)
    assert engine.ask(silent, settings).result() == engine.ask(said, settings).result()


# Limits


def test_cancelled_rows_leave_within_a_step(make_engine):
    engine = make_engine()
    answers = [engine.ask(each, LONG.model_copy(update={"stream": True})) for each in questions(8)]
    for answer in answers:
        assert isinstance(next(iter(answer)), Began)  # leaving the loop cancels
    end = time.monotonic() + 5
    while engine.running or engine.waiting:
        assert time.monotonic() < end
        time.sleep(0.002)


def test_a_full_queue_says_when_to_come_back(make_engine):
    engine = make_engine(batch_rows=1, max_waiting=3)
    running = engine.ask(questions(1)[0], LONG)
    while not engine.running:
        time.sleep(0.002)
    waiting = [engine.ask(each, LONG) for each in questions(3)]
    with pytest.raises(BusyError) as caught:
        engine.ask(questions(1)[0])
    assert 1 <= caught.value.retry_after <= 60
    waiting[1].cancel()  # who leaves makes room
    waiting.append(engine.ask(questions(1)[0], LONG))
    for answer in (running, *waiting):
        answer.cancel()


def test_what_cannot_be_is_refused_at_once(make_engine):
    engine = make_engine(batch_rows=2)
    question = questions(1)[0]
    with pytest.raises(UnknownModelError, match="'other' is not served"):
        engine.ask(question, model="other")
    with pytest.raises(BadRequestError, match="n: found 3"):
        engine.ask(question, Settings(n=3))


def test_the_context_is_not_exceeded(make_engine, monkeypatch):
    monkeypatch.setattr(Served, "context", 60)
    engine = make_engine()
    short, long = asked("Hi", "x").prompt(), asked("Hi " * 60, "x").prompt()
    with pytest.raises(BadRequestError, match="context is 60") as caught:
        engine.ask(long).result()
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")
    with pytest.raises(BadRequestError) as caught:
        engine.ask(short, Settings(max_tokens=60)).result()
    assert caught.value.param == "max_tokens"
    began, *_, ended = engine.ask(short)
    assert began.prompt_tokens + ended.completion_tokens <= 60


def test_time_is_limited(make_engine):
    engine = make_engine(batch_rows=1, request_seconds=0.3)
    answers = [engine.ask(each, Settings(max_tokens=5000)) for each in questions(3)]
    for answer in answers:
        with pytest.raises(TooSlowError):
            answer.result()
    assert engine.fault is None


# Faults


def test_a_broken_picture_is_its_own_fault(make_engine, serial):
    engine = make_engine()
    rows = questions()
    broken = asked("What?", "x", EncodedImage(b"\x89PNG nothing")).prompt()
    answers = [engine.ask(each, Settings(max_tokens=TOKENS)) for each in rows[:4]]
    with pytest.raises(DataError):
        engine.ask(broken).result()
    for answer, reference in zip(answers, serial, strict=False):
        same(answer.result()[0], reference)


def fail_for(monkeypatch, name, times=math.inf):
    """Make the forward of any batch with this question fail."""
    original, left = batches.Decoding, [times]

    class Failing(original):
        def __init__(self, model, encoder, rows):
            if any(each.id == name for each in rows) and left[0] > 0:
                left[0] -= 1
                raise RuntimeError("a kernel failed at 0x7f00dead in /secret/place")
            super().__init__(model, encoder, rows)

    monkeypatch.setattr(batches, "Decoding", Failing)


def test_a_forward_that_fails_hurts_only_the_culprit(make_engine, serial, monkeypatch):
    rows = questions()
    fail_for(monkeypatch, rows[3].id)
    engine = make_engine()
    answers = [engine.ask(each, Settings(max_tokens=TOKENS)) for each in rows]
    for place, (answer, reference) in enumerate(zip(answers, serial, strict=True)):
        if place == 3:
            with pytest.raises(ServingError, match="its log says why"):
                answer.result()
        else:
            same(answer.result()[0], reference)
    assert engine.fault is None


def test_a_step_that_fails_ends_its_rows_alone(make_engine, serial, monkeypatch):
    engine = make_engine()
    original, failing = batches.Decoding.step, threading.Event()
    failing.set()

    def step(self, tokens):
        if failing.is_set() and len(self) > 1:
            failing.clear()
            raise RuntimeError("a step failed")
        original(self, tokens)

    monkeypatch.setattr(batches.Decoding, "step", step)
    answers = [engine.ask(each, LONG) for each in questions(4)]
    failed = 0
    for answer in answers:
        try:
            answer.result()
        except ServingError:
            failed += 1
    assert failed >= 2
    same(engine.ask(questions()[0], Settings(max_tokens=TOKENS)).result()[0], serial[0])
    assert engine.fault is None


def test_an_adapter_that_cannot_be_used(make_engine, served):
    """Whoever asks it is told, and is not left waiting."""
    broken = ServedModel("broken", served.first.encoder, "adapter9")
    both = Served(served.model, None, {"tiny": served.first, "broken": broken})
    engine = make_engine(both)
    beside = engine.ask(questions(1)[0], Settings(max_tokens=30))
    with pytest.raises(ServingError, match="its log says why"):
        engine.ask(questions(1)[0], model="broken").result()
    assert beside.result()
    assert engine.fault is None


def test_logits_that_are_no_numbers(make_engine, monkeypatch):
    engine = make_engine()
    original = batches.Decoding.step

    def step(self, tokens):
        original(self, tokens)
        self.logits[0] = torch.nan

    monkeypatch.setattr(batches.Decoding, "step", step)
    with pytest.raises(ServingError, match="no numbers"):
        engine.ask(questions(1)[0], LONG).result()


def test_a_broken_model_turns_health_red(make_engine, monkeypatch):
    engine = make_engine()
    assert engine.fault is None
    waiting = [engine.ask(each, LONG) for each in questions(3)]

    def broken(*_):
        raise RuntimeError("device-side assert")

    monkeypatch.setattr(batches, "Decoding", broken)
    monkeypatch.setattr(batches.Batch, "step", broken)
    for answer in waiting:
        with pytest.raises(ServingError):
            answer.result()
    end = time.monotonic() + 5
    while engine.fault is None and time.monotonic() < end:
        time.sleep(0.01)
    assert engine.fault is not None
    assert "started again" in engine.fault
    with pytest.raises(OverloadedError):
        engine.ask(questions(1)[0])
    with pytest.raises(ModelError):
        make_engine()


def test_a_full_device_shrinks_the_caches(make_engine, monkeypatch):
    engine = make_engine(cache_tokens=8192)
    original, failing = batches.Decoding.step, threading.Event()
    failing.set()

    def step(self, tokens):
        if failing.is_set():
            failing.clear()
            raise torch.OutOfMemoryError("CUDA out of memory")
        original(self, tokens)

    monkeypatch.setattr(batches.Decoding, "step", step)
    with pytest.raises(OverloadedError, match="no memory"):
        engine.ask(questions(1)[0], LONG).result()
    assert engine.ask(questions(1)[0], Settings(max_tokens=4)).result()
    assert engine._cache_tokens == 4096


def test_a_listener_that_fails_is_left_alone(make_engine, serial):
    engine = make_engine()

    def deaf(_event):
        raise RuntimeError("no ear")

    engine.submit(questions(1)[0], LONG, deaf)
    same(engine.ask(questions()[0], Settings(max_tokens=TOKENS)).result()[0], serial[0])
    end = time.monotonic() + 5
    while engine.running or engine.waiting:
        assert time.monotonic() < end
        time.sleep(0.002)


def test_stopping_drains_and_leaves_no_thread(served):
    before = threading.active_count()
    engine = Engine(served, EngineConfig(batch_rows=2))
    engine.start()
    answers = [engine.ask(each, Settings(max_tokens=10)) for each in questions(4)]
    engine.stop(drain_seconds=30)
    assert all(answer.result() for answer in answers)
    with pytest.raises(OverloadedError):
        engine.ask(questions(1)[0])
    assert threading.active_count() == before
    engine = Engine(served)
    engine.start()
    answer = engine.ask(questions(1)[0], LONG)
    engine.stop()
    with pytest.raises(OverloadedError):
        answer.result()
    assert threading.active_count() == before


# Several adapters on one base


def test_adapters_answer_as_each_alone(make_engine, lora_run, tiny_base):
    """Base and two adapters at once; each as when it is served by itself."""
    adapters = {
        name: lora_run / "checkpoints" / f"step-{step:06d}" for name, step in (("a", 2), ("b", 6))
    }
    rows = [asked(f"What? {place}", "x", picture(seed=place)).prompt() for place in range(4)]
    settings = Settings(max_tokens=6, logprobs=True)

    def probabilities(ended):
        return [one.logprob for one in ended.logprobs], ended.text

    together = make_engine(open_served(tiny_base, name="base", adapters=adapters))
    assert list(together.served.models) == ["base", "a", "b"]
    asking = [
        (name, place, together.ask(each, settings, model=name))
        for place, each in enumerate(rows)
        for name in ("base", "a", "b")
    ]
    found = {(name, place): probabilities(answer.result()[0]) for name, place, answer in asking}
    alone = {"base": tiny_base, **adapters}
    for name, folder in alone.items():
        engine = make_engine(open_served(folder))
        for place, each in enumerate(rows):
            logprobs, text = probabilities(engine.ask(each, settings).result()[0])
            assert text == found[name, place][1]
            assert logprobs == pytest.approx(found[name, place][0], abs=1e-4)
    # The control: they do not answer alike.
    for place in range(len(rows)):
        first = {round(found[name, place][0][0], 4) for name in alone}
        assert len(first) == 3


def test_base_beside_tuned(make_engine, lora_run):
    """Under one contract: the same tokens and pixels, before and after."""
    engine = make_engine(open_served(lora_run, name="tuned", base_name="base"))
    question = asked("What?", "x", picture()).prompt()
    settings = Settings(max_tokens=4, logprobs=True)
    tuned, base, again = (
        engine.ask(question, settings, model=name).result()[0]
        for name in ("tuned", "base", "tuned")
    )
    assert tuned.logprobs == again.logprobs
    assert tuned.logprobs != base.logprobs
    contracts = [each.encoder.contract for each in engine.served.models.values()]
    assert contracts[0] == contracts[1]


def test_names(served, folder, lora_run, tiny_base):
    assert served.first.name == folder.name
    assert list(open_served(lora_run).models) == [lora_run.name]
    with pytest.raises(UsageError, match="given twice"):
        open_served(tiny_base, name="a", adapters={"a": lora_run})
    with pytest.raises(UsageError, match="is no adapter"):
        open_served(tiny_base, adapters={"a": tiny_base})
    with pytest.raises(UsageError, match="no base beside it"):
        open_served(tiny_base, base_name="base")
    with pytest.raises(ContractMismatchError, match="weights"):
        open_served(folder, adapters={"a": lora_run})


def test_larger_pictures_are_refused_before_they_are_decoded(folder):
    limited = open_served(folder, max_source_pixels=1000).first.encoder
    with pytest.raises(DataError, match="1,000"):
        limited.encode(asked("What?", "x", picture((40, 30))).prompt(), ask=True)
