"""A row means the same alone, packed with others, and in a batch of questions."""

from __future__ import annotations

import pytest
import torch

from tiny_rows import asked, mixed_rows, picture, row, turn
from vlmtune.batching.collate import pack
from vlmtune.errors import ModelError
from vlmtune.models.decode import Decoding, pad_left
from vlmtune.models.generate import generate
from vlmtune.training.loss import label_logits

ROWS = mixed_rows(6, seed=11)
PLAIN = row(turn("user", "Hello?"), turn("assistant", "Yes."), name="plain")
MANY = asked("Which?", "The last.", *(picture((40 + 9 * n, 60), seed=n) for n in range(4)))
TOLERANCE = 1e-5  # of the largest logit, fp32


@torch.no_grad()
def logits(model, encoder, rows):
    batch = pack(encoder.family, [encoder.encode(row) for row in rows])
    return label_logits(model, encoder.family, batch)


def test_packed_is_alone_or_refused(model, encoder):
    """Text-only, one-image and many-image rows side by side."""
    rows = [PLAIN, *ROWS, MANY]
    if not encoder.family.facts.packs:
        with pytest.raises(ModelError, match="cannot be packed"):
            logits(model, encoder, rows)
        return
    alone = torch.cat([logits(model, encoder, [row]) for row in rows])
    packed = logits(model, encoder, rows)
    assert (packed - alone).abs().max() <= TOLERANCE * alone.abs().max()
    # A neighbour of other content changes nothing, not a bit.
    others = (picture((40 + 9 * n, 60), seed=9 + n) for n in range(4))
    changed = logits(model, encoder, [PLAIN, *ROWS, asked("Which?", "The last.", *others)])
    kept = len(packed) - encoder.tokens(MANY).trained
    assert torch.equal(changed[:kept], packed[:kept])
    assert not torch.equal(changed[kept:], packed[kept:])


def test_images_change_the_logits(model, encoder):
    """The control of the test above: a forward that ignored images would pass it."""
    seen = logits(model, encoder, [asked("?", "x", picture((50, 50), seed=1))])
    other = logits(model, encoder, [asked("?", "x", picture((50, 50), seed=2))])
    assert (seen - other).abs().max() > 100 * TOLERANCE * seen.abs().max()


def test_positions_that_run_on_are_not_alone(model, encoder):
    """The control: rows whose positions do not start anew see each other."""
    if not encoder.family.facts.packs:
        pytest.skip("this family is not packed")
    rows = [ROWS[0], PLAIN]
    batch = pack(encoder.family, [encoder.encode(row) for row in rows])
    batch.inputs["positions"][0] = torch.arange(batch.tokens)
    with torch.no_grad():
        mixed = label_logits(model, encoder.family, batch)
    alone = torch.cat([logits(model, encoder, [row]) for row in rows])
    assert (mixed - alone).abs().max() > 100 * TOLERANCE * alone.abs().max()


def test_batched_answers_are_single_ones(model, encoder):
    questions = [PLAIN, *ROWS[:4], MANY]
    batched = generate(model, encoder, questions, max_new_tokens=8, batch_rows=6)
    single = [generate(model, encoder, [each], max_new_tokens=8)[0] for each in questions]
    assert [answer.text for answer in batched] == [answer.text for answer in single]
    assert len({answer.text for answer in single}) > 1


def test_the_first_generated_token_is_the_trained_one(model, encoder):
    """Generation sees the row as training does: the same logits, the same greedy choice."""
    for conversation in (PLAIN, ROWS[1], MANY):
        first = logits(model, encoder, [conversation])[0]
        if len(conversation.messages) > 2:
            continue  # labels begin with an earlier answer
        answer = generate(model, encoder, [conversation], max_new_tokens=1)[0]
        tokenizer = encoder.family.parts.tokenizer
        expected = tokenizer.decode([int(first.argmax())], skip_special_tokens=True)
        assert answer.text == expected.removeprefix(encoder.lead)


@torch.no_grad()
def spoken(decoding, steps):
    """Greedy ids of every row, ``(rows, steps)``."""
    said = []
    for _ in range(steps):
        said.append(decoding.logits.argmax(dim=-1))
        decoding.step(said[-1])
    return torch.stack(said, dim=1)


def stock(model, encoder, row, steps):
    """What the model's own ``generate`` says."""
    from transformers import GenerationConfig

    inputs = encoder.family.generate_inputs(pad_left(encoder, [row]))
    settings = GenerationConfig(do_sample=False, pad_token_id=encoder.pad_id, eos_token_id=None)
    with torch.no_grad():
        output = model.generate(**inputs, generation_config=settings, max_new_tokens=steps)
    return output[0, len(row.tokens) :]


def test_decoding_says_what_the_models_own_generate_says(model, encoder):
    """Rows together; then rows that join those that have begun, and rows that leave."""
    if not encoder.family.facts.decodes:
        pytest.skip("the family is answered by the model's own generate")
    rows = [encoder.encode(row, ask=True) for row in (PLAIN, *ROWS[:3], MANY)]
    expected = torch.stack([stock(model, encoder, row, 10) for row in rows])
    assert torch.equal(spoken(Decoding(model, encoder, rows), 10), expected)
    running = Decoding(model, encoder, rows[:2])
    assert torch.equal(spoken(running, 4), expected[:2, :4])
    if not running.joinable:
        with pytest.raises(ModelError, match="window"):
            running.join(Decoding(model, encoder, rows[2:]))
        return
    running.join(Decoding(model, encoder, rows[2:]))
    assert torch.equal(spoken(running, 3), torch.cat([expected[:2, 4:7], expected[2:, :3]]))
    running.keep([3, 1])
    assert torch.equal(spoken(running, 3), torch.stack([expected[3, 3:6], expected[1, 7:10]]))


def test_a_decoding_that_forgets_positions_says_something_else(model, encoder):
    """The control: the answers depend on where a row stands."""
    if not encoder.family.facts.decodes:
        pytest.skip("the family is answered by the model's own generate")
    rows = [encoder.encode(row, ask=True) for row in (PLAIN, *ROWS[:3], MANY)]
    wrong = Decoding(model, encoder, rows)
    wrong._next += 40
    right = Decoding(model, encoder, rows)
    for decoding in (wrong, right):
        decoding.step(right.logits.argmax(dim=-1) if decoding is right else wrong.logits.argmax(-1))
    assert (wrong.logits - right.logits).abs().max() > 100 * TOLERANCE
