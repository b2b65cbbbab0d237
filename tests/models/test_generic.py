"""Classes without a family: what is read from them equals what is known, or they are refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import generic_models
from tiny_rows import asked, encoder_of, lively, mixed_rows, picture, row, turn
from tiny_world import tiny_recipe
from vlmtune.batching.collate import pack
from vlmtune.batching.proof import packing_encoder, prove_packing
from vlmtune.data.conversation import Box
from vlmtune.data.media import ImagePolicy, Size
from vlmtune.errors import ImageError, ModelError, UsageError
from vlmtune.models.anatomy import dissect
from vlmtune.models.families import family_class, load_family
from vlmtune.models.folder import load_config
from vlmtune.models.generate import generate
from vlmtune.models.generic import GREY, Generic
from vlmtune.models.load import load_model
from vlmtune.testing import tiny
from vlmtune.training.config import TrainingConfig
from vlmtune.training.loss import label_logits
from vlmtune.training.prepare_rows import measure, plan_rows
from vlmtune.tuning.parts import count_parts
from vlmtune.verbs.evaluate import evaluate
from vlmtune.verbs.merge import merge
from vlmtune.verbs.train import train

POLICY = ImagePolicy()
ROWS = [
    asked("Which?", "The last.", picture((40, 60), seed=1), picture((150, 30), seed=2)),
    row(turn("user", "Hello?"), turn("assistant", "Yes."), name="plain"),
    *mixed_rows(4, seed=8),
]
TOLERANCE = 1e-5  # of the largest logit, fp32
slow = pytest.mark.slow
# GLM-4V's processor hands numpy a tensor in a way that numpy 2 wants otherwise.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def generic(folder):
    return Generic(Generic.load_parts(str(folder), load_config(str(folder)), "pil"))


@torch.no_grad()
def logits(model, encoder, rows):
    batch = pack(encoder.family, [encoder.encode(each) for each in rows])
    return label_logits(model, encoder.family, batch)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folder of a class's tiny model, made when it is first asked for."""
    place, made = tmp_path_factory.mktemp("generic"), {}

    def folder(name):
        if name not in made:
            made[name] = vars(generic_models)[name](place / name)
        return made[name]

    return folder


# Against families that are known


OTHER_LAYOUT = ("llava_next", "idefics3")  # whose families lay the tiles of all images flat


@pytest.mark.parametrize(
    "name",
    [
        "qwen2_vl",
        "gemma3",
        "llava",
        *(pytest.param(each, marks=slow) for each in ("qwen3_vl", "llava_next", "idefics3")),
        *(pytest.param(each, marks=slow) for each in ("qwen2_5_vl", "internvl")),
    ],
)
def test_it_equals_the_family_that_is_known(name, tmp_path):
    folder = tiny(name, tmp_path / "m", seed=3)
    known, found = encoder_of(folder, POLICY), encoder_of(generic(folder), POLICY)
    model = lively(folder)
    for conversation in ROWS:
        ours, theirs = found.encode(conversation), known.encode(conversation)
        np.testing.assert_array_equal(ours.tokens.ids, theirs.tokens.ids)
        np.testing.assert_array_equal(ours.tokens.labels, theirs.tokens.labels)
        np.testing.assert_array_equal(ours.tokens.image_mask, theirs.tokens.image_mask)
        for key, tensor in ours.vision.items() if name not in OTHER_LAYOUT else ():
            assert torch.equal(tensor, theirs.vision[key]), key
        mine, expected = (logits(model, each, [conversation]) for each in (found, known))
        assert (mine - expected).abs().max() <= TOLERANCE * expected.abs().max()
    facts, own = found.family.facts, known.family.facts
    assert (facts.image_token, facts.vision_tower) == (own.image_token, own.vision_tower)
    assert set(facts.language_model) == set(own.language_model)
    assert not facts.packs


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("idefics2", "for a question of an image and a text, input_ids"),
        ("llava_onevision", "pixel_values of two images"),
    ],
)
def test_what_it_cannot_see_is_refused(name, reason, tmp_path):
    """A word kept from sticking to an image; images that are shown smaller beside another."""
    folder = tiny(name, tmp_path / "m")
    with pytest.raises(ModelError, match=reason):
        generic(folder)


# Classes that have no family


