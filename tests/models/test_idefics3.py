"""Idefics3 and SmolVLM: rows and columns of tiles, their names, pixels."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Pictures

from families.references import REFERENCES
from tiny_rows import as_chat, asked, encoder_of, lively, picture
from vlmtune.batching.collate import pack
from vlmtune.data.media import ImagePolicy, Size
from vlmtune.errors import UsageError
from vlmtune.models.encode import Encoder
from vlmtune.models.families import family_class
from vlmtune.models.family import BOX_GRID
from vlmtune.testing import tiny
from vlmtune.tuning.parts import count_parts

OWN = ImagePolicy()
sizes = st.builds(Size, st.integers(1, 6000), st.integers(1, 6000)).filter(
    lambda size: max(size) <= 200 * min(size)
)
# Side of a tile, longer side before tiling, patch, scale: as the models on the hubs have them.
REAL = {
    "Idefics3-8B": (364, 1820, 14, 2, 169),
    "SmolVLM2-2.2B": (384, 1536, 14, 3, 81),
    "SmolVLM2-500M": (512, 2048, 16, 4, 64),
}


@pytest.fixture(scope="module", params=["idefics3", "smolvlm"])
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


def of_settings(family, **settings):
    """The family with another image processor."""
    processor = type(family.parts.image_processor)(**{**family.parts.vision, **settings})
    return type(family)(
        replace(family.parts, image_processor=processor, vision=processor.to_dict())
    )


# Tiles


@pytest.mark.parametrize("longest_edge", [56, 112, 140, 168])
def test_tiles_counted_from_the_size_are_those_of_the_pixels(family, longest_edge):
    """A longer side that is no multiple of a tile is where transformers' own count goes wrong."""
    policy = ImagePolicy(longest_edge=longest_edge)
    wrong = 0
    shapes = [(140, 50), (140, 100), (50, 140), (100, 140)]  # just below a whole tile
    shapes += [(3 + 37 * number % 190, 5 + 53 * number % 210) for number in range(20)]
    for number, shape in enumerate(shapes):
        size, image = Size(*shape), drawn(shape, seed=number)
        options = family.processor_arguments(family.settle(policy))
        output = family.parts.image_processor(
            images=[image], return_tensors="pt", return_row_col_info=True, **options
        )
        rows, columns = output["rows"][0][0], output["cols"][0][0]
        views = output["pixel_values"].shape[1]
        resized = family.resized(size, policy)
        assert (resized.height, resized.width) == (56 * max(rows, 1), 56 * max(columns, 1))
        assert family.visual_tokens(size, policy) == views * 4
        assert len(family.image_inputs([image], policy)["pixel_values"]) == views
        header = family.parts.image_processor.get_number_of_image_patches(
            size.height, size.width, options
        )
        wrong += header[1:] != (rows, columns)
    assert (wrong > 0) is (longest_edge == 140)


@pytest.mark.parametrize("model", REAL)
@settings(max_examples=40)
@given(size=sizes)
def test_real_tiles(family, model, size):
    tile, longest_edge, *_ = REAL[model]
    real = of_settings(
        family, max_image_size={"longest_edge": tile}, size={"longest_edge": longest_edge}
    )
    real._named_tiles = 6
    _, rows, columns = real.parts.image_processor.get_number_of_image_patches(
        size.height, size.width
    )
    resized = real.resized(size, OWN)
    assert (resized.height, resized.width) == (rows * tile, columns * tile)


@pytest.mark.parametrize("model", REAL)
def test_real_views(family, model):
    """Tokens of a view, as the models' processors say them."""
    tile, _, patch, scale, tokens = REAL[model]
    real = of_settings(family, max_image_size={"longest_edge": tile})
    real._config = {"vision_config": {"patch_size": patch}, "scale_factor": scale}
    assert real._view_tokens == tokens


