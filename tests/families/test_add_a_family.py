"""The page on adding a family: its example is a family that passes what every family passes."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest
import torch

import generic_models
from families import test_contracts as contracts
from families import test_encoding as encoding
from families import test_forwards as forwards
from families.references import automatic
from tiny_rows import encoder_of, lively
from vlmtune.data.media import ImagePolicy, Size
from vlmtune.models.contract import Contract, verify_contract
from vlmtune.models.encode import Encoder
from vlmtune.models.families import FAMILIES
from vlmtune.models.family import Family
from vlmtune.models.folder import load_config
from vlmtune.models.load import load_model
from vlmtune.models.save import save_model
from vlmtune.tuning.parts import count_parts

PAGE = Path(__file__).parents[2] / "docs" / "add-a-family.md"
LONGEST = 80  # lines: a family is mostly facts


def block() -> str:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[0]


@pytest.fixture(scope="module")
def example():
    """The class that the page's code makes."""
    module = types.ModuleType("the_example")
    sys.modules[module.__name__] = module
    exec(compile(block(), str(PAGE), "exec"), vars(module))
    (family,) = (
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Family) and value is not Family
    )
    return family


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return generic_models.ovis2(tmp_path_factory.mktemp("example") / "m")


@pytest.fixture(scope="module")
def bind(example):
    """The family bound to a folder."""

    def bound(folder):
        return example(example.load_parts(str(folder), load_config(str(folder)), "pil"))

    return bound


@pytest.fixture(scope="module")
def encoder(bind, folder):
    return encoder_of(bind(folder), ImagePolicy())


@pytest.fixture(scope="module")
def reference(folder):
    return automatic(folder)


@pytest.fixture(scope="module")
def model(folder):
    return lively(folder)


def test_it_is_short_and_does_not_ship(example):
    assert block().count("\n") < LONGEST
    shipped = {kind for family in FAMILIES for kind in family.facts.model_types}
    assert not set(example.facts.model_types) & shipped


def test_every_parameter_belongs_to_a_part(example, model):
    assert all(count_parts(model, example.facts, trainable=False).values())


def test_ids_pixels_and_labels(encoder, reference):
    for conversation in encoding.ROWS:
        encoding.test_a_row_is_what_the_processor_makes_of_it(encoder, reference, conversation)
        encoding.test_labels_spell_the_answers_and_their_ends(encoder, conversation)
        encoding.test_asking_is_the_beginning_of_training(encoder, conversation)
    encoding.test_a_question_is_what_the_processor_makes_of_it(encoder, reference)
    encoding.test_another_picture_or_text_is_not_equal(encoder, reference)
    encoding.test_pictures_come_back(encoder)


def test_forwards(model, encoder):
    forwards.test_packed_is_alone_or_refused(model, encoder)
    forwards.test_images_change_the_logits(model, encoder)
    forwards.test_positions_that_run_on_are_not_alone(model, encoder)
    forwards.test_batched_answers_are_single_ones(model, encoder)


@pytest.mark.parametrize("tiles", [1, 2, 9])
def test_sizes_are_the_processors(encoder, reference, tiles):
    policy = ImagePolicy(max_tiles=tiles)
    for size in (Size(64, 48), Size(300, 31), Size(20, 200), Size(1, 1), Size(170, 170)):
        picture = contracts.noise(*size)
        theirs = reference.image_processor(
            [picture], crop_to_patches=tiles > 1, max_patches=tiles, return_tensors="pt"
        )
        ours = encoder.family.image_inputs([picture], policy)
        assert torch.equal(ours["pixel_values"], theirs["pixel_values"])
        assert encoder.family.visual_tokens(size, policy) == 4 * len(theirs["pixel_values"])


def test_what_is_exported_sees_the_same(bind, encoder, folder, tmp_path):
    trained = encoder_of(encoder.family, ImagePolicy(max_tiles=2))
    plain = load_model(folder, dtype=torch.float32, device=torch.device("cpu"))
    save_model(plain, tmp_path, family=trained.family, contract=trained.contract, base=folder)
    contract = Contract.read(tmp_path)
    family = bind(tmp_path)
    verify_contract(contract, family, contracts.BASE.weights_sha256)
    seen = contracts.hashes(Encoder(family, contract), ask=True)
    assert seen == contracts.hashes(trained, ask=True)
    assert seen != contracts.hashes(encoder, ask=True)
