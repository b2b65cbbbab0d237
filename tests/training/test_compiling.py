"""Compiled layers train as the others, and are not compiled anew for each pack."""

from __future__ import annotations

import shutil

import pytest
import torch
from transformers import AttentionInterface

from tiny_rows import encoder_of, lively, mixed_rows
from vlmtune.batching.collate import pack
from vlmtune.models import attention
from vlmtune.testing import tiny
from vlmtune.training.compiling import compile_layers
from vlmtune.training.loss import summed_loss

# Dynamo itself asks tensors within the model for their gradients.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),  # inductor's own imports
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny("qwen2_vl", tmp_path_factory.mktemp("compiling") / "tiny", seed=4)


@pytest.fixture(autouse=True)
def as_before():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    AttentionInterface.register(attention.NAME, attention.attend)


def batches(encoder):
    """Packs of other lengths, and of other numbers of rows."""
    rows = [encoder.encode(row) for row in mixed_rows(9, seed=3)]
    return [pack(encoder.family, rows[start:stop]) for start, stop in ((0, 2), (2, 5), (5, 9))]


def passes(model, family, batch):
    model.zero_grad()
    loss = summed_loss(model, family, batch)
    loss.backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return loss.detach(), torch.cat(gradients).clone()


def graphs():
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.parametrize(
    "backend",
    [
        "eager",  # what is compiled, and how often, without a compiler
        pytest.param(
            "inductor",
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(shutil.which("g++") is None, reason="there is no compiler here"),
            ],
        ),
    ],
)
def test_compiled_layers_are_the_layers(folder, backend):
    encoder, stock, model = encoder_of(folder), lively(folder), lively(folder)
    torch._dynamo.utils.counters.clear()
    assert len(compile_layers(model, encoder.family.facts, backend)) == 2
    counts = []
    for batch in batches(encoder):
        found, expected = (passes(each, encoder.family, batch) for each in (model, stock))
        counts.append(graphs())
        for mine, theirs in zip(found, expected, strict=True):
            assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert counts[0] > 0
    assert counts[0] == counts[1] == counts[2]
    assert model.state_dict().keys() == stock.state_dict().keys()


def test_attention_within_is_compiled_for_each_pack(folder, monkeypatch):
    """The control: the bounds are numbers, and each pack has others."""
    monkeypatch.setattr(torch.compiler, "disable", lambda function: function)
    encoder, model = encoder_of(folder), lively(folder)
    torch._dynamo.utils.counters.clear()
    compile_layers(model, encoder.family.facts, "eager")
    counts = []
    for batch in batches(encoder):
        passes(model, encoder.family, batch)
        counts.append(graphs())
    assert counts[-1] > counts[0]
