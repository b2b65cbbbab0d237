"""The base's own encoder, forward and optimizer agree with the ordinary ones."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image as Pillow

from vlmtune.batching.collate import pack
from vlmtune.data.conversation import Conversation, EncodedImage, Image, Message, Text
from vlmtune.data.media import ImagePolicy
from vlmtune.models.contract import make_contract
from vlmtune.models.encode import Encoder
from vlmtune.models.families import load_family
from vlmtune.models.load import BaseSource, load_model
from vlmtune.quickstart.base import cache, pretrain
from vlmtune.quickstart.base.cache import LARGE, LAST, read_shard, write_shard
from vlmtune.quickstart.base.export import export
from vlmtune.quickstart.base.model import BaseSize, batch_logits, build_model
from vlmtune.quickstart.base.rows import Collator, Rows
from vlmtune.quickstart.base.tokenizer import latex_pieces, spoken_words
from vlmtune.quickstart.shapes import SHAPES
from vlmtune.training.loss import label_logits

SMALL = BaseSize(hidden=64, layers=2, intermediate=96, vision_width=64, vision_layers=2)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "ROWS", 40)
        for number in (0, 1, LARGE, LAST):
            write_shard(folder, number, split="pretraining", seed=1)
        for number in (0, LARGE, LAST):
            write_shard(folder, number, split="held_out", seed=1)
    return folder


@pytest.fixture
def small_run(shards, monkeypatch):
    """Options of a pretraining that takes seconds."""
    monkeypatch.setattr(pretrain, "BaseSize", lambda: SMALL)
    monkeypatch.setattr(pretrain, "HELD_OUT", 8)
    monkeypatch.setattr(pretrain, "SHARDS", 1)
    return ["--cache", str(shards), "--shards", "1"]


@pytest.fixture
def rows(shards):
    rows = Rows(3, (0.4, 0.2, 0.2, 0.2))
    rows.use([0], lambda number: read_shard(shards / f"pretraining-{number:05d}.npz"))
    return rows.step(1, 12, 0.0)


def conversation(row):
    file = io.BytesIO()
    Pillow.fromarray(row.page).save(file, "PNG")
    turns = (
        Message("user", (Image(0), Text(row.prompt))),
        Message("assistant", (Text(row.answer),)),
    )
    return Conversation("row", turns, (EncodedImage(file.getvalue()),))


@torch.no_grad()
def test_it_is_trained_on_what_the_ordinary_path_shows_it(tmp_path, tokenizer, rows):
    model = build_model(SMALL, tokenizer, seed=0)
    for weight in model.parameters():
        weight.mul_(1.5)  # attention that is not all but uniform
    folder = export(model, tokenizer, tmp_path / "base")
    family = load_family(str(folder), "pil")
    identity = BaseSource(folder=folder, id="base").identity()
    encoder = Encoder(family, make_contract(family, identity, ImagePolicy()))
    stock = load_model(folder, dtype=torch.float32, device=torch.device("cpu"))
    collator = Collator(tokenizer)
    for row in rows:
        encoded, batch = encoder.encode(conversation(row)), collator.batch([row])
        count = len(encoded.tokens) - 1  # the template's last newline, on which nothing is trained
        assert batch.ids[0, :count].tolist() == encoded.tokens.ids[:-1].tolist()
        assert torch.equal(batch.positions[:, 0, :count], encoded.positions[1:, :-1])
        reference = label_logits(stock, family, pack(family, [encoded]))
        logits = batch_logits(model, batch)
        assert torch.allclose(logits, reference, atol=2e-5)
        shifted = label_logits(stock, family, pack(family, [encoder.encode(conversation(rows[0]))]))
        if len(shifted) == len(logits) and row is not rows[0]:
            assert not torch.allclose(logits, shifted, atol=2e-5)


@torch.no_grad()
def test_padding_changes_nothing(tokenizer, rows):
    model, collator = build_model(SMALL, tokenizer, seed=0), Collator(tokenizer)
    together = batch_logits(model, collator.batch(rows))
    alone = torch.cat([batch_logits(model, collator.batch([row])) for row in rows])
    assert torch.allclose(together, alone, atol=2e-5)
    unmasked = collator.batch(rows)
    seen = unmasked.seen.clone()
    unmasked.seen[:, 4:8] = True
    unmasked.patches[~seen] = 200
    unmasked.seen[~seen] = False
    assert torch.allclose(batch_logits(model, unmasked), together, atol=2e-5)


def test_every_piece_of_latex_and_every_word_is_one_token(tokenizer):
    def count(text):
        return len(tokenizer.encode(text, add_special_tokens=False))

    pieces = [piece for piece in latex_pieces() if not piece.startswith((r"\left", r"\right"))]
    for word in (*pieces, *spoken_words()):
        assert count(word) == 1
        assert count(f" {word}") == 1
    text = r"\frac { a _ { 1 } } { \left( b \right) } 目标 🐎"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_no_answer_is_latex_and_no_formula_is_held_out(shards):
    seen = [read_shard(shards / f"pretraining-{number:05d}.npz") for number in range(2)]
    held_out = read_shard(shards / "held_out-00000.npz")
    formulas = {formula for shard in seen for formula in shard.latex}
    assert not formulas & set(held_out.latex)
    assert "\\" in "".join(formulas)
    assert "\\" not in "".join(words for shard in (*seen, held_out) for words in shard.said)


def test_later_shards_have_larger_letters(shards):
    def height(number):
        return read_shard(shards / f"pretraining-{number:05d}.npz").shapes[:, 0].mean()

    assert height(LARGE) > 1.1 * height(0)
    assert abs(height(1) - height(0)) < 0.1 * height(0)


def test_which_shards_a_step_reads():
    assert pretrain.shards_of(0, 31) == range(2)
    assert pretrain.shards_of(pretrain.LARGE_FROM - 1, 31) == range(31)
    large = pretrain.shards_of(pretrain.LARGE_FROM, 31)
    assert (large[0], len(large)) == (LARGE, pretrain.LARGE_SHARDS[0])
    assert len(pretrain.shards_of(10**6, 31)) == pretrain.LARGE_SHARDS[1]
    last = pretrain.shards_of(10**6, 31, last=True)
    assert (last[0], min(last), len(last)) == (LAST, LARGE, sum(pretrain.LAST_SHARDS[-1][1]))


def test_shapes_are_asked_for_by_name():
    def answers(asks):
        rows = Rows(3, (0, 0, 0, 1))
        rows.asks = asks
        return {row.prompt: row.answer for row in rows.step(1, 60, 0.0)}

    asked = {prompt: said for prompt, said in answers(0.5).items() if said[:5] == "left:"}
    assert asked
    assert all(any(f"the {kind} " in prompt for kind in SHAPES) for prompt in asked)
    assert not [said for said in answers(0.0).values() if said[:5] == "left:"]


def test_the_longer_formulas_come(shards):
    def words(longer):
        rows = Rows(3, (1, 0, 0, 0))
        rows.longer = longer
        rows.use([0], lambda number: read_shard(shards / f"pretraining-{number:05d}.npz"))
        return sum(len(row.answer.split()) for row in rows.step(1, 60, 0.0))

    assert words(longer=True) > 1.2 * words(longer=False)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, small_run, monkeypatch):
    monkeypatch.setattr(pretrain, "ROWS", ((1, 8),))
    monkeypatch.setattr(pretrain, "LARGE_FROM", 3)
    monkeypatch.setattr(pretrain, "WARMUP", 2)

    def weights(folder, *options):
        pretrain.main([str(tmp_path / folder), *small_run, *options])
        state = torch.load(tmp_path / folder / "state.pt", weights_only=True)
        return state["masters"]["weights"]

    whole = weights("whole", "--steps", "4")
    weights("parts", "--steps", "2")
    parts = weights("parts", "--steps", "4", "--resume")
    other = weights("other", "--steps", "4", "--seed", "2")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert not all(torch.equal(whole[name], other[name]) for name in whole)
    decay = ["--start", str(tmp_path / "whole" / "state.pt"), "--decay-steps", "2"]
    decayed = weights("decayed", *decay)
    assert not all(torch.equal(whole[name], decayed[name]) for name in whole)
    weights("broken_off", *decay, "--steps", "5")
    for folder, rate in (("decayed", 0.0), ("broken_off", 0.5)):
        lines = (tmp_path / folder / "log.jsonl").read_text().splitlines()
        assert json.loads(lines[-1])["rate"] == rate


def test_a_run_goes_on_from_an_exported_base(tmp_path, small_run, monkeypatch):
    monkeypatch.setattr(pretrain, "ROWS", ((1, 8), (2, 16)))
    monkeypatch.setattr(pretrain, "WARMUP", 4)

    def run(folder, *options):
        pretrain.main([str(tmp_path / folder), *small_run, *options])
        state = torch.load(tmp_path / folder / "state.pt", weights_only=True)
        log = json.loads((tmp_path / folder / "log.jsonl").read_text().splitlines()[-1])
        return state["masters"]["weights"], log

    exported, _ = run("first", "--steps", "2")
    start = ["--start", str(tmp_path / "first" / "base"), "--after", "2", "--hours", "1"]
    unmoved, log = run("unmoved", *start, "--steps", "2")
    assert all(torch.equal(exported[name].bfloat16().float(), unmoved[name]) for name in exported)
    assert (log["step"], log["rows"], log["seconds"], log["rate"]) == (2, 24, 3600, 0.0)
    whole, log = run("whole", *start, "--steps", "4", "--decay-steps", "4")
    assert (log["rows"], log["rate"]) == (56, 0.5 * 0.5)
    run("parts", *start, "--steps", "3", "--decay-steps", "4")
    parts, _ = run("parts", *start, "--steps", "4", "--decay-steps", "4", "--resume")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert not all(torch.equal(whole[name], unmoved[name]) for name in whole)


@pytest.mark.parametrize(
    "options",
    [("--start", "FOLDER", "--hours", "1"), ("--start", "FOLDER", "--after", "2"), ("--hours", "1"),
     ("--start", "FOLDER/state.pt", "--after", "2", "--hours", "1")],
)  # fmt: skip
def test_what_an_exported_base_does_not_tell_must_be_said(tmp_path, small_run, options, capsys):
    """The schedules of rows and rates would begin anew without a word."""
    options = [part.replace("FOLDER", str(tmp_path)) for part in options]
    with pytest.raises(SystemExit):
        pretrain.main([str(tmp_path / "out"), *small_run, *options, "--steps", "0"])
    assert "--after and --hours go with --start base/" in capsys.readouterr().err


def test_pages_are_whole_tokens(rows):
    for row in rows:
        assert row.page.dtype == np.uint8
        assert row.page.shape[0] % 28 == 0
        assert row.page.shape[1] % 28 == 0
