"""The contract: written and read alike, and refused where tokens or pixels would differ."""

from __future__ import annotations

import json

import pytest

from tiny_rows import BASE, changed, encoder_of
from vlmtune.data.media import ImagePolicy
from vlmtune.errors import ContractMismatchError, ModelError
from vlmtune.models.contract import FORMAT, Contract, make_contract, verify_contract
from vlmtune.models.families import load_family

HASH = BASE.weights_sha256


@pytest.fixture(scope="module")
def family(encoder):
    return encoder.family


@pytest.fixture(scope="module")
def contract(family):
    return make_contract(
        family, BASE, ImagePolicy(max_pixels=56448), system_prompt="Be brief.", prompt="读"
    )


def test_what_is_written_is_read(contract, tmp_path):
    contract.write(tmp_path)
    assert Contract.read(tmp_path) == contract
    first = (tmp_path / "contract.json").read_bytes()
    Contract.read(tmp_path).write(tmp_path)
    assert (tmp_path / "contract.json").read_bytes() == first


def test_nothing_is_left_open(contract):
    assert (contract.image.min_pixels, contract.image.max_pixels) == (3136, 56448)
    assert contract.processor.settings["patch_size"] == 14
    assert not {"size", "min_pixels", "max_pixels"} & contract.processor.settings.keys()


def test_it_holds_for_the_model_that_it_was_made_for(contract, family, folder):
    verify_contract(contract, family, HASH)
    verify_contract(contract, load_family(str(folder)), HASH)
    assert contract.differences(contract) == []


def test_versions_are_recorded_and_do_not_count(contract):
    processor = contract.processor.model_copy(update={"transformers": "0", "pillow": "0"})
    other = contract.model_copy(update={"vlmtune": "0", "processor": processor})
    assert contract.differences(other) == []


CHANGES = {
    "family": {"family": "other"},
    "image": {"image": ImagePolicy(max_pixels=1)},
    "template_sha256": {"template_sha256": "0"},
    "vocabulary_size": {"vocabulary_size": 1},
    "system_prompt": {"system_prompt": None},
    "prompt": {"prompt": "other"},
    "base.weights_sha256": {"base": BASE.model_copy(update={"weights_sha256": "1"})},
}


@pytest.mark.parametrize("name", CHANGES)
def test_each_difference_is_named(contract, name):
    (difference,) = contract.differences(contract.model_copy(update=CHANGES[name]))
    assert difference.startswith(f"{name}: ")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("processor.backend", {"backend": "torchvision"}),
        ("processor.settings", {"settings": {"patch_size": 16}}),
    ],
)
def test_each_difference_of_the_processor_is_named(contract, name, change):
    other = contract.processor.model_copy(update=change)
    (difference,) = contract.differences(contract.model_copy(update={"processor": other}))
    assert difference.startswith(f"{name}: ")


def test_other_weights_are_refused(contract, family):
    with pytest.raises(ContractMismatchError, match=r"base\.weights_sha256"):
        verify_contract(contract, family, "1" * 64)


@pytest.mark.parametrize(
    ("file", "edit", "named"),
    [
        ("chat_template.jinja", lambda text: text.replace("helpful", "honest"), "template_sha256"),
        ("preprocessor_config.json", lambda text: text.replace("0.481", "0.5"), "processor.settin"),
        (
            "preprocessor_config.json",
            lambda text: text.replace('"resample": 3', '"resample": 2'),
            "processor.settings",
        ),
    ],
)
def test_a_changed_folder_is_refused(contract, folder, tmp_path, file, edit, named):
    other = changed(folder, tmp_path / "other")
    text = (other / file).read_text(encoding="utf-8")
    assert edit(text) != text
    (other / file).write_text(edit(text), encoding="utf-8")
    with pytest.raises(ContractMismatchError, match=named):
        verify_contract(contract, load_family(str(other)), HASH)


def test_other_limits_of_the_folder_do_not_matter(contract, folder, tmp_path):
    """The contract holds the limits; a folder's own count only while they are left open."""
    other = changed(folder, tmp_path / "other")
    path = other / "preprocessor_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**settings, "max_pixels": 7840}), encoding="utf-8")
    verify_contract(contract, load_family(str(other)), HASH)
    assert encoder_of(other, ImagePolicy()).contract.image.max_pixels == 7840


def test_a_newer_form_is_refused(contract, tmp_path):
    newer = {**contract.model_dump(mode="json"), "format": FORMAT + 1, "vlmtune": "9.9"}
    (tmp_path / "contract.json").write_text(json.dumps(newer), encoding="utf-8")
    with pytest.raises(ModelError, match=r"format 2, written by vlmtune 9\.9.*Upgrade"):
        Contract.read(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "{}", '{"format": "new"}', '{"format": null}', "\udcff"]
)
def test_a_damaged_contract_is_refused(tmp_path, text):
    (tmp_path / "contract.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ModelError, match=r"contract\.json cannot be read"):
        Contract.read(tmp_path)


def test_an_unknown_key_is_refused(contract, tmp_path):
    value = {**contract.model_dump(mode="json"), "colour": "red"}
    (tmp_path / "contract.json").write_text(json.dumps(value), encoding="utf-8")
    with pytest.raises(ModelError, match="colour"):
        Contract.read(tmp_path)


def test_a_folder_without_one_says_so(tmp_path):
    with pytest.raises(ModelError, match=r"contract\.json"):
        Contract.read(tmp_path)