def test_without_tiles_there_is_one_view(encoder, family):
    policy = ImagePolicy(split=False)
    assert family.visual_tokens(Size(300, 20), policy) == 4
    assert family.resized(Size(300, 20), policy) == Size(56, 56)
    image = drawn((300, 20))
    assert torch.equal(
        family.image_inputs([image], policy)["pixel_values"][0],
        family.parts.image_processor(images=[image], do_image_splitting=False, return_tensors="pt")[
            "pixel_values"
        ][0, 0],
    )
    single = Encoder(family, encoder.contract.model_copy(update={"image": policy}))
    conversation = asked("?", "x", picture((300, 20)))
    assert single.tokens(conversation).visual == 4
    assert encoder.tokens(conversation).visual > 4


def test_settling_is_stable(family):
    settled = family.settle(OWN)
    assert (settled.longest_edge, settled.split) == (
        family.parts.vision["size"]["longest_edge"],
        True,
    )
    assert family.settle(settled) == settled
    with pytest.raises(UsageError, match=r"image\.max_pixels: the family .* image\.longest_edge"):
        family.settle(ImagePolicy(max_pixels=1000))


def test_tiles_without_names_are_refused(name, family):
    """A fourth row would be written in letters to a model that knows rows by tokens."""
    too_long = ImagePolicy(longest_edge=169)
    if name == "idefics3":  # writes them all in letters
        assert family.settle(too_long).longest_edge == 169
        return
    with pytest.raises(UsageError, match=r"image\.longest_edge: found 169; .* at most 168"):
        family.settle(too_long)
    assert family.settle(too_long.model_copy(update={"split": False})).longest_edge == 169


def test_names_are_tokens_where_the_vocabulary_has_them(name, encoder):
    tokens = encoder.tokens(asked("?", "x", picture((100, 60))))
    tokenizer = encoder.family.parts.tokenizer
    text = tokenizer.decode(tokens.ids)
    around, views = "<fake_token_around_image>", 3
    view = "<image>" * 4
    assert text.count(f"{around}<row_1_col_1>{view}{around}<row_1_col_2>{view}") == 1
    assert text.count(f"\n\n{around}<global-img>{view}{around}") == 1
    assert tokens.visual % 4 == 0
    assert tokens.visual >= 4 * views
    whole = tokenizer.convert_tokens_to_ids("<global-img>")
    known = "<global-img>" in tokenizer.get_added_vocab()
    assert known is (name == "smolvlm")
    assert (whole in tokens.ids.tolist()) is known


def test_the_mask_of_the_processor_says_nothing(folder, encoder, name):
    """It is left out: all ones, and without it the model computes the same."""
    conversation = asked("?", "x", picture((100, 60)), picture((60, 30), seed=1))
    output = REFERENCES[name](folder).apply_chat_template(
        as_chat(conversation), tokenize=True, return_dict=True, return_tensors="pt"
    )
    mask = output["pixel_attention_mask"]
    # Of a row with fewer views than another the processor pads views; here there is one row.
    assert mask.all()
    model = lively(folder)
    inputs = encoder.family.forward_inputs(
        pack(encoder.family, [encoder.encode(conversation)]).inputs
    )
    with torch.no_grad():
        ours = model(**inputs).logits
        assert torch.equal(ours, model(**inputs, pixel_attention_mask=mask).logits)
        part = mask.clone()
        part[..., 28:] = 0
        assert not torch.equal(ours, model(**inputs, pixel_attention_mask=part).logits)


# Boxes, settings and templates


@pytest.mark.parametrize("size", [Size(1, 1), Size(997, 1003), Size(28, 8000)])
def test_every_integer_of_the_grid_survives(family, size):
    for value in range(BOX_GRID):
        text = f'{{"bbox_2d": [{value}, {value}, {value}, {value}], "label": "a"}}'
        (box,) = family.parse_boxes(text, [size], OWN)
        assert "".join(piece.text for piece in family.render_box(box, size, OWN)) == text


