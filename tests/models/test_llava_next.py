"""LLaVA-NeXT and LLaVA-OneVision: tiles, padding taken out, tokens from the size alone."""

from __future__ import annotations

import io
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image as Pictures

from families.references import REFERENCES
from tiny_rows import as_chat, encoder_of, lively, mixed_rows, picture
from vlmtune.data.media import ImagePolicy, Size
from vlmtune.errors import ModelError, UsageError
from vlmtune.models.llava_onevision import LlavaOnevision
from vlmtune.testing import tiny

OWN = ImagePolicy()
sizes = st.builds(Size, st.integers(1, 6000), st.integers(1, 6000)).filter(
    lambda size: max(size) <= 200 * min(size)
)
# Threads; and sizes where a product of floats is a hair below a whole number of features.
ROUNDED = [(1, 1), (200, 1), (1, 200), (47, 1128), (110, 176), (376, 799)]
# As the models on the hubs have them: LLaVA-v1.6-Mistral-7B and LLaVA-OneVision-7B.
NEXT_GRIDS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
ONEVISION_GRIDS = [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)]


@pytest.fixture(scope="module", params=["llava_next", "llava_onevision"])
def name(request):
    return request.param


@pytest.fixture(scope="module")
def folder(name, tmp_path_factory):
    return tiny(name, tmp_path_factory.mktemp("models") / name, seed=3)


@pytest.fixture(scope="module")
def encoder(folder):
    return encoder_of(folder, OWN)


@pytest.fixture(scope="module")
def family(encoder):
    return encoder.family


def drawn(size, seed=0):
    return Pictures.open(io.BytesIO(picture(size, seed=seed).data)).convert("RGB")


@cache
def of_real_size(family):
    """The family, and its processor, with the grids and sides of the real models."""
    from transformers import LlavaNextConfig, LlavaOnevisionConfig

    onevision = isinstance(family, LlavaOnevision)
    grids, side = (ONEVISION_GRIDS, 384) if onevision else (NEXT_GRIDS, 336)
    kind = LlavaOnevisionConfig if onevision else LlavaNextConfig
    tower = "siglip_vision_model" if onevision else "clip_vision_model"
    config = kind(
        vision_config={"model_type": tower, "image_size": side, "patch_size": 14},
        image_grid_pinpoints=grids,
    )
    processor = type(family.parts.image_processor)(
        **{
            **family.parts.vision,
            "image_grid_pinpoints": grids,
            "size": {"height": side, "width": side} if onevision else {"shortest_edge": side},
            "crop_size": None if onevision else {"height": side, "width": side},
        }
    )
    return type(family)(
        replace(family.parts, config=config, image_processor=processor, vision=processor.to_dict())
    )


def counted(family, size):
    """Tokens of an image, as the family's own processor counts them."""
    from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor
    from transformers.models.llava_onevision.processing_llava_onevision import (
        LlavaOnevisionProcessor,
    )

    onevision = isinstance(family, LlavaOnevision)
    kind = LlavaOnevisionProcessor if onevision else LlavaNextProcessor
    processor = kind.__new__(kind)
    processor.image_processor = family.parts.image_processor
    processor.patch_size, processor.num_image_tokens = 14, 27 * 27
    processor.num_additional_image_tokens = 1
    processor.vision_aspect_ratio = "anyres_max_9"
    side = 384 if onevision else 336
    return processor._get_number_of_features(size.height, size.width, side, side) - (not onevision)


# Tiles and tokens


def with_examples(test):
    for size in ROUNDED:
        test = example(size=Size(*size))(test)
    return test


@with_examples
@settings(max_examples=100)
@given(size=sizes)
def test_real_tokens_are_those_that_the_processor_counts(family, size):
    real = of_real_size(family)
    assert real.visual_tokens(size, OWN) == counted(real, size)