@pytest.mark.parametrize("name", list(generic_models.CLASSES))
def test_every_parameter_belongs_to_a_part(folders, name):
    family = load_family(str(folders(name)))
    assert isinstance(family, Generic)
    model = load_model(folders(name), dtype=torch.float32, device=torch.device("cpu"))
    counts = count_parts(model, family.facts, trainable=False)
    assert counts["vision"] > 0
    assert counts["language"] > 0
    assert (counts["projector"] > 0) == (name != "glm4v")  # there it is a part of the tower
    assert {"q_proj", "down_proj"} <= set(family.facts.lora_targets)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("paligemma", "no chat template.*instruction-tuned"),
        ("mllama", "cross_attention_mask of two images"),
    ],
)
def test_what_rows_need_and_a_class_lacks_is_said(folders, name, reason):
    with pytest.raises(ModelError, match=reason):
        load_family(str(folders(name)))


def test_classes_that_cannot_be_trained_here_are_refused():
    from transformers import Blip2Config, Florence2Config

    with pytest.raises(ModelError, match="encoder and a decoder"):
        dissect(Florence2Config())
    with pytest.raises(ModelError, match="logits_to_keep"):
        dissect(Blip2Config())
    with pytest.raises(ModelError, match="'gpt2' is not supported"):
        family_class("gpt2")


def test_a_processor_that_needs_another_package_is_named(folders):
    folder = folders("aya_vision")
    parts = Generic.load_parts(str(folder), load_config(str(folder)), "pil")
    parts.processor["processor_class"] = "PixtralProcessor"
    with pytest.raises(ModelError, match="install that"):
        Generic(parts)
    parts.processor["processor_class"] = "NoSuchProcessor"
    with pytest.raises(ModelError, match="no processor 'NoSuchProcessor'"):
        Generic(parts)


def test_a_wrong_reading_of_the_processor_is_refused(folders, monkeypatch):
    """The control of the proof at the start: one placeholder too many is seen."""
    span = Generic.image_span
    monkeypatch.setattr(Generic, "image_span", lambda *args: (*span(*args), span(*args)[-1]))
    with pytest.raises(ModelError, match="input_ids would not be"):
        generic(folders("aya_vision"))


def test_options_that_nobody_knows_of_are_refused(folders):
    family = generic(folders("ovis2"))
    with pytest.raises(UsageError, match=r"image\.max_pixels.*no such choice"):
        family.settle(ImagePolicy(max_pixels=1000))


def test_spans_are_asked_for_once_a_size(folders, monkeypatch):
    family = generic(folders("ovis2"))
    count = family.visual_tokens(Size(91, 33), POLICY)
    monkeypatch.setattr(family._stock, "images", None)
    assert family.visual_tokens(Size(91, 33), POLICY) == count > 0


def test_an_image_that_the_processor_refuses_is_a_fault_of_the_row(folders):
    family = generic(folders("glm4v"))
    with pytest.raises(ImageError, match="refuses 4000 x 4"):
        family.visual_tokens(Size(4000, 4), POLICY)


def test_pixels_that_are_no_pictures_are_shown_grey(folders):
    encoder = encoder_of(generic(folders("glm4v")), POLICY)
    encoded = encoder.encode(ROWS[0])
    sizes = encoded.tokens.image_sizes
    shown = encoder.family.pictures(encoded.vision, sizes, POLICY)
    assert [(each.shape[1], each.shape[0]) for each in shown] == [tuple(size) for size in sizes]
    assert {int(value) for each in shown for value in np.unique(each)} == {GREY}


def test_boxes_are_json(folders):
    family = generic(folders("ovis2"))
    (piece,) = family.render_box(Box(0, "dog", (0.0, 10.0, 50.0, 20.0)), Size(100, 20), POLICY)
    assert piece.text == '{"bbox_2d": [0, 500, 500, 999], "label": "dog"}'


def test_a_question_at_a_time_where_batches_are_not_the_processors(tmp_path):
    """Rows of images become a dimension there: side by side they would be padded."""
    folder = tiny("idefics3", tmp_path / "m", seed=3)
    model, found = lively(folder), encoder_of(generic(folder), POLICY)
    assert not found.family.facts.batches
    answers = generate(model, found, ROWS[:3], max_new_tokens=4)
    known = generate(model, encoder_of(folder, POLICY), ROWS[:3], max_new_tokens=4)
    assert [answer.text for answer in answers] == [answer.text for answer in known]


# Packing


