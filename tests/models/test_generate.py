"""Answers in a batch are the answers one at a time, and asking leaves no trace in the model."""

from __future__ import annotations

import copy

import pytest
import torch

from tiny_rows import asked, encoder_of, lively, mixed_rows, picture
from vlmtune.batching.collate import pack
from vlmtune.models import generate as module
from vlmtune.models.decode import pad_left
from vlmtune.models.generate import answer_of, generate
from vlmtune.training.loss import label_logits, summed_loss

TOKENS = 12


@pytest.fixture(scope="module")
def questions():
    """Mixed lengths and counts of images, text alone among them."""
    rows = mixed_rows(14, seed=5)
    rows += [asked("Hi", "x"), asked("What? " * 30, "x"), asked("?", "x", picture((140, 28)))]
    counts = {len(row.images) for row in rows}
    assert {0, 1, 2} <= counts
    return rows


@pytest.fixture(scope="module")
def alone(model, encoder, questions):
    """The reference: stock ``generate``, one unpadded question at a time."""
    texts = []
    for row in questions:
        encoded = encoder.encode(row, ask=True)
        inputs = encoder.family.generate_inputs(pad_left(encoder, [encoded]))
        assert inputs["attention_mask"].all()
        output = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
        texts.append(output[0, len(encoded.tokens) :].tolist())
    assert len({tuple(ids) for ids in texts}) > len(texts) / 2  # a random model says much
    return texts


@pytest.mark.parametrize("batch_rows", [1, 4, 32])
def test_in_a_batch_as_alone(model, encoder, questions, alone, batch_rows):
    tokenizer = encoder.family.parts.tokenizer
    seen = []
    answers = generate(
        model,
        encoder,
        questions,
        max_new_tokens=TOKENS,
        batch_rows=batch_rows,
        progress=seen.append,
    )
    for row, answer, ids in zip(questions, answers, alone, strict=True):
        kept = [i for i in ids if i not in (encoder.end_id, tokenizer.pad_token_id)]
        assert answer.text == tokenizer.decode(kept, skip_special_tokens=True)
        assert answer.prompt_tokens == len(encoder.tokens(row, ask=True))
        assert answer.completion_tokens == len(kept) + answer.finished
    assert seen[-1] == len(questions)
    assert seen == sorted(seen)


def test_a_batch_of_texts_alone(model, encoder):
    rows = [asked("Hi " * times, "x") for times in (1, 9, 4)]
    together = generate(model, encoder, rows, max_new_tokens=TOKENS)
    assert together == [generate(model, encoder, [row], max_new_tokens=TOKENS)[0] for row in rows]


@pytest.fixture
def read(monkeypatch):
    """How many questions every forward read."""
    counts = []

    class Counting(module.Decoding):
        def __init__(self, model, encoder, rows):
            counts.append(len(rows))
            super().__init__(model, encoder, rows)

    monkeypatch.setattr(module, "Decoding", Counting)
    return counts


def test_who_is_done_makes_room(model, encoder, questions, read):
    """Answers of one token leave at once, and others join those that go on."""
    tokenizer = encoder.family.parts.tokenizer
    plain = generate(model, encoder, questions, max_new_tokens=TOKENS, batch_rows=32)
    assert read == [len(questions)]
    firsts = [tokenizer(answer.text, add_special_tokens=False).input_ids[:1] for answer in plain]
    ends = frozenset(first[0] for first in firsts[::2] if first)  # half of them end at once

    class Ending(type(encoder)):
        end_ids = encoder.end_ids | ends

    ending = Ending(encoder.family, encoder.contract)
    whole = generate(model, ending, questions, max_new_tokens=TOKENS, batch_rows=32)
    read.clear()
    joined = generate(model, ending, questions, max_new_tokens=TOKENS, batch_rows=4)
    assert joined == whole
    assert sum(read) == len(questions)
    assert read[0] == 4
    assert any(count < 4 for count in read[1:-1])  # they joined rows that were being answered


def test_long_prompts_are_fewer_at_once(model, encoder, questions, read, monkeypatch):
    plain = generate(model, encoder, questions, max_new_tokens=3)
    longest = max(answer.prompt_tokens for answer in plain)
    read.clear()
    monkeypatch.setattr(module, "TOKENS_TOGETHER", 2 * longest)
    assert generate(model, encoder, questions, max_new_tokens=3) == plain
    assert 1 < max(read) < len(questions)


class Full:
    """A device that takes so many questions at once; their second token needs the room."""

    def __init__(self, rows):
        self.rows = rows

    def __call__(self, decoding, tokens):
        if len(tokens) > self.rows:
            raise torch.OutOfMemoryError("full")
        return STEP(decoding, tokens)


STEP = module.Decoding.step


