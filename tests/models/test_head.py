"""The loss made in chunks of labels is the loss of all logits, and so are its gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tiny_rows import encoder_of, lively, mixed_rows
from vlmtune.batching.collate import pack
from vlmtune.models import head
from vlmtune.models.head import LossHead, loss_wanted, use_loss_head
from vlmtune.testing import tiny
from vlmtune.training.loss import mean_loss, summed_loss

LABELS, HIDDEN, VOCABULARY = 37, 16, 500


@pytest.fixture(autouse=True)
def chunks(monkeypatch):
    """Several chunks, the last one smaller, at any size."""
    monkeypatch.setattr(head, "MANY", 0)
    monkeypatch.setattr(head, "CHUNK", {"cpu": 10 * VOCABULARY, "cuda": 10 * VOCABULARY})


def layers(bias=False, trains=True, dtype=torch.float32):
    torch.manual_seed(0)
    stock = nn.Linear(HIDDEN, VOCABULARY, bias=bias, dtype=dtype).requires_grad_(trains)
    ours = copy.deepcopy(stock)
    ours.__class__ = LossHead
    return stock, ours


def inputs(dtype=torch.float32):
    torch.manual_seed(1)
    targets = torch.randint(0, VOCABULARY, (LABELS,))
    return torch.randn(LABELS, HIDDEN, dtype=dtype).requires_grad_(), targets


def by_logits(layer, hidden, targets):
    loss = nn.functional.cross_entropy(layer(hidden).float(), targets, reduction="sum")
    return _gradients(loss / LABELS, layer, hidden)


def by_chunks(layer, hidden, targets):
    with loss_wanted(targets) as request:
        output = layer(hidden)
    assert request.loss is output
    return _gradients(output.squeeze(0) / LABELS, layer, hidden)


def _gradients(loss, layer, hidden):
    loss.backward()
    trained = [each.grad for each in layer.parameters() if each.requires_grad]
    return [loss.detach(), hidden.grad, *trained]


def same(found, expected, limit=1e-5):
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype is theirs.dtype
        assert (mine - theirs).abs().max() <= limit * theirs.abs().max()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("trains", [True, False])
def test_chunks_are_the_whole(bias, trains):
    stock, ours = layers(bias, trains)
    expected = by_logits(stock, *inputs())
    same(by_chunks(ours, *inputs()), expected)
    # The control: a target that is another.
    hidden, targets = inputs()
    targets[11] += 1 if targets[11] < VOCABULARY - 1 else -1
    with pytest.raises(AssertionError):
        same(by_chunks(ours, hidden, targets), expected)


def test_logits_of_a_thousand_do_not_overflow():
    stock, ours = layers()
    for layer in (stock, ours):
        layer.weight.data *= 1000
    same(by_chunks(ours, *inputs()), by_logits(stock, *inputs()))


def test_autocast_rounds_as_logits_do():
    stock, ours = layers()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, found = by_logits(stock, *inputs()), by_chunks(ours, *inputs())
    same(found, expected, 2e-2)
    with torch.autocast("cpu", dtype=torch.float16), loss_wanted(inputs()[1]) as request:
        assert ours(inputs()[0]).shape == (LABELS, VOCABULARY)  # its gradients would vanish
    assert request.loss is None


def test_few_logits_are_made_at_once(monkeypatch):
    monkeypatch.setattr(head, "MANY", LABELS * VOCABULARY + 1)
    _, ours = layers()
    hidden, targets = inputs()
    with loss_wanted(targets) as request:
        assert ours(hidden).shape == (LABELS, VOCABULARY)
    assert request.loss is None
    assert ours(hidden).shape == (LABELS, VOCABULARY)  # nobody asked for a loss


class Largest(TorchDispatchMode):
    """Notes the largest tensor that anything returns."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.numbers = max([self.numbers, *sizes])
        return result


def test_memory_is_bounded_by_the_chunk():
    stock, ours = layers(trains=False)
    with Largest() as seen:
        by_chunks(ours, *inputs())
    assert seen.numbers == VOCABULARY * max(10, HIDDEN)  # the weights are that large
    with Largest() as control:
        by_logits(stock, *inputs())
    assert control.numbers == LABELS * VOCABULARY


# In a model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny("qwen2_vl", tmp_path_factory.mktemp("head") / "tiny", seed=4)


def passes(model, family, batch):
    model.zero_grad()
    loss = summed_loss(model, family, batch)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def test_a_model_trains_as_without(folder):
    """The head is tied to the embedding here: both gradients of one matrix add up."""
    encoder, ours = encoder_of(folder), lively(folder)
    batch = pack(encoder.family, [encoder.encode(row) for row in mixed_rows(4, seed=2)])
    expected = passes(lively(folder), encoder.family, batch)
    use_loss_head(ours)
    assert type(ours.get_output_embeddings()) is LossHead
    same(passes(ours, encoder.family, batch), expected)
    with torch.no_grad():
        assert mean_loss(ours, encoder.family, [batch]) == pytest.approx(
            float(expected[0]) / batch.labels, rel=1e-5
        )
    assert ours.state_dict().keys() == lively(folder).state_dict().keys()


def test_a_model_that_scales_its_logits_gives_logits(folder):
    """A loss that were scaled in their place would be another; nothing would complain."""
    encoder, ours, stock = encoder_of(folder), lively(folder), lively(folder)
    batch = pack(encoder.family, [encoder.encode(row) for row in mixed_rows(4, seed=2)])

    def halve(module, given, output):  # noqa: ARG001
        output.logits = output.logits / 2
        return output

    for model in (ours, stock):
        model.register_forward_hook(halve)
    use_loss_head(ours)
    expected = passes(stock, encoder.family, batch)
    for _ in range(2):
        same(passes(ours, encoder.family, batch), expected)
    assert not ours.get_output_embeddings().final
