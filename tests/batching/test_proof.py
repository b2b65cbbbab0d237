"""A loaded model shows whether it keeps packed rows apart; what shows nothing proves nothing."""

from __future__ import annotations

import pytest
import torch

import generic_models
from generic_models import generic
from tiny_rows import asked, encoder_of, lively, mixed_rows, picture, row, turn
from vlmtune.batching.collate import pack
from vlmtune.batching.proof import TOLERANCE as TOLERANCES
from vlmtune.batching.proof import packing_encoder, prove_packing
from vlmtune.data.media import ImagePolicy
from vlmtune.errors import ModelError
from vlmtune.models.load import load_model
from vlmtune.testing import tiny
from vlmtune.training.loss import label_logits

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


@pytest.fixture(scope="module")
def looking_back(tmp_path_factory):
    """A language model that convolves over the tokens before: positions keep nothing apart."""
    layers = {"model_type": "lfm2", "layer_types": ["conv", "full_attention"], "conv_L_cache": 3}
    return generic_models.aya_vision(tmp_path_factory.mktemp("lfm2") / "m", text=layers)


def test_layers_that_look_at_neighbours_disprove_it(looking_back):
    model, encoder = lively(looking_back), encoder_of(looking_back, POLICY)
    assert not prove_packing(model, encoder, encoder.family.packing()).packs
    assert packing_encoder(model, encoder) is encoder


def test_what_is_less_than_the_rounding_disproves_it(looking_back):
    """In half precision the difference says nothing; that a neighbour changes anything does."""
    encoder, device = encoder_of(looking_back, POLICY), torch.device("cpu")
    model = load_model(looking_back, dtype=torch.bfloat16, device=device)
    proof = prove_packing(model, encoder, encoder.family.packing())
    assert (proof.packs, proof.reason) == (False, "a row sees its neighbours")
    assert proof.difference < TOLERANCES[torch.bfloat16]


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