def test_a_full_device_answers_fewer_at_once(model, encoder, questions, monkeypatch, caplog):
    plain = generate(model, encoder, questions, max_new_tokens=TOKENS)
    full = Full(5)
    monkeypatch.setattr(module.Decoding, "step", lambda self, tokens: full(self, tokens))
    seen = []
    answers = generate(model, encoder, questions, max_new_tokens=TOKENS, progress=seen.append)
    assert answers == plain
    assert seen == sorted(seen)
    assert "going on with 4 questions at once" in caplog.text
    with pytest.raises(torch.OutOfMemoryError):
        generate(model, encoder, questions, max_new_tokens=3, tries_again=False)
    full.rows = 0
    with pytest.raises(torch.OutOfMemoryError):
        generate(model, encoder, questions, max_new_tokens=3)


def test_unmasked_padding_would_be_seen(model, encoder, questions):
    """The control: the same batch whose padding is not masked answers otherwise."""
    rows = [encoder.encode(row, ask=True) for row in questions[:8]]
    batch = pad_left(encoder, rows)
    with torch.no_grad():
        right = model(**encoder.family.generate_inputs(batch)).logits[:, -1]
        batch["attention_mask"][:] = 1
        wrong = model(**encoder.family.generate_inputs(batch)).logits[:, -1]
    assert (right - wrong).abs().max() > 1e-3


@pytest.mark.parametrize("training", [True, False])
def test_asking_leaves_the_model_as_it_was(folder, encoder, questions, training):
    model = lively(folder)
    model.train(training)
    model.generation_config.temperature = 0.3
    before = copy.deepcopy(model.generation_config.to_dict())
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generate(model, encoder, questions[:3], max_new_tokens=3)
    assert all(layer.training is training for layer in model.modules())
    assert model.generation_config.to_dict() == before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_a_failing_batch_leaves_it_so_too(folder, encoder, questions, monkeypatch):
    model = lively(folder)
    model.train()
    own = model.generation_config
    monkeypatch.setattr(module.Answering, "ask", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate(model, encoder, questions[:1], max_new_tokens=3)
    assert model.training
    assert model.generation_config is own


def test_a_training_step_after_asking_is_the_one_before(folder, encoder, questions):
    """``generate`` leaves position offsets in the model, which a later forward could take up."""
    model = lively(folder)
    model.train()
    batch = pack(encoder.family, [encoder.encode(row) for row in questions[:4]])

    def step():
        model.zero_grad()
        summed_loss(model, encoder.family, batch).backward()
        logits = label_logits(model, encoder.family, batch)
        return logits, [parameter.grad.clone() for parameter in model.parameters()]

    logits, gradients = step()
    generate(model, encoder, questions, max_new_tokens=3)
    again, gradients_again = step()
    assert torch.equal(logits, again)
    assert all(map(torch.equal, gradients, gradients_again))


def test_sampling_settings_of_a_hub_do_not_leak_in(folder, encoder, questions):
    """Hubs ship temperatures and repetition penalties; an evaluation is greedy."""
    model = lively(folder)
    plain = generate(model, encoder, questions, max_new_tokens=TOKENS)
    model.generation_config.update(
        do_sample=True, temperature=5.0, repetition_penalty=9.0, min_new_tokens=TOKENS
    )
    assert generate(model, encoder, questions, max_new_tokens=TOKENS) == plain


def test_an_answer_ends_at_the_first_end(encoder):
    """What stands behind the end token is padding; boxes are read with their control tokens."""
    end, pad = encoder.end_id, encoder.pad_id
    row = encoder.encode(asked("Where?", "x", picture((100, 50))), ask=True)
    box = [
        encoder.control_id("<|box_start|>"),
        *encoder.text_ids("(0,0),(500,500)"),
        encoder.control_id("<|box_end|>"),
    ]
    said = [*encoder.text_ids("Here "), *box]
    answer = answer_of(encoder, row, [*said, end, pad, *box])
    assert answer.text == "Here (0,0),(500,500)"
    assert [found.xyxy for found in answer.boxes] == [(0.0, 0.0, 50.0, 25.0)]
    assert answer.finished
    assert answer.completion_tokens == len(said) + 1
    said = encoder.text_ids("x") * 9
    answer = answer_of(encoder, row, said)
    assert (answer.finished, answer.completion_tokens) == (False, 9)


def test_no_questions(model, folder):
    assert generate(model, encoder_of(folder), [], max_new_tokens=3) == []


def test_a_row_that_cannot_be_asked_is_named(tiny_base):
    """Before the first answer, not after an hour of them."""
    from planted import sample, saved, scene
    from vlmtune.data.media import ImagePolicy
    from vlmtune.errors import DataError
    from vlmtune.models.load import LoadingConfig
    from vlmtune.runs.resolve import open_model, resolve

    opened = open_model(resolve(tiny_base), LoadingConfig(), image=ImagePolicy())
    rows = [sample("fine", saved(scene(1))), sample("thread", saved(scene(2, (404, 2))))]
    answered: list[int] = []
    ask = {"max_new_tokens": 2, "batch_rows": 1, "progress": answered.append}
    with pytest.raises(DataError, match="row 'thread' cannot be put to the model") as raised:
        generate(opened.model, opened.encoder, rows, **ask)
    assert raised.value.code == "image_too_stretched"
    assert answered == []