@pytest.mark.parametrize("name", ["aya_vision", pytest.param("ovis2", marks=slow)])
def test_a_model_that_keeps_rows_apart_proves_it(folders, name):
    model, encoder = lively(folders(name)), encoder_of(folders(name), POLICY)
    with pytest.raises(ModelError, match="cannot be packed"):
        logits(model, encoder, ROWS)
    packing = packing_encoder(model, encoder)
    assert packing.family.facts.packs
    assert packing.contract == encoder.contract
    alone = torch.cat([logits(model, encoder, [each]) for each in ROWS])
    packed = logits(model, packing, ROWS)
    assert (packed - alone).abs().max() <= TOLERANCE * alone.abs().max()


def test_positions_of_its_own_disprove_it(folders):
    model, encoder = lively(folders("glm4v")), encoder_of(folders("glm4v"), POLICY)
    proof = prove_packing(model, encoder, encoder.family.packing())
    assert (proof.packs, proof.reason[:22]) == (False, "packed logits differ b")
    assert packing_encoder(model, encoder) is encoder


@pytest.mark.parametrize(
    ("name", "packs"),
    [("gemma3", False), ("llava", True), pytest.param("qwen3_vl", False, marks=slow)],
)
def test_the_proof_says_what_is_known(name, packs, tmp_path):
    """Gemma 3's own masks are wrong in a pack, and M-RoPE needs more than one row of positions."""
    folder = tiny(name, tmp_path / "m", seed=3)
    model, encoder = lively(folder), encoder_of(generic(folder), POLICY)
    assert prove_packing(model, encoder, encoder.family.packing()).packs is packs


def test_layers_that_look_at_neighbours_disprove_it(tmp_path):
    """A language model that convolves over the tokens before: positions keep nothing apart."""
    layers = {"model_type": "lfm2", "layer_types": ["conv", "full_attention"], "conv_L_cache": 3}
    folder = generic_models.aya_vision(tmp_path / "m", text=layers)
    model, encoder = lively(folder), encoder_of(folder, POLICY)
    proof = prove_packing(model, encoder, encoder.family.packing())
    assert not proof.packs
    assert packing_encoder(model, encoder) is encoder


def test_a_model_that_shows_nothing_proves_nothing(folders):
    model, encoder = lively(folders("aya_vision")), encoder_of(folders("aya_vision"), POLICY)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "self_attn.o_proj" in name:
                parameter.zero_()
    proof = prove_packing(model, encoder, encoder.family.packing())
    assert (proof.packs, proof.reason) == (False, "pictures change nothing here")


def test_a_forward_that_fails_is_said_before_the_first_step(folders, monkeypatch):
    model, encoder = lively(folders("aya_vision")), encoder_of(folders("aya_vision"), POLICY)

    def forward(**_):
        raise IndexError("too many indices for tensor of dimension 2")

    monkeypatch.setattr(model, "forward", forward)
    with pytest.raises(ModelError, match=r"AyaVision.* cannot be trained here.*too many indices"):
        packing_encoder(model, encoder)


def test_families_that_are_known_have_nothing_to_prove(tmp_path):
    encoder = encoder_of(tiny("gemma3", tmp_path / "m"), POLICY)
    assert packing_encoder(None, encoder) is encoder


def test_unpacked_rows_are_planned_alone(folders):
    encoder = encoder_of(folders("aya_vision"), POLICY)
    measured = measure(ROWS, encoder, lambda *_: None)
    config = TrainingConfig(batch_size=len(ROWS), epochs=1)
    options = {"max_length": 4096, "too_long": "drop", "token_budget": 4096}
    plan, _ = plan_rows(ROWS, measured, config, **options)
    assert [len(pack) for pack in plan.step(1).packs] == [1] * len(ROWS)
    together, _ = plan_rows(ROWS, replace(measured, packs=True), config, **options)
    assert [len(pack) for pack in together.step(1).packs] == [len(ROWS)]


# A whole life


@slow
def test_a_class_that_nobody_knew_is_trained_merged_and_evaluated(folders, tiny_data, tmp_path):
    base = folders("aya_vision")
    recipe = tiny_recipe(base, tiny_data, image={}, training__max_steps=2)
    train(recipe, run_dir=tmp_path / "run")
    merged = merge(tmp_path / "run", tmp_path / "model", dtype="fp32", device="cpu")
    assert merged["changed"]["language"] > 0
    assert merged["max_logit_difference"] < 1e-4
    measured = evaluate(tmp_path / "model", data=tiny_data, out=tmp_path / "eval", limit=2)
    assert measured["samples"] == 2
