"""The faster products are the stock ones: outputs, losses, gradients; weights keep their names."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tiny_rows import lively, mixed_rows
from vlmtune.batching.collate import pack
from vlmtune.models import products
from vlmtune.testing import tiny
from vlmtune.training.loss import summed_loss
from vlmtune.tuning import fused
from vlmtune.tuning.apply import apply_tuning
from vlmtune.tuning.config import TuningConfig
from vlmtune.tuning.fused import FusedLora

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN"
)


@pytest.fixture
def everywhere(monkeypatch):
    """Every product on the CPU by oneDNN, however small and whatever the processor."""
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(products, "SMALL", 0)
    monkeypatch.setattr(products, "FEW_ROWS", 0)


@pytest.fixture
def counted(monkeypatch):
    """How often oneDNN was asked."""
    calls = []
    original = products.multiply
    monkeypatch.setattr(
        products, "multiply", lambda *given: calls.append(given) or original(*given)
    )
    return calls


def gradients_of(layer, inputs):
    inputs = inputs.clone().requires_grad_()
    output = layer(inputs)
    output.square().sum().backward()
    gradients = [inputs.grad, *(parameter.grad for parameter in layer.parameters())]
    return [output.detach(), *gradients]


def same(found, expected, limit=1e-5):
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.shape == theirs.shape
        assert (mine - theirs).abs().max() <= limit * theirs.abs().max()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(40,), (3, 17), (1,)])
@pytest.mark.usefixtures("everywhere")
def test_a_linear_layer_is_the_stock_one(counted, bias, shape):
    stock = nn.Linear(24, 48, bias=bias)
    ours = copy.deepcopy(stock)
    products.speed_up(ours)
    assert type(ours) is products.Linear
    inputs = torch.randn(*shape, 24)
    same(gradients_of(ours, inputs), gradients_of(stock, inputs))
    assert counted
    assert ours.state_dict().keys() == stock.state_dict().keys()


def test_sixteen_numbers_of_rows_an_octave_have_kernels():
    filled = {count: products.filled_count(count) for count in range(1, 5000)}
    assert all(0 <= whole - count < max(8, count / 16) for count, whole in filled.items())
    assert len({filled[count] for count in range(1, 129)}) == 16
    assert len({filled[count] for count in range(129, 257)}) == 16
    assert len({filled[count] for count in range(1025, 2049)}) == 16


@pytest.mark.usefixtures("everywhere")
def test_rows_filled_up_with_anything_else_are_noticed(monkeypatch):
    """The control: they would be part of the weight's gradient."""
    stock = nn.Linear(24, 48)
    ours = copy.deepcopy(stock)
    products.speed_up(ours)
    original = products.filled_up

    def with_ones(rows):
        filled = original(rows)
        filled[len(rows) :] = 1.0
        return filled

    monkeypatch.setattr(products, "filled_up", with_ones)
    with pytest.raises(AssertionError):
        same(gradients_of(ours, torch.randn(41, 24)), gradients_of(stock, torch.randn(41, 24)))


@pytest.mark.usefixtures("everywhere")
def test_another_product_is_noticed(monkeypatch):
    """The control: a gradient that is summed wrongly differs."""
    stock = nn.Linear(24, 48)
    ours = copy.deepcopy(stock)
    products.speed_up(ours)
    original = products.multiply
    monkeypatch.setattr(products, "multiply", lambda *given: original(*given) * 1.001)
    with pytest.raises(AssertionError):
        same(gradients_of(ours, torch.randn(40, 24)), gradients_of(stock, torch.randn(40, 24)))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.usefixtures("everywhere")
def test_patches_are_one_product(bias):
    stock = nn.Conv3d(3, 16, (2, 14, 14), stride=(2, 14, 14), bias=bias)
    ours = copy.deepcopy(stock)
    products.speed_up(ours)
    assert type(ours) is products.PatchConv3d
    patches = torch.randn(9, 3, 2, 14, 14)
    same(gradients_of(ours, patches), gradients_of(stock, patches))
    larger = torch.randn(2, 3, 4, 28, 28)  # several patches: the convolution as it was
    same(gradients_of(ours, larger), gradients_of(stock, larger))


def test_patches_in_another_order_are_noticed():
    """The control: what the kernel weighs is in a fixed order."""
    stock = nn.Conv3d(3, 16, (2, 14, 14), stride=(2, 14, 14))
    ours = copy.deepcopy(stock)
    products.speed_up(ours)
    patches = torch.randn(9, 3, 2, 14, 14)
    turned = patches.transpose(3, 4).contiguous()
    assert (ours(turned) - stock(patches)).abs().max() > 1e-2


@pytest.mark.parametrize("layer", [nn.Conv3d(3, 4, 2, padding=1), nn.Conv3d(4, 4, 2, groups=2)])
def test_other_convolutions_stay(layer):
    products.speed_up(layer)
    assert type(layer) is nn.Conv3d


@pytest.mark.usefixtures("everywhere")
def test_half_precision_and_autocast_go_the_stock_way(counted):
    layer = products.Linear(8, 8)
    layer.to(torch.bfloat16)(torch.randn(4, 8, dtype=torch.bfloat16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer.float()(torch.randn(4, 8)).dtype is torch.bfloat16
    assert not counted


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ("vendor_id : AuthenticAMD\nflags : avx2 avx512f avx512dq \n", True),
        ("vendor_id : AuthenticAMD\nflags : avx2 fma \n", False),
        ("vendor_id : GenuineIntel\nflags : avx2 avx512f avx512dq \n", False),
        (None, False),
    ],
)
def test_the_processor_decides(tmp_path, monkeypatch, facts, expected):
    """A resumed run on the same machine decides alike."""
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    path = tmp_path / "cpuinfo"
    if facts is not None:
        path.write_text(facts)
    assert products.onednn_is_faster(path) is expected


