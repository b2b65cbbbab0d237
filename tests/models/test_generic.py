"""Classes without a family: what is read from them equals what is known, or they are refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import generic_models
from generic_models import generic
from tiny_rows import asked, changed, encoder_of, lively, mixed_rows, picture, row, turn
from vlmtune.batching.collate import pack
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
from vlmtune.training.loss import label_logits
from vlmtune.tuning.parts import count_parts

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


def test_an_image_processor_without_pillow_is_said(folders, tmp_path):
    settings = '{"image_processor_type": "Cohere2VisionImageProcessor"}'
    folder = changed(folders("aya_vision"), tmp_path / "m", preprocessor_config_json=settings)
    with pytest.raises(ModelError, match=r"install that, and set model\.backend=torchvision"):
        generic(folder)


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
