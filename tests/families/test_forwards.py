"""A row means the same alone, packed with others, and in a batch of questions."""

from __future__ import annotations

import pytest
import torch

from tiny_rows import asked, mixed_rows, picture, row, turn
from vlmtune.batching.collate import pack
from vlmtune.errors import ModelError
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
