"""A forecast is what the run then does: parameters, steps, tokens, FLOPs, memory."""

from __future__ import annotations

import gc
import math
import shutil
from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from tiny_world import full_recipe, lines
from vlmtune.batching.collate import pack
from vlmtune.data.dataset import PreparedDataset
from vlmtune.data.media import ImagePolicy
from vlmtune.errors import RefusedError, UsageError
from vlmtune.forecast.devices import DEVICES
from vlmtune.forecast.needs import Held, exchanged, memory, pace
from vlmtune.forecast.shadow import Traced, hollow, trace_step
from vlmtune.forecast.work import VISION, Work
from vlmtune.models import attention, products
from vlmtune.models.contract import BaseModelIdentity, make_contract
from vlmtune.models.empty import empty_model
from vlmtune.models.encode import Encoder
from vlmtune.models.families import load_family
from vlmtune.models.features import FEATURES
from vlmtune.models.head import use_loss_head
from vlmtune.models.load import load_model
from vlmtune.models.products import speed_up
from vlmtune.testing import TinySize, tiny
from vlmtune.training.config import TrainingConfig
from vlmtune.training.distributed.config import DistributedConfig
from vlmtune.training.loss import summed_loss
from vlmtune.tuning.apply import apply_tuning
from vlmtune.tuning.config import TuningConfig
from vlmtune.verbs import plan as verb
from vlmtune.verbs.plan import plan
from vlmtune.verbs.start import recompute_activations

