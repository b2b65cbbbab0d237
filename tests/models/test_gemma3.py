"""What is Gemma 3's own: its masks, its template, its vocabulary's symbols, its boxes."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tiny_rows import asked, changed, encoder_of, lively, mixed_rows, picture, row, turn
from vlmtune.batching.collate import pack
from vlmtune.data.media import ImagePolicy, Size
from vlmtune.models.contract import make_contract
from vlmtune.models.encode import Encoder
from vlmtune.models.gemma3 import FACTS, GRID, attention_masks
from vlmtune.models.plain_text import control_tokens
from vlmtune.testing import tiny
from vlmtune.testing.gemma import GEMMA_TEMPLATE, SYMBOLS
from vlmtune.training.loss import label_logits
from vlmtune.tuning.parts import count_parts

POLICY = ImagePolicy()
ROWS = [
    asked("Which?", "The last.", picture((40, 60), seed=1), picture((70, 30), seed=2)),
    row(turn("user", "Hello?"), turn("assistant", "Yes."), name="plain"),
    *mixed_rows(3, seed=4),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny("gemma3", tmp_path_factory.mktemp("gemma3") / "tiny", seed=3)


@pytest.fixture(scope="module")
def encoder(folder):
    return encoder_of(folder, POLICY)


@pytest.fixture(scope="module")
def model(folder):
    return lively(folder)


def raw(pieces):
    return "".join(piece.text for piece in pieces)


# Masks


def stock_masks(model, batch):
    """The masks that the model makes itself."""
    from transformers.models.gemma3.modeling_gemma3 import (
        create_masks_for_vision_model,
        get_block_sequence_ids_for_mask,
    )

    return create_masks_for_vision_model(
        config=model.config.get_text_config(),
        inputs_embeds=torch.zeros(1, batch.tokens, 1),
        attention_mask=None,
        past_key_values=None,
        position_ids=batch.inputs["positions"],
        block_sequence_ids=get_block_sequence_ids_for_mask(batch.inputs["image_mask"].long()),
    )


def our_masks(model, batch):
    window = model.config.get_text_config().sliding_window
    return attention_masks(batch.inputs["positions"], batch.inputs["image_mask"], window)


def test_alone_the_masks_are_the_models_own(model, encoder):
    for conversation in ROWS:
        batch = pack(encoder.family, [encoder.encode(conversation)])
        theirs, ours = stock_masks(model, batch), our_masks(model, batch)
        assert set(theirs) == set(ours)
        for kind, mask in theirs.items():
            assert torch.equal(mask, ours[kind]), kind
        if batch.inputs["image_mask"].any():
            assert not torch.equal(ours["full_attention"], ours["full_attention"].tril())
        assert not torch.equal(ours["full_attention"], ours["sliding_attention"])


def test_packed_the_masks_are_those_of_each_row(model, encoder):
    encoded = [encoder.encode(conversation) for conversation in ROWS]
    packed = our_masks(model, pack(encoder.family, encoded))
    for kind in ("full_attention", "sliding_attention"):
        alone = [our_masks(model, pack(encoder.family, [each]))[kind][0, 0] for each in encoded]
        assert torch.equal(packed[kind][0, 0], torch.block_diag(*alone).bool())


def test_the_models_own_masks_are_wrong_in_a_pack(model, encoder):
    """Why there are ours: the windows of a pack see the images of another row."""
    batch = pack(encoder.family, [encoder.encode(conversation) for conversation in ROWS])
    theirs, ours = stock_masks(model, batch), our_masks(model, batch)
    assert torch.equal(theirs["full_attention"], ours["full_attention"])
    assert not torch.equal(theirs["sliding_attention"], ours["sliding_attention"])


@torch.no_grad()
def test_a_row_alone_is_the_stock_call(model, encoder):
    """With the processor's own inputs and no masks of ours, the same logits."""
    for conversation in ROWS:
        batch = pack(encoder.family, [encoder.encode(conversation)])
        stock = model(
            input_ids=batch.inputs["input_ids"],
            attention_mask=torch.ones_like(batch.inputs["input_ids"]),
            logits_to_keep=batch.predicts,
            **encoder.family.vision_arguments(batch.inputs),
        ).logits
        ours = label_logits(model, encoder.family, batch)
        assert torch.allclose(stock, ours, rtol=0, atol=1e-5 * float(stock.abs().max()))


# Template and vocabulary


def test_the_tiny_template_writes_what_the_real_one_writes(encoder, shared_data):
    path = shared_data / "model_meta" / "trl_chat_templates" / "gemma3.jinja"
    real = path.read_text(encoding="utf-8")
    tokenizer = encoder.family.parts.tokenizer
    image, words = {"type": "image"}, {"type": "text", "text": "  Look here \n"}
    user = {"role": "user", "content": [image, words, image]}
    answer = {"role": "assistant", "content": [words]}
    system = {"role": "system", "content": [{"type": "text", "text": " Be brief. "}]}
    plain = {"role": "user", "content": " x "}
    for rows in ([user], [user, answer], [system, user, answer, plain], [plain, answer, user]):
        for ask in (False, True):
            written = [
                tokenizer.apply_chat_template(
                    rows, chat_template=template, tokenize=False, add_generation_prompt=ask
                )
                for template in (real, GEMMA_TEMPLATE)
            ]
            assert written[0] == written[1]


