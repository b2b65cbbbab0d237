"""Schedules against transformers', decay of matrices only, and the loss scale."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import get_scheduler

from vlmtune.training.config import TrainingConfig
from vlmtune.training.optim import learning_rate, make_optimizer, make_scaler, set_learning_rates


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_schedule_equals_transformers(schedule, warmup):
    steps = 23
    config = TrainingConfig(learning_rate=3e-4, schedule=schedule, warmup_steps=warmup)
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=config.learning_rate)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    reference = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    for step in range(1, steps + 1):
        assert learning_rate(config, step, steps) == pytest.approx(
            optimizer.param_groups[0]["lr"], rel=1e-12, abs=1e-18
        )
        optimizer.step()
        reference.step()


def test_schedule_is_off_by_one_without_the_shift():
    """Negative control: the step's number is counted from 1, not from 0."""
    config = TrainingConfig(schedule="linear")
    assert learning_rate(config, 1, 10) == config.learning_rate
    assert learning_rate(config, 2, 10) < config.learning_rate


def test_warmup_steps_stand_above_the_ratio():
    assert TrainingConfig(warmup_ratio=0.1).warmup(101) == 11
    assert TrainingConfig(warmup_ratio=0.1, warmup_steps=0).warmup(101) == 0


def test_only_matrices_decay():
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    optimizer = make_optimizer(dict(model.named_parameters()), TrainingConfig(weight_decay=0.1))
    decay = {
        id(parameter): group["weight_decay"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert {name: decay[id(parameter)] for name, parameter in model.named_parameters()} == {
        "0.weight": 0.1,
        "0.bias": 0.0,
        "1.weight": 0.0,
        "1.bias": 0.0,
    }


def test_parts_have_learning_rates_of_their_own_on_one_schedule():
    """And the same schedule: the rates keep their ratio from the first step to the last."""
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    config = TrainingConfig(learning_rate=1e-3, warmup_steps=2, schedule="cosine", weight_decay=0.1)
    parameters = dict(model.named_parameters())
    optimizer = make_optimizer(parameters, config, {"0.weight": 1e-5, "0.bias": 1e-5})
    assert len(optimizer.param_groups) == 3  # matrices and vectors at 1e-5, vectors at 1e-3
    own = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    for step in range(1, 9):
        set_learning_rates(optimizer, config, step, 8)
        rate = learning_rate(config, step, 8)
        assert own[id(parameters["1.weight"])]["lr"] == rate
        for name in ("0.weight", "0.bias"):
            assert own[id(parameters[name])]["lr"] == pytest.approx(rate / 100, rel=1e-12)
    assert own[id(parameters["0.weight"])]["weight_decay"] == 0.1
    assert own[id(parameters["0.bias"])]["weight_decay"] == 0.0


def test_only_fp16_scales_the_loss():
    device = torch.device("cpu")
    assert make_scaler(TrainingConfig(precision="fp16"), device).is_enabled()
    assert not make_scaler(TrainingConfig(precision="bf16"), device).is_enabled()


def test_the_fused_step_is_the_plain_one():
    """Of vectors and matrices, that decay and do not; another rate is another step."""

    def moved(*, fused, rate=1e-2):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7))
        config = TrainingConfig(weight_decay=0.1, learning_rate=rate)
        optimizer = make_optimizer(dict(model.named_parameters()), config, fused=fused)
        for _ in range(5):
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    torch.testing.assert_close(moved(fused=True), moved(fused=False), rtol=1e-5, atol=1e-6)
    assert (moved(fused=True) - moved(fused=False, rate=1.01e-2)).abs().max() > 1e-5