CPU = torch.device("cpu")
FP32 = TrainingConfig(precision="fp32")
LORA = TuningConfig(rank=8, dropout=0.1)
MERGING = TuningConfig(rank=8, dropout=0.0)
FULL = TuningConfig(method="full")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Models large enough that their tensors outweigh what surrounds them."""
    folder = tmp_path_factory.mktemp("bases")
    size = TinySize(hidden=64, layers=3, vision_width=32, vision_layers=3, vocabulary=2048)
    return {name: tiny(name, folder / name, seed=1, size=size) for name in ("qwen2_vl", "idefics3")}


def batch_of(base, data, rows):
    family = load_family(str(base))
    policy = ImagePolicy(max_pixels=25_088) if "max_pixels" in family.facts.image_options else None
    contract = make_contract(
        family, BaseModelIdentity(id="b", weights_sha256=""), policy or ImagePolicy()
    )
    encoder = Encoder(family, contract)
    split = PreparedDataset.open(data).split("train")
    return family, pack(family, [encoder.encode(split[number]) for number in range(rows)])


def prepared(model, tuning, family, again):
    tuned = apply_tuning(model, tuning, family.facts, base_id="b")
    recompute_activations(model, model.get_submodule(family.facts.vision_tower), again)
    use_loss_head(model)
    model.train()
    return tuned


def forecast(base, family, batch, tuning, again="nothing") -> Traced:
    model = empty_model(base)
    model.set_attn_implementation(attention.register())
    speed_up(model)
    tuned = prepared(model, tuning, family, again)
    hollow(model, torch.float32)
    return trace_step(tuned, family, batch, FP32, several=False, gpu=False)


def measured(base, family, batch, tuning, again) -> tuple[int, int]:
    """Peak of a real step's tensors, weights included, and torch's own count of its FLOPs."""
    model = load_model(base, dtype=torch.float32, device=CPU)
    tuned = prepared(model, tuning, family, again)
    optimizer = torch.optim.AdamW(tuned.trainable().values(), fused=True)

    def step() -> None:
        loss = summed_loss(model, family, batch) / batch.labels
        loss.backward()
        del loss
        torch.nn.utils.clip_grad_norm_(tuned.trainable().values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    step()  # now the optimizer has its moments
    gc.collect()  # what checkpointing left behind must not be freed within the measurement
    moments = [each for state in optimizer.state.values() for each in state.values()]
    held = {
        each.untyped_storage().data_ptr(): each
        for each in (*model.parameters(), *moments, *batch.inputs.values())
    }
    size = sum(each.untyped_storage().nbytes() for each in held.values())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    live = highest = 0
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        highest = max(highest, live)
    # oneDNN's products are not known to it.
    own = {torch.ops.mkldnn._linear_pointwise: _pointwise}
    counter = FlopCounterMode(display=False, custom_mapping=own)
    with counter:
        summed_loss(model, family, batch).backward()
    counts = counter.get_flop_counts()["Global"]
    flops = sum(count for operation, count in counts.items() if "attention" not in str(operation))
    return size + highest, flops


def _pointwise(inputs, *_, out_shape=None, **__):
    return 2 * math.prod(out_shape) * inputs[-1]


def multiplied(rows):
    """Rows of a product on this processor, with those that it is filled up with."""
    filled = products.onednn_is_faster() and rows >= products.FEW_ROWS
    return products.filled_count(rows) if filled else rows


@pytest.mark.parametrize(
    ("family_name", "rows", "tuning", "again"),
    [
        pytest.param("qwen2_vl", 4, LORA, "nothing", id="lora"),
        pytest.param("qwen2_vl", 4, MERGING, "nothing", id="sums", marks=pytest.mark.slow),
        pytest.param("qwen2_vl", 4, FULL, "nothing", id="full", marks=pytest.mark.slow),
        pytest.param("qwen2_vl", 4, LORA, "all", id="again", marks=pytest.mark.slow),
        pytest.param("qwen2_vl", 4, FULL, "vision", id="tower again", marks=pytest.mark.slow),
        pytest.param("qwen2_vl", 4, FULL, "language", id="layers again", marks=pytest.mark.slow),
        pytest.param("idefics3", 1, LORA, "nothing", id="tiles", marks=pytest.mark.slow),
    ],
)
def test_memory_and_flops_are_those_of_the_step(bases, tiny_data, family_name, rows, tuning, again):
    family, batch = batch_of(bases[family_name], tiny_data, rows)
    foretold = forecast(bases[family_name], family, batch, tuning, again)
    peak, flops = measured(bases[family_name], family, batch, tuning, again)
    assert foretold.peak == pytest.approx(peak, rel=0.1)
    assert sum(foretold.live.values()) == foretold.peak
    own = foretold.work.total + foretold.work.again
    ours = sum(count for part, count in own.items() if "attention" not in part)
    assert ours == pytest.approx(flops, rel=0.01)
    assert bool(foretold.work.again) is (again != "nothing")
    # Negative control: the forecast of another batch is not this step's.
    other, shorter = batch_of(bases[family_name], tiny_data, rows)
    keep = slice(0, shorter.labels // 2)
    predicts = shorter.predicts.clone()
    predicts[0, predicts[0].nonzero()[keep.stop :]] = False
    fewer = replace(shorter, predicts=predicts, targets=shorter.targets[keep])
    less = forecast(bases[family_name], other, fewer, tuning, again)
    half = multiplied(fewer.labels) / multiplied(batch.labels)
    assert half < 0.6
    assert less.work.total["head"] == pytest.approx(foretold.work.total["head"] * half, rel=0.01)
    assert less.peak < foretold.peak


@pytest.mark.slow
def test_checkpointing_is_forecast_to_need_less(bases, tiny_data):
    family, batch = batch_of(bases["qwen2_vl"], tiny_data, 4)
    plain = forecast(bases["qwen2_vl"], family, batch, LORA)
    saving = forecast(bases["qwen2_vl"], family, batch, LORA, "all")
    assert saving.live["activations"] < 0.7 * plain.live["activations"]
    assert saving.work.forward == plain.work.forward
    # Computed again is what has checkpoints, at most once; it is no work of the model.
    assert 0 < saving.work.again["language"] <= saving.work.forward["language"]
    assert not plain.work.again


@pytest.mark.slow
def test_memory_falls_by_what_is_computed_again(bases, tiny_data):
    family, batch = batch_of(bases["qwen2_vl"], tiny_data, 4)
    peaks = {
        part: measured(bases["qwen2_vl"], family, batch, FULL, part)[0]
        for part in ("nothing", "vision", "language", "all")
    }
    assert peaks["all"] < min(peaks["vision"], peaks["language"])
    assert max(peaks["vision"], peaks["language"]) < peaks["nothing"]


@pytest.mark.slow
def test_memory_with_features_in_the_place_of_pixels(bases, tiny_data):
    family, batch = batch_of(bases["qwen2_vl"], tiny_data, 4)
    tokens = int(batch.inputs["image_mask"].sum())
    kept = {name: each for name, each in batch.inputs.items() if name not in family.facts.joins}
    given = replace(batch, inputs={**kept, FEATURES: torch.zeros(tokens, 64)})
    foretold = forecast(bases["qwen2_vl"], family, given, LORA)
    peak, flops = measured(bases["qwen2_vl"], family, given, LORA, "nothing")
    assert foretold.peak == pytest.approx(peak, rel=0.1)
    assert foretold.work.total[VISION] == 0
    # Negative control: with pixels the tower works.
    assert flops < measured(bases["qwen2_vl"], family, batch, LORA, "nothing")[1]


def test_a_run_is_as_it_was_forecast(make_recipe, lora_run):
    foretold = plan(make_recipe())
    steps = lines(lora_run / "metrics.jsonl")
    assert foretold["steps"] == len(steps)
    assert foretold["samples"] == sum(step["samples"] for step in steps)
    assert foretold["tokens"] == sum(step["tokens"] for step in steps)
    assert foretold["labels"] == sum(step["labels"] for step in steps)
    proof = next(r for r in lines(lora_run / "ledger.jsonl") if r["event"] == "trainability")
    trainable = {part["part"]: part["trainable"] for part in proof["parts"]}
    assert {name: part["trainable"] for name, part in foretold["parts"].items()} == trainable
    assert foretold["trainable_parameters"] == sum(trainable.values())
    assert sum(foretold["memory"].values()) == foretold["peak_memory_bytes"]
    assert foretold["fits"]
    assert foretold["advice"] == []
    # Negative control: another batch size is another plan.
    other = plan(make_recipe(training__batch_size=4))
    assert other["tokens"] != foretold["tokens"]


@pytest.mark.slow
def test_no_weights_are_read(make_recipe, tiny_base, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(tiny_base, bare, ignore=shutil.ignore_patterns("*.safetensors*"))
    assert not list(bare.glob("*.safetensors"))
    there = plan(make_recipe())
    recipe = make_recipe(model={"base": str(bare)})
    assert plan(recipe)["peak_memory_bytes"] == there["peak_memory_bytes"]


@pytest.mark.slow
def test_full_fine_tuning_needs_more_than_adapters(make_recipe):
    adapters, full = plan(make_recipe()), plan(full_recipe(make_recipe))
    everything = sum(part["parameters"] for part in full["parts"].values())
    assert full["trainable_parameters"] == everything
    assert full["memory"]["optimizer"] >= 2 * 4 * everything  # two moments in fp32
    assert adapters["memory"]["optimizer"] < full["memory"]["optimizer"]


@pytest.mark.slow
def test_what_does_not_fit_is_told_with_the_way_out(make_recipe, monkeypatch):
    recipe = full_recipe(make_recipe, training__gradient_checkpointing=False)
    needed = plan(recipe, device="t4")["peak_memory_bytes"]
    small = replace(DEVICES["t4"], memory=600_000_000 + int(needed * 0.9))
    monkeypatch.setattr(verb, "device_named", lambda _: small)
    told = plan(recipe)
    assert not told["fits"]
    changes = {each["change"].split("=")[0]: each for each in told["advice"]}
    asked = {"training.gradient_checkpointing", "image.max_pixels", "tuning.method"}
    assert asked <= changes.keys()  # a model this small is not helped by each of them
    for change in told["advice"]:
        assert change["fits"] == (change["peak_memory_bytes"] <= small.room)
    # Negative control: with the room, there is nothing to advise.
    enough = replace(small, memory=600_000_000 + needed * 2)
    monkeypatch.setattr(verb, "device_named", lambda _: enough)
    assert plan(recipe)["advice"] == []


def test_refusals(make_recipe):
    with pytest.raises(UsageError, match="not known"):
        plan(make_recipe(), device="h2000")
    with pytest.raises(UsageError, match=r"data\.path"):
        plan(make_recipe(data__path=None))
    with pytest.raises(RefusedError, match="no row"):
        plan(make_recipe(data__max_length=1))


# Many devices, in figures


def traced() -> Traced:
    live = {"weights": 800, "gradients": 80, "optimizer": 160, "activations": 400}
    return Traced(live, sum(live.values()), 100, Work())


HELD = Held(all=800, few=0, layer=50, gradients=80, sent=800)


@pytest.mark.parametrize(
    ("strategy", "peak"),
    [
        ("ddp", 1440),
        ("zero2", 800 + 10 + 20 + 400),
        ("fsdp2", 100 + 10 + 20 + 400 + 100),
        ("zero3", 100 + 10 + 20 + 400 + 100),
    ],
)
def test_what_is_cut_among_devices(strategy, peak):
    shares = DistributedConfig(strategy=strategy)
    assert sum(memory(traced(), HELD, shares, 8).values()) == peak
    assert sum(memory(traced(), HELD, shares, 1).values()) == 1440  # the control: one holds all


def test_what_is_sent():
    ddp, fsdp2 = DistributedConfig(), DistributedConfig(strategy="fsdp2")
    assert exchanged(HELD, ddp, 8, 3) == 2 * 80 * 7 / 8  # once a step
    assert exchanged(HELD, fsdp2, 8, 3) == 3 * (2 * 800 + 80) * 7 / 8  # in every forward
    assert exchanged(HELD, ddp, 1, 3) == 0


def test_time_is_the_longer_of_computing_and_launching():
    device = DEVICES["h200"]
    given = {"steps": 10, "samples": 80, "forwards": 2, "kernels": 1000, "exchanged": 0.0}
    slow = pace(1e15, 1e14, device, processes=1, **given)
    assert slow.seconds == pytest.approx(10)
    assert slow.samples_per_second == pytest.approx(8)
    assert pace(1e15, 1e14, device, processes=4, **given).seconds == pytest.approx(2.5)
    tiny_work = pace(1e9, 1e14, device, processes=1, **given)
    assert tiny_work.seconds == pytest.approx(10 * 2 * 1000 * 7e-6)