# LoRA


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny("qwen2_vl", tmp_path_factory.mktemp("products") / "tiny", seed=4)


def tuned(folder, family, dropout=0.0, targets=None):
    torch.manual_seed(0)
    config = TuningConfig(rank=4, alpha=8, dropout=dropout, targets=targets)
    model = apply_tuning(lively(folder), config, family.facts, base_id="base").model
    for name, parameter in model.named_parameters():  # the second matrix begins as zero
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model.train()


def step(model, family, batch):
    model.zero_grad()
    torch.manual_seed(1)  # dropout
    loss = summed_loss(model, family, batch) / batch.labels
    loss.backward()
    named = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    assert named
    return loss.detach(), dict(named)


def drop(self, input):
    """Dropout by our draws."""
    if not self.p or not self.training:
        return input
    return input.masked_fill(dropped_of(input, self.p), 0) / (1 - self.p)


def dropped_of(x, share):
    kept = fused.keeps(fused.draw(x), share, x.dtype)
    assert set(kept.unique().tolist()) <= {0.0, 1.0}
    return kept == 0


def test_dropout_draws_its_share():
    """Each value for itself, and a new one each time; nothing where nothing is to be dropped."""
    torch.manual_seed(3)
    x = torch.zeros(333, 1001)
    for share in (0.05, 0.1, 0.5, 0.9):
        dropped = dropped_of(x, share)
        assert dropped.shape == x.shape
        error = (share * (1 - share) / x.numel()) ** 0.5
        assert float(dropped.float().mean()) == pytest.approx(share, abs=4 * error)
        for axis in (0, 1):  # neighbours, four of which come from one random number
            both = (dropped & dropped.roll(1, dims=axis)).float().mean()
            assert float(both) == pytest.approx(share**2, abs=8 * error)
        assert not torch.equal(dropped, dropped_of(x, share))
    seeded = []
    for _ in range(2):
        torch.manual_seed(3)
        seeded.append(dropped_of(x, 0.05))
    assert torch.equal(*seeded)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize(("dropout", "merges"), [(0.0, True), (0.0, False), (0.3, None)])
def test_fused_adapters_are_pefts(folder, monkeypatch, dropout, merges):
    from tiny_rows import encoder_of

    if merges is not None:  # with dropout a weight that holds the adapter is another function
        monkeypatch.setattr(fused, "_merges", lambda *_: merges)

    encoder = encoder_of(folder)
    batch = pack(encoder.family, [encoder.encode(row) for row in mixed_rows(4, seed=2)])
    model = tuned(folder, encoder.family, dropout, targets="all-linear")
    layers = [module for module in model.modules() if type(module) is FusedLora]
    assert layers
    loss, gradients = step(model, encoder.family, batch)
    with monkeypatch.context() as stock:
        stock.setattr(products, "onednn_is_faster", lambda: False)
        stock.setattr(nn.Dropout, "forward", drop)
        expected, theirs = step(model, encoder.family, batch)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert gradients.keys() == theirs.keys()
    same(list(gradients.values()), list(theirs.values()))
    # The control: another scaling is another gradient.
    for module in layers:
        module.scaling["default"] *= 1.01
    _, wrong = step(model, encoder.family, batch)
    with pytest.raises(AssertionError):
        same(list(wrong.values()), list(theirs.values()))


@pytest.mark.usefixtures("everywhere")
def test_fused_adapters_in_bf16_are_nearer_the_truth(folder, monkeypatch):
    """One rounding an output where peft has four; the control is peft's own distance."""
    from tiny_rows import encoder_of

    encoder = encoder_of(folder)
    batch = pack(encoder.family, [encoder.encode(row) for row in mixed_rows(4, seed=2)])
    model = tuned(folder, encoder.family, targets="all-linear")
    with monkeypatch.context() as stock:
        stock.setattr(products, "onednn_is_faster", lambda: False)
        truth, exact = step(model, encoder.family, batch)
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.bfloat16()

    def apart():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, gradients = step(model, encoder.family, batch)
        assert float(loss) == pytest.approx(float(truth), rel=5e-3)
        assert all(gradient.dtype is torch.float32 for gradient in gradients.values())
        mine, theirs = (torch.cat([g.flatten() for g in of.values()]) for of in (gradients, exact))
        return float((mine - theirs).norm() / theirs.norm())

    ours = apart()
    assert 1e-4 < ours < 0.1
    monkeypatch.setattr(products, "is_worth_in_bf16", lambda *_: False)
    assert ours < apart()
    # The control: another scaling is another gradient.
    monkeypatch.undo()
    for module in model.modules():
        if type(module) is FusedLora:
            module.scaling["default"] *= 1.5
    assert apart() > 0.1


@pytest.mark.usefixtures("everywhere")
def test_switched_off_adapters_are_the_base(folder):
    from tiny_rows import encoder_of

    encoder = encoder_of(folder)
    batch = pack(encoder.family, [encoder.encode(row) for row in mixed_rows(4, seed=2)])
    model = tuned(folder, encoder.family)
    base = lively(folder)
    layers = [module for module in model.modules() if type(module) is FusedLora]
    with torch.no_grad():
        on = summed_loss(model, encoder.family, batch)
        for layer in layers:
            layer.enable_adapters(False)
        off = summed_loss(model, encoder.family, batch)
        expected = summed_loss(base, encoder.family, batch)
    assert float(off) == pytest.approx(float(expected), rel=1e-5)
    assert float(on) != pytest.approx(float(expected), rel=1e-3)