def test_known_counts(family):
    """By hand: 336-pixel tiles have 24 patches a side, 384-pixel ones 27."""
    real = of_real_size(family)
    if isinstance(family, LlavaOnevision):
        # 2 x 2 tiles of 27 patches, nothing padded: 54 rows of 54 and one more each.
        assert real.visual_tokens(Size(768, 768), OWN) == 729 + 54 * 55
        # 6 x 6 tiles are thinned out to those of 9: 81 rows of 81.
        assert real.visual_tokens(Size(3000, 3000), OWN) == 729 + 81 * 82
        assert real.visual_tokens(Size(1, 1), replaced_split(False)) == 729 + 1
    else:
        assert real.visual_tokens(Size(672, 672), OWN) == 576 + 48 * 49
        # Twice as wide as high, in 2 x 2 tiles or beside each other: 24 rows of 48.
        assert real.visual_tokens(Size(2000, 1000), OWN) == 576 + 24 * 49


def replaced_split(split):
    return OWN.model_copy(update={"split": split})


def test_tokens_are_those_of_the_model(encoder, folder):
    """The reference is the model itself: what comes out of its tower, for many sizes."""
    model, family = lively(folder), encoder.family
    several = family.row_policy(OWN, 2)
    for number in range(20):
        size = Size(2 + 37 * number % 190, 3 + 53 * number % 210)
        vision = family.image_inputs([drawn(size, seed=number)], OWN)
        with torch.no_grad():
            features = model.get_image_features(**vision).pooler_output
        assert [len(each) for each in features] == [family.visual_tokens(size, OWN)]
    pair = family.image_inputs([drawn((60, 30)), drawn((30, 90))], OWN)
    with torch.no_grad():
        features = model.get_image_features(**pair).pooler_output
    assert [len(each) for each in features] == [
        family.visual_tokens(size, several) for size in (Size(60, 30), Size(30, 90))
    ]


def test_views_are_not_padded_to_the_most(family):
    """Of a picture of one tile and a picture of many only the views that are there are kept."""
    small, large = drawn((56, 28)), drawn((140, 140))
    alone = [len(family.image_inputs([image], OWN)["pixel_values"]) for image in (small, large)]
    joined = family.join_vision([family.image_inputs([image], OWN) for image in (small, large)])
    assert len(joined["pixel_values"]) == sum(alone)
    assert alone[0] < alone[1]


def test_there_are_no_options(family):
    """The model counts tiles from its own configuration: another limit would not be the model's."""
    for policy in (ImagePolicy(max_tiles=2), ImagePolicy(split=False), ImagePolicy(max_pixels=99)):
        with pytest.raises(UsageError, match="has no such choice: it sees every image"):
            family.settle(policy)


def test_grids_that_differ_are_refused(family):
    parts = family.parts
    vision = {**parts.vision, "image_grid_pinpoints": parts.vision["image_grid_pinpoints"][:-1]}
    with pytest.raises(ModelError, match=r"image_grid_pinpoints .* differ"):
        type(family)(replace(parts, vision=vision))


@pytest.mark.parametrize("size", [(64, 48), (56, 56), (3, 5), (140, 31), (31, 140), (200, 1)])
def test_pictures_come_back_without_padding(family, size):
    vision = family.image_inputs([Pictures.new("RGB", size, "#c8c8c8")], OWN)
    (seen,) = family.pictures(vision, [Size(*size)], OWN)
    assert (seen == 200).all()
    resized = family.resized(Size(*size), OWN)
    assert seen.shape == (resized.height, resized.width, 3)


# Templates


def test_the_real_template_of_llava_next(shared_data, tmp_path):
    path = shared_data / "model_meta" / "trl_chat_templates" / "llava_next.jinja"
    folder = tiny("llava_next", tmp_path / "model")
    (folder / "chat_template.jinja").write_bytes(path.read_bytes())
    encoder, reference = encoder_of(folder, OWN), REFERENCES["llava_next"](folder)
    for conversation in mixed_rows(4, seed=9):
        theirs = reference.apply_chat_template(
            as_chat(conversation), tokenize=True, return_dict=True, return_tensors="pt"
        )
        ids = encoder.tokens(conversation).ids
        np.testing.assert_array_equal(ids, theirs["input_ids"][0].numpy())
    assert not encoder.adds_end
