"""Features that were made before say what pixels say: the same logits, loss and gradients."""

from __future__ import annotations

import logging

import pytest
import torch

from tiny_rows import asked, lively, mixed_rows, picture, row, turn
from vlmtune.batching.collate import pack
from vlmtune.batching.feature_store import MemoryStore
from vlmtune.batching.vision_cache import CachingEncoder, VisionCache, identity_of
from vlmtune.models import decode
from vlmtune.models.features import FEATURES
from vlmtune.models.generate import generate
from vlmtune.training.looking import Keeping, Part, fault_of, with_features
from vlmtune.training.loss import label_logits, summed_loss

PLAIN = row(turn("user", "Hello?"), turn("assistant", "Yes."), name="plain")
MANY = asked("Which?", "The last.", *(picture((40 + 9 * n, 60), seed=n) for n in range(3)))
ONE = asked("What?", "This.", picture((90, 60), seed=8))
ROWS = [PLAIN, *mixed_rows(3, seed=11), MANY, ONE]
TOLERANCE = 1e-5  # of the largest, fp32
KEEPING = Keeping("memory", 1.0, torch.float32)


@pytest.fixture(scope="module")
def caching(model, encoder):
    """An encoder that knows the rows' images."""
    if encoder.family.facts.features is None:
        pytest.skip("the family is not known to take features for pixels")
    made = with_features(model, encoder, [Part(ROWS, range(len(ROWS)), 2)], KEEPING)
    assert isinstance(made, CachingEncoder)
    return made


def batch_of(encoder, rows):
    return pack(encoder.family, encoder.encode_together(rows))


def batches(encoder, rows):
    if encoder.family.facts.packs:
        return [batch_of(encoder, rows)]
    return [batch_of(encoder, [each]) for each in rows]


@torch.no_grad()
def logits(model, encoder, rows):
    found = [label_logits(model, encoder.family, batch) for batch in batches(encoder, rows)]
    return torch.cat(found)


def gradients(model, encoder, rows):
    """Loss, and gradients of the language model, the tower frozen."""
    facts = encoder.family.facts
    kept = {name: tensor.requires_grad for name, tensor in model.named_parameters()}
    try:
        for name, parameter in model.named_parameters():
            frozen = name.startswith((facts.vision_tower, *facts.projector))
            parameter.requires_grad_(not frozen)
        loss = sum(summed_loss(model, encoder.family, each) for each in batches(encoder, rows))
        loss.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    finally:
        model.zero_grad(set_to_none=True)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(kept[name])
    return loss.detach(), grads


def test_alone_the_bits_are_those_of_pixels(model, encoder, caching):
    for each in ROWS:
        assert torch.equal(logits(model, caching, [each]), logits(model, encoder, [each]))


def test_packed_loss_and_gradients_are_those_of_pixels(model, encoder, caching):
    loss, grads = gradients(model, encoder, ROWS)
    known_loss, known = gradients(model, caching, ROWS)
    assert grads.keys() == known.keys()
    torch.testing.assert_close(known_loss, loss, rtol=TOLERANCE, atol=0)
    for name, gradient in grads.items():
        largest = float(gradient.abs().max())
        torch.testing.assert_close(known[name], gradient, rtol=0, atol=TOLERANCE * largest)


def test_features_of_other_images_are_seen(model, encoder, caching):
    """The control: one picture under the key of another, and the order within a row."""
    cache = caching.cache
    other = picture((90, 60), seed=99)
    store = MemoryStore(10**8)
    wrong = CachingEncoder(VisionCache(encoder, store, cache._identity))
    wrong.cache.fill(model, [asked("?", "!", other)])
    store.put(wrong.cache.key(ONE.images[0], 1), store.get(wrong.cache.key(other, 1)))
    right, found = logits(model, encoder, [ONE]), logits(model, wrong, [ONE])
    assert (found - right).abs().max() > 100 * TOLERANCE * right.abs().max()
    reason = fault_of(model, encoder, wrong, [Part([ONE], [0], 2)])
    assert reason is not None
    assert "differs from what the vision tower makes now" in reason


def test_stale_features_are_seen(folder, encoder, caching):
    """Another tower has another key; forced under the old one, the check at the start finds it."""
    facts, contract = encoder.family.facts, encoder.contract
    trained = lively(folder)
    before = identity_of(trained, facts, contract, torch.float32)
    assert before == caching.cache._identity
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if name.startswith((facts.vision_tower, *facts.projector)):
                parameter.mul_(1.01)
    assert identity_of(trained, facts, contract, torch.float32) != before
    assert fault_of(trained, encoder, caching, [Part([ONE], [0], 2)]) is not None


def test_a_model_that_ignores_features_is_seen(model, encoder, caching, monkeypatch):
    """As if the forward put something of its own in their places."""
    given = type(encoder.family).feature_arguments

    def ignored(self, batch):
        return given(self, {**batch, FEATURES: torch.zeros_like(batch[FEATURES])})

    monkeypatch.setattr(type(encoder.family), "feature_arguments", ignored)
    assert fault_of(model, encoder, caching, [Part([ONE], [0], 2)]) is not None


def test_answers_are_those_of_pixels(model, encoder, caching):
    questions = [PLAIN, ROWS[1], MANY, ONE]
    live = generate(model, encoder, questions, max_new_tokens=4)
    known = generate(model, caching, questions, max_new_tokens=4)
    assert [answer.text for answer in known] == [answer.text for answer in live]
    assert [answer.prompt_tokens for answer in known] == [each.prompt_tokens for each in live]
    if not encoder.family.facts.decodes:
        return
    rows = (decode.pad_left(each, each.encode_together([ONE])) for each in (encoder, caching))
    live_batch, known_batch = rows
    assert FEATURES in known_batch
    assert FEATURES not in live_batch


def test_a_family_that_is_not_known_to_take_them_is_refused(model, encoder, caplog):
    if encoder.family.facts.features is not None:
        pytest.skip("the family takes features")
    from vlmtune.training.distributed.ranks import Ranks
    from vlmtune.verbs.looking import why_not

    with caplog.at_level(logging.INFO):
        reason = why_not(model, encoder, None, Ranks())
    assert reason is not None
    assert encoder.family.facts.name in reason