def test_the_real_template_of_idefics3(shared_data, tmp_path):
    """It writes the beginning itself, and so does the tokenizer: there is one."""
    path = shared_data / "model_meta" / "trl_chat_templates" / "idefics3.jinja"
    folder = tiny("idefics3", tmp_path / "model")
    (folder / "chat_template.jinja").write_bytes(path.read_bytes())
    encoder, reference = encoder_of(folder, OWN), REFERENCES["idefics3"](folder)
    for conversation in (asked("What?", "yes", picture()), asked("What?", "yes")):
        theirs = reference.apply_chat_template(
            as_chat(conversation), tokenize=True, return_dict=True, return_tensors="pt"
        )
        ids = encoder.tokens(conversation).ids
        np.testing.assert_array_equal(ids, theirs["input_ids"][0].numpy())
        assert ids.tolist().count(encoder.family.token_id("<|begin_of_text|>")) == 1
    assert encoder.end_id == encoder.family.token_id("<end_of_utterance>")


def test_the_real_template_of_smolvlm(tmp_path):
    """transformers has the text of the hub's, with a place for videos."""
    from transformers.models.smolvlm.processing_smolvlm import DEFAULT_CHAT_TEMPLATE

    folder = tiny("smolvlm", tmp_path / "model")
    conversation = asked("What?", "yes", picture())
    ids = encoder_of(folder, OWN).tokens(conversation).ids
    (folder / "chat_template.jinja").write_text(DEFAULT_CHAT_TEMPLATE, encoding="utf-8")
    encoder = encoder_of(folder, OWN)
    np.testing.assert_array_equal(encoder.tokens(conversation).ids, ids)
    text = encoder.family.parts.tokenizer.decode(ids)
    assert text.startswith("<|im_start|>User:<fake_token_around_image><row_1_col_1><image>")
    assert text.endswith("What?<end_of_utterance>\nAssistant: yes<end_of_utterance>\n")
    assert (encoder.lead, encoder.adds_end) == (" ", False)


def test_the_real_settings_of_smolvlm(shared_data, tmp_path):
    path = shared_data / "model_meta" / "small_json" / "smolvlm2_500m.metadata.json"
    real = json.loads(path.read_text(encoding="utf-8"))
    stated, config = real["preprocessor_config"], real["config"]
    folder = tiny("smolvlm", tmp_path / "model")
    (folder / "preprocessor_config.json").write_text(json.dumps(stated), encoding="utf-8")
    family = encoder_of(folder, ImagePolicy(longest_edge=1536)).family
    family._config = config
    assert family._view_tokens == real["processor_config"]["image_seq_len"]
    assert "<row_6_col_6>" in real["added_token_ids"]
    most = math.ceil(stated["size"]["longest_edge"] / stated["max_image_size"]["longest_edge"])
    assert most <= 6
    exported = family.image_processor_config(ImagePolicy(longest_edge=1536))
    assert exported["size"] == {"longest_edge": 1536}
    for key in ("max_image_size", "resample", "video_sampling"):
        assert exported[key] == stated[key]


REAL_CONFIGS = {
    "idefics3": {
        "text_config": {
            "model_type": "llama",
            "vocab_size": 128259,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        },
        "vision_config": {
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "image_size": 364,
            "patch_size": 14,
        },
        "scale_factor": 2,
    },
    "smolvlm": {
        "text_config": {
            "model_type": "llama",
            "vocab_size": 49280,
            "hidden_size": 960,
            "intermediate_size": 2560,
            "num_hidden_layers": 32,
            "num_attention_heads": 15,
            "num_key_value_heads": 5,
        },
        "vision_config": {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "image_size": 512,
            "patch_size": 16,
        },
        "scale_factor": 4,
    },
}


@pytest.mark.slow
def test_every_parameter_of_a_real_model_has_a_part(name):
    """Idefics3-8B and SmolVLM2-500M, without memory: 8.46 and 0.5 thousand million weights."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.for_model(name, **REAL_CONFIGS[name])
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    counts = count_parts(model, family_class(name).facts, trainable=False)
    billions = {part: count / 1e9 for part, count in counts.items()}
    expected = {
        "idefics3": {"vision": 0.412, "projector": 0.019, "language": 8.03},
        "smolvlm": {"vision": 0.086, "projector": 0.012, "language": 0.41},
    }[name]
    assert billions == pytest.approx(expected, rel=0.03)