def test_with_the_real_template_the_ids_are_the_same(encoder, shared_data):
    path = shared_data / "model_meta" / "trl_chat_templates" / "gemma3.jinja"
    parts = encoder.family.parts
    real = type(encoder.family)(
        type(parts)(**{**vars(parts), "template": path.read_text(encoding="utf-8")})
    )
    other = Encoder(real, make_contract(real, encoder.contract.base, POLICY))
    for conversation in ROWS:
        assert other.tokens(conversation).ids.tolist() == encoder.tokens(conversation).ids.tolist()


@pytest.mark.parametrize("text", ["a\nb", "a\n\n\nb", "\n" * 9, "<table>x", "a▁▁b", "<table"])
def test_symbols_are_text_as_the_tokenizer_reads_it(encoder, text):
    """Added tokens that are not special: any engine reads them so, in anybody's text."""
    tokenizer = encoder.family.parts.tokenizer
    assert encoder.text_ids(text) == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert encoder.control_tokens_in(text) == []


def test_controls_are_not_text(encoder):
    controls = control_tokens(encoder.family.parts.tokenizer.backend_tokenizer)
    assert not set(SYMBOLS) & set(controls)
    for token, identifier in controls.items():
        assert encoder.control_tokens_in(f"a{token}b") == [token]
        assert identifier not in encoder.text_ids(f"a{token}b")


# Images


def test_pan_and_scan_stays_off(folder, encoder, tmp_path):
    settings = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    on = {"do_pan_and_scan": True, "pan_and_scan_min_ratio_to_activate": 1.2}
    on |= {"pan_and_scan_min_crop_size": 16, "pan_and_scan_max_num_crops": 4}
    other = encoder_of(
        changed(folder, tmp_path / "m", preprocessor_config_json=json.dumps(settings | on)), POLICY
    )
    long = asked("?", "x", picture((300, 40)))
    seen = other.encode(long)
    assert torch.equal(seen.vision["pixel_values"], encoder.encode(long).vision["pixel_values"])
    assert seen.tokens.visual == 16
    assert other.family.image_processor_config(POLICY)["do_pan_and_scan"] is False
    crops = other.family.parts.image_processor([torch.zeros(3, 40, 300)], return_tensors="pt")
    assert len(crops["pixel_values"]) > 1  # the control: the folder's settings do mean crops


# Boxes

corners = st.integers(0, GRID)
sizes = st.builds(Size, st.integers(1, 8000), st.integers(1, 8000))
labels = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(
    lambda label: not set(label) & set("{}")
)


@given(corners, corners, corners, corners, labels, sizes)
def test_what_was_parsed_renders_to_the_same_text(encoder, y1, x1, y2, x2, label, size):
    name = f', "label": {json.dumps(label, ensure_ascii=False)}' if label else ""
    text = f'{{"box_2d": [{y1}, {x1}, {y2}, {x2}]{name}}}'
    (box,) = encoder.family.parse_boxes(f"```json\n[{text}]\n```", [size], POLICY)
    assert box.label == label
    assert raw(encoder.family.render_box(box, size, POLICY)) == text


@pytest.mark.parametrize("size", [Size(1, 1), Size(997, 1003), Size(5304, 3540), Size(28, 8000)])
def test_every_integer_of_the_grid_survives(encoder, size):
    for value in range(GRID + 1):
        text = f'{{"box_2d": [{value}, {value}, {value}, {value}]}}'
        (box,) = encoder.family.parse_boxes(text, [size], POLICY)
        assert raw(encoder.family.render_box(box, size, POLICY)) == text


def test_height_comes_first(encoder):
    text = '{"box_2d": [0, 500, 250, 1000]} {"bbox_2d": [1, 2, 3, 4]}'
    (box,) = encoder.family.parse_boxes(text, [Size(10, 10), Size(100, 200)], POLICY)
    assert (box.image, box.xyxy) == (1, (50.0, 0.0, 100.0, 50.0))
    assert encoder.family.parse_boxes(text, [], POLICY) == []


# The real size


def test_every_parameter_of_the_real_one_belongs_to_a_part():
    """Gemma 3 4B, whose configuration is public: 4.3 billion parameters, 417 million that see."""
    from transformers import AutoModelForImageTextToText, Gemma3Config

    config = Gemma3Config(
        text_config={
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "num_hidden_layers": 34,
            "sliding_window": 1024,
        },
        vision_config={
            "hidden_size": 1152,
            "image_size": 896,
            "intermediate_size": 4304,
            "num_attention_heads": 16,
            "num_hidden_layers": 27,
            "patch_size": 14,
            "vision_use_head": False,
        },
    )
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    counts = count_parts(model, FACTS, trainable=False)
    assert sum(counts.values()) == sum(parameter.numel() for parameter in model.parameters())
    assert counts["vision"] // 10**6 == 416
    assert counts["projector"] == 1152 * 2560 + 1152
    assert counts["language"] // 10**7 == 388
