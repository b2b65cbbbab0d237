"""What a GPU might do otherwise: half precision, packing, resume, merge. Not run without one."""

from __future__ import annotations

import pytest
import torch

from tiny_rows import encoder_of, lively, mixed_rows
from tiny_world import MakeRecipe, fingerprint
from vlmtune.batching.collate import pack
from vlmtune.models.generate import generate
from vlmtune.training.loss import label_logits
from vlmtune.verbs.merge import merge
from vlmtune.verbs.train import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here"),
]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_train_resume_merge(precision, make_recipe: MakeRecipe, tmp_path):
    recipe = make_recipe(
        training__precision=precision, model__device="cuda", evaluation__after=True
    )
    whole = train(recipe, run_dir=tmp_path / "whole")
    assert whole["after"]
    again = train(recipe, run_dir=tmp_path / "again")
    if precision == "fp32":
        assert again["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    merged = merge(tmp_path / "whole", tmp_path / "model", device="cuda")
    assert merged["changed"]["language"] > 0
    assert fingerprint(tmp_path / "whole")["checkpoint"] == whole["checkpoint"].rsplit("/", 1)[-1]


def test_packed_is_alone(tiny_base):
    encoder = encoder_of(tiny_base)
    model = lively(tiny_base).to("cuda").eval()
    rows = [encoder.encode(row) for row in mixed_rows(6, seed=1)]
    with torch.no_grad():
        device = torch.device("cuda")
        together = label_logits(model, encoder.family, pack(encoder.family, rows).to(device))
        alone = [
            label_logits(model, encoder.family, pack(encoder.family, [row]).to(device))
            for row in rows
        ]
    scale = float(together.abs().max())
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-4 * scale)


def test_generation_in_batches(tiny_base):
    encoder = encoder_of(tiny_base)
    model = lively(tiny_base).to("cuda").eval()
    rows = mixed_rows(6, seed=1)
    together = generate(model, encoder, rows, max_new_tokens=8)
    alone = [generate(model, encoder, [row], max_new_tokens=8)[0] for row in rows]
    assert [answer.text for answer in together] == [answer.text for answer in alone]
