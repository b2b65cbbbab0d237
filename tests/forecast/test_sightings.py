"""Images that are looked at once count once, as a run then does it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vlmtune.errors import RecipeError
from vlmtune.forecast.devices import DEVICES
from vlmtune.forecast.work import PROJECTOR, VISION, VISION_ATTENTION
from vlmtune.training.looking import GB
from vlmtune.verbs import plan as verb
from vlmtune.verbs import train as train_module
from vlmtune.verbs.plan import plan

SEEING = (VISION, PROJECTOR, VISION_ATTENTION)
EPOCHS = {"training__batch_size": 24, "training__max_steps": 4}  # of 24 rows


@pytest.fixture(scope="module", autouse=True)
def device():
    """One without a GPU, that need not be measured."""
    cpu = replace(DEVICES["t4"], gpu=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verb, "device_named", lambda name: DEVICES.get(name, cpu))
        yield


@pytest.fixture(scope="module")
def four(make_recipe, device):  # noqa: ARG001
    """A forecast over four epochs, with options."""
    return lambda **options: plan(make_recipe(**EPOCHS, **options))


@pytest.fixture(scope="module")
def once(four):
    return four()


@pytest.fixture(scope="module")
def off(four):
    """The control: each image in every epoch."""
    return four(training__vision_cache="off")


def test_the_tower_counts_each_image_once(once, off):
    assert once["vision_cache"] == {
        "once": True,
        "why_not": None,
        "feature_bytes": once["vision_cache"]["feature_bytes"],
        "images": 24,
        "sightings": 96,
    }
    told = {"once": False, "why_not": "training.vision_cache is off", "feature_bytes": 0}
    assert off["vision_cache"] == told
    for part, work in off["flops_by_part"].items():
        share = 1 / 4 if part in SEEING else 1
        assert once["flops_by_part"][part] == pytest.approx(share * work, rel=1e-9), part
    assert all(off["flops_by_part"][part] > 0 for part in SEEING)
    assert once["flops"] < off["flops"]
    faster = once["flops"] / off["flops"]
    assert once["seconds"] == pytest.approx(faster * off["seconds"])


def test_features_are_held_where_the_step_is(once, off, make_recipe, monkeypatch, tmp_path):
    kept = once["vision_cache"]["feature_bytes"]
    assert once["memory"]["image features"] == kept
    assert sum(once["memory"].values()) == once["peak_memory_bytes"]
    # What the forward holds of the tower's last look is gone.
    unseen = off["peak_memory_bytes"] - off["memory"]["vision"]
    assert once["peak_memory_bytes"] - kept == pytest.approx(unseen, rel=0.05)
    assert once["peak_memory_bytes"] < off["peak_memory_bytes"]
    stores = []

    def stop(_recipe, _base, encoder, *_):
        stores.append(encoder.cache.store)
        raise KeyboardInterrupt

    monkeypatch.setattr(train_module, "decide", stop)
    with pytest.raises(KeyboardInterrupt):
        train_module.train(make_recipe(**EPOCHS), run_dir=tmp_path / "run")
    assert [store.bytes for store in stores] == [kept]


@pytest.mark.slow
def test_or_elsewhere(once, four, make_recipe):
    kept = once["vision_cache"]["feature_bytes"]
    for told in (four(training__vision_cache="disk"), plan(make_recipe(**EPOCHS), device="t4")):
        assert told["vision_cache"]["feature_bytes"] == kept
        assert told["vision_cache"]["once"]
        assert "image features" not in told["memory"]
        assert told["flops_by_part"][VISION] == once["flops_by_part"][VISION]


@pytest.mark.slow
def test_where_a_run_looks_every_time_so_does_the_forecast(four, make_recipe):
    moving = {"tuning": {"rank": 4, "targets": "all-linear", "train": ["vision", "language"]}}
    assert "the vision part trains" in four(**moving)["vision_cache"]["why_not"]
    with pytest.raises(RecipeError, match=r"training\.vision_cache: found memory, and the vision"):
        four(**moving, training__vision_cache="memory")
    small = four(training__vision_cache_gb=1000 / GB)
    assert "training.vision_cache_gb is 1e-06" in small["vision_cache"]["why_not"]
    assert small["vision_cache"]["feature_bytes"] == 0
    several = plan(make_recipe(**EPOCHS), device="t4", devices=2)
    assert "several processes" in several["vision_cache"]["why_not"]
    seldom = plan(make_recipe(training__max_steps=4))  # 20 of 24 rows
    assert "hardly any is seen twice" in seldom["vision_cache"]["why_not"]
    # Validation rows are asked twice then, and kept; what trains is looked at as it comes.
    asking = {"before": True, "after": True, "probe": 0}
    some = plan(make_recipe(training__max_steps=4, evaluation=asking))["vision_cache"]
    assert not some["once"]
    assert some["feature_bytes"] > 0
