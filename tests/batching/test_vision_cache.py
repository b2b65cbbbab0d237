"""Each image goes through the tower once, and nothing that is not whole or not its own is used."""

from __future__ import annotations

import logging
import os
from dataclasses import replace

import pytest
import torch

from tiny_rows import SMALL, asked, encoder_of, lively, mixed_rows, picture
from vlmtune.batching import vision_cache
from vlmtune.batching.feature_store import DiskStore, MemoryStore
from vlmtune.batching.vision_cache import CachingEncoder, VisionCache, identity_of
from vlmtune.models import encode
from vlmtune.models.features import FEATURES, vision_digest
from vlmtune.testing import tiny

RED, BLUE = picture(colour="red"), picture(colour="blue")
ROWS = [asked("?", "red", RED), asked("Which?", "both", BLUE, RED), asked("Hm?", "none")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny("qwen2_vl", tmp_path_factory.mktemp("tiny") / "base", seed=2)


@pytest.fixture(scope="module")
def encoder(folder):
    return encoder_of(folder)


@pytest.fixture(scope="module")
def model(folder):
    return lively(folder)


@pytest.fixture
def looks(model, monkeypatch):
    """Grids of every call of the vision tower."""
    seen = []
    forward = type(model.model.visual).forward

    def counted(self, hidden_states, grid_thw, **arguments):
        seen.append(grid_thw.tolist())
        return forward(self, hidden_states, grid_thw, **arguments)

    monkeypatch.setattr(type(model.model.visual), "forward", counted)
    return seen


def features(value, count=3, dtype=torch.float32):
    return {FEATURES: torch.full((count, 4), value, dtype=dtype)}


# Stores


def test_memory_keeps_what_was_used_last():
    store = MemoryStore(2 * 48)
    for key in "ab":
        store.put(key, features(1.0))
    assert store.get("a") is not None  # now "b" is the one that was used least recently
    store.put("c", features(3.0))
    assert [key in store for key in "abc"] == [True, False, True]
    assert (store.bytes, len(store)) == (96, 2)
    store.put("large", features(1.0, count=9))
    assert "large" not in store
    assert "a" in store


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_disk_gives_back_the_bits(tmp_path, dtype):
    found = {FEATURES: torch.randn(5, 4).to(dtype), "level": torch.randn(5, 4).to(dtype)}
    DiskStore(tmp_path, 10**6).put("ab", found)
    again = DiskStore(tmp_path, 10**6).get("ab")
    assert again is not None
    assert {name: torch.equal(again[name], found[name]) for name in found} == dict.fromkeys(
        found, True
    )


@pytest.mark.parametrize("place", [0, 33, 41, -1])
def test_a_flipped_bit_is_found(tmp_path, place, caplog):
    """In the seal, in the header's length, in the header, in the numbers."""
    DiskStore(tmp_path, 10**6).put("ab", features(1.0))
    (path,) = tmp_path.glob("??/*")
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    store = DiskStore(tmp_path, 10**6)
    with caplog.at_level(logging.WARNING):
        assert store.get("ab") is None
    assert "is not what was written" in caplog.text
    assert (store.faults, "ab" in store, path.exists(), store.bytes) == (1, False, False, 0)
    store.put("ab", features(1.0))
    assert store.get("ab") is not None


@pytest.mark.parametrize("length", [0, 20, 60])
def test_a_torn_file_is_found(tmp_path, length):
    DiskStore(tmp_path, 10**6).put("ab", features(1.0))
    (path,) = tmp_path.glob("??/*")
    path.write_bytes(path.read_bytes()[:length])
    assert DiskStore(tmp_path, 10**6).get("ab") is None


def test_a_file_under_anothers_name_is_found(tmp_path):
    """Whole, sealed, and of another image."""
    store = DiskStore(tmp_path, 10**6)
    for key, value in (("ab1", 1.0), ("ab2", 2.0)):
        store.put(key, features(value))
    folder = tmp_path / "ab"
    (folder / "ab1.features").replace(folder / "ab2.features")
    assert store.get("ab2") is None


def test_the_disk_is_bounded_over_runs(tmp_path):
    first = DiskStore(tmp_path, 10**6)
    for number, key in enumerate(("aa", "bb", "cc")):
        first.put(key, features(float(number)))
        path = tmp_path / key / f"{key}.features"
        os.utime(path, ns=(number, number))
    size = path.stat().st_size
    second = DiskStore(tmp_path, 3 * size)
    assert second.get("aa") is not None  # used now: "bb" goes first
    second.put("dd", features(4.0))
    kept = {path.stem for path in tmp_path.glob("??/*.features")}
    assert kept == {"aa", "cc", "dd"}
    assert second.bytes == 3 * size
    third = DiskStore(tmp_path, 3 * size)  # what was used is remembered by the files' times
    third.put("ee", features(5.0))
    assert {path.stem for path in tmp_path.glob("??/*.features")} == {"aa", "dd", "ee"}


def test_a_disk_that_takes_nothing_costs_only_time(tmp_path, caplog):
    store = DiskStore(tmp_path, 10**6)
    (tmp_path / "ab").write_text("a file where a folder should be", encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        store.put("ab", features(1.0))
    assert "cannot be written" in caplog.text
    assert store.get("ab") is None
    assert not list(tmp_path.glob("*.tmp"))


# Keys


def test_a_key_is_of_everything_that_decides_the_features(model, encoder, folder):
    def key(encoder=encoder, image=RED, images=1, compute=torch.float32, model=model):
        identity = identity_of(model, encoder.family.facts, encoder.contract, compute)
        return VisionCache(encoder, MemoryStore(0), identity).key(image, images)

    assert key() == key()
    assert key(image=replace(RED, path="elsewhere.png")) == key()
    trained = lively(folder)
    trained.lm_head.weight.data.add_(1)
    assert key(model=trained) == key()  # the language model is not asked
    trained.model.visual.merger.mlp[0].bias.data[3].add_(1e-6)
    others = [
        key(image=BLUE),
        key(encoder=encoder_of(folder, SMALL.model_copy(update={"max_pixels": 6272}))),
        key(compute=torch.bfloat16),
        key(model=trained),
    ]
    assert len({key(), *others}) == 5


def test_the_digest_is_of_every_weight_of_the_tower(folder, encoder):
    facts = encoder.family.facts
    model = lively(folder)
    seen = {vision_digest(model, facts)}
    tower = [name for name, _ in model.named_parameters() if ".visual." in f".{name}"]
    for name in tower[:3] + tower[-3:]:
        parameter = model.get_parameter(name)
        parameter.data.view(-1)[-1] += 1
        seen.add(vision_digest(model, facts))
    assert len(seen) == 7


# Looking


def cache_of(encoder, store=None):
    return VisionCache(encoder, MemoryStore(10**8) if store is None else store, "test")


def test_each_image_is_looked_at_once(model, encoder, looks):
    cache = cache_of(encoder)
    told = []
    assert cache.fill(model, ROWS, progress=told.append) == 2
    assert told == [1, 2]
    assert len(looks) == 2  # the second row is looked at as a whole
    assert cache.fill(model, ROWS, workers=2) == 0
    assert len(looks) == 2


def test_features_do_not_depend_on_neighbours(model, encoder):
    """Alone, after others, with threads: the same bits. In groups: the same to rounding."""
    rows = [asked("?", "x", picture((60 + 9 * n, 50), seed=n)) for n in range(6)]
    caches = [cache_of(encoder) for _ in range(4)]
    for row in rows:
        caches[0].fill(model, [row])
    caches[1].fill(model, rows[::-1])
    caches[2].fill(model, rows, workers=3)
    caches[3].fill(model, rows, group_tokens=10)
    for row in rows:
        first, *others, grouped = (cache.find(row)[FEATURES] for cache in caches)
        assert all(torch.equal(first, other) for other in others)
        torch.testing.assert_close(grouped, first, rtol=1e-5, atol=1e-5 * float(first.abs().max()))


def test_groups_are_looked_at_together(model, encoder, looks):
    rows = [asked("?", "x", picture((60 + 9 * n, 50), seed=n)) for n in range(6)]
    cache = cache_of(encoder)
    assert cache.fill(model, rows, group_tokens=10**6) == 6
    assert [len(grids) for grids in looks] == [6]


def test_what_is_known_is_not_decoded(model, encoder, monkeypatch):
    cache = cache_of(encoder)
    cache.fill(model, ROWS)
    caching = CachingEncoder(cache)
    live = encoder.encode_together(ROWS)
    looked_at = []

    def refused(*arguments):
        looked_at.append(arguments)
        raise AssertionError("decoded")

    monkeypatch.setattr(encode, "open_image", refused)
    monkeypatch.setattr(vision_cache, "open_image", refused)
    known = caching.encode_together(ROWS)
    for ours, theirs in zip(known, live, strict=True):
        assert ours.tokens.ids.tolist() == theirs.tokens.ids.tolist()
        assert ours.tokens.labels.tolist() == theirs.tokens.labels.tolist()
        assert torch.equal(ours.positions, theirs.positions)
        assert set(ours.vision) <= {FEATURES}
        assert sum(map(len, ours.vision.values())) == theirs.tokens.visual
    changed = replace(RED, data=RED.data[:-9] + bytes([RED.data[-9] ^ 1]) + RED.data[-8:])
    with pytest.raises(AssertionError, match="decoded"):  # other bytes are another image
        caching.encode_together([asked("?", "red", changed)])
    with pytest.raises(AssertionError, match="decoded"):  # no pixels beside features
        caching.encode_together([*ROWS, asked("?", "new", picture(colour="green"))])


def test_a_row_of_which_an_image_went_is_looked_at(model, encoder):
    cache = cache_of(encoder)
    cache.fill(model, ROWS)
    cache.store._drop(cache.key(BLUE, 2))
    first, second, _ = CachingEncoder(cache).encode_together(ROWS)
    assert "pixel_values" in first.vision
    assert "pixel_values" in second.vision


def test_a_corrupt_file_is_made_anew_by_the_next_run(model, encoder, tmp_path):
    cache_of(encoder, DiskStore(tmp_path, 10**8)).fill(model, ROWS)
    (path, *_) = sorted(tmp_path.glob("??/*.features"))
    before = path.read_bytes()
    path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    store = DiskStore(tmp_path, 10**8)
    assert cache_of(encoder, store).fill(model, ROWS) == 1
    assert store.faults == 1
    assert path.read_bytes() == before


def test_a_forecast_counts(encoder):
    cache = cache_of(encoder)
    forecast = cache.forecast(ROWS, times=2)
    tokens = encoder.tokens(ROWS[1]).visual
    assert (forecast.sightings, forecast.images, forecast.tokens) == (6, 2, tokens)
    assert forecast.pays
    once = cache.forecast([ROWS[0], ROWS[2]], times=1)
    assert (once.sightings, once.images, once.pays) == (1, 1, False)
    assert cache.forecast([ROWS[0], ROWS[0]], times=1).pays
    many = [asked("?", "x", picture((40, 40), seed=n)) for n in range(20)]
    assert not cache.forecast([*many, many[0]], times=1).pays  # one of 21 is not worth it


def test_rows_of_every_kind(model, encoder):
    rows = mixed_rows(8, seed=5)
    cache = cache_of(encoder)
    cache.fill(model, rows)
    for row, encoded in zip(rows, CachingEncoder(cache).encode_together(rows), strict=True):
        assert sum(map(len, encoded.vision.values())) == encoder.tokens(row).visual
