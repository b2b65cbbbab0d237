"""Loading a model folder: what is missing or damaged is said, and nobody's code is run."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tiny_rows import asked, changed, encoder_of, picture, row, turn
from vlmtune.data.conversation import Text
from vlmtune.errors import ModelError, UsageError
from vlmtune.models.encode import Encoder
from vlmtune.models.families import load_family
from vlmtune.models.load import LoadingConfig, load_model
from vlmtune.models.weights import weight_files


def load(folder):
    return load_model(folder, dtype=torch.float32, device=torch.device("cpu"))


# Parts


def test_no_folder(tmp_path):
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        load_family(str(tmp_path / "nowhere"))
    (tmp_path / "file").write_text("x")
    with pytest.raises(ModelError, match="is not a model folder"):
        load_family(str(tmp_path / "file"))


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        (["config.json"], r"config\.json is missing: .* is not a model folder"),
        (["preprocessor_config.json"], r"preprocessor_config\.json is missing"),
        (["chat_template.jinja"], "has no chat template .*use an instruction-tuned model"),
        (["tokenizer.json"], r"has no tokenizer; expected one of tokenizer\.json"),
        (["tokenizer.json", "tokenizer_config.json"], "has no tokenizer"),
    ],
)
def test_a_missing_part_is_named(folder, tmp_path, removed, message):
    with pytest.raises(ModelError, match=message):
        load_family(str(changed(folder, tmp_path / "model", *removed)))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config_json", "{", r"config\.json is not valid JSON"),
        ("config_json", "[]", "holds a list, expected a JSON object"),
        ("config_json", "{}", "model type 'None' is not supported; supported are: .*qwen2_vl"),
        ("config_json", '{"model_type": "gpt2"}', "'gpt2' is not supported"),
        ("config_json", '{"model_type": "qwen2_vl", "text_config": 3}', "cannot be read by the"),
        ("tokenizer_json", "{", "the tokenizer cannot be read"),
        ("tokenizer_json", "{}", "the tokenizer cannot be read"),
        ("preprocessor_config_json", "no", "is not valid JSON"),
    ],
)
def test_a_damaged_part_is_named(folder, tmp_path, name, text, message):
    with pytest.raises(ModelError, match=message):
        load_family(str(changed(folder, tmp_path / "model", **{name: text})))


def test_code_in_a_folder_is_not_run(folder, tmp_path):
    own = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    own["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForImageTextToText": "evil.Model"}
    evil = changed(folder, tmp_path / "model", config_json=json.dumps(own))
    (evil / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    load_family(str(evil))
    load(evil)
    unknown = changed(
        evil, tmp_path / "unknown", config_json=json.dumps({**own, "model_type": "e"})
    )
    with pytest.raises(ModelError, match="not supported"):
        load_family(str(unknown))
    assert not (tmp_path / "ran").exists()


# Weights


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("readme.txt", "holds no weights"),
        ("pytorch_model.bin", r"only pickled weights \(pytorch_model\.bin\).*never unpickles"),
    ],
)
def test_without_safetensors_nothing_is_loaded(folder, tmp_path, name, message):
    bare = changed(folder, tmp_path / "model", "model.safetensors")
    (bare / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    for read in (load, weight_files):
        with pytest.raises(ModelError, match=message):
            read(bare)


@pytest.mark.parametrize("size", [0, 5000])
def test_cut_weights_are_refused(folder, tmp_path, size):
    cut = changed(folder, tmp_path / "model")
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(cut)


def test_a_missing_tensor_is_named(folder, tmp_path):
    other = changed(folder, tmp_path / "model")
    tensors = load_file(other / "model.safetensors")
    del tensors["model.norm.weight"]  # hubs leave out "language_model"
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"1 missing keys.*model\.language_model\.norm\.weight"):
        load(other)


def test_a_tensor_of_another_shape_is_refused(folder, tmp_path):
    other = changed(folder, tmp_path / "model")
    tensors = load_file(other / "model.safetensors")
    name = "model.norm.weight"
    tensors[name] = tensors[name][:7].clone()
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(other)


def test_a_model_is_loaded_for_inference_in_the_asked_dtype(folder):
    model = load_model(folder, dtype=torch.bfloat16, device=torch.device("cpu"))
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_options_of_loading():
    assert LoadingConfig(dtype="bf16", device="cpu").resolve() == (
        torch.device("cpu"),
        torch.bfloat16,
    )
    with pytest.raises(UsageError, match="expected one of fp32, bf16, fp16"):
        LoadingConfig(dtype="float").resolve()


# The real layouts


def test_a_folder_that_lists_a_video_processor_needs_no_torchvision(folder, tmp_path):
    """Hubs carry ``video_preprocessor_config.json`` and a processor class that insists on it."""
    real = changed(
        folder,
        tmp_path / "model",
        video_preprocessor_config_json=json.dumps(
            {"video_processor_type": "Qwen2VLVideoProcessor", "processor_class": "Qwen2VLProcessor"}
        ),
        processor_config_json=json.dumps({"processor_class": "Qwen2VLProcessor"}),
    )
    row = asked("?", "x", picture())
    ours, theirs = encoder_of(real).encode(row), encoder_of(folder).encode(row)
    assert (ours.tokens.ids == theirs.tokens.ids).all()
    assert torch.equal(ours.vision["pixel_values"], theirs.vision["pixel_values"])


def test_settings_are_read_from_all_three_layouts(folder, tmp_path):
    """Limits beside ``size``, inside it in old names, or in ``processor_config.json``."""
    old = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    limits = {"min_pixels": old.pop("min_pixels"), "max_pixels": 7840}
    plain = changed(folder, tmp_path / "a", preprocessor_config_json=json.dumps({**old, **limits}))
    sized = changed(
        folder,
        tmp_path / "b",
        preprocessor_config_json=json.dumps({**old, **limits, "size": limits}),
    )
    new = {**old, "size": {"shortest_edge": limits["min_pixels"], "longest_edge": 7840}}
    del new["max_pixels"]
    composed = changed(
        folder,
        tmp_path / "c",
        "preprocessor_config.json",
        processor_config_json=json.dumps({"image_processor": new}),
    )
    visions = [load_family(str(other)).parts.vision for other in (plain, sized, composed)]
    assert visions[0]["size"] == {"shortest_edge": 3136, "longest_edge": 7840}
    assert visions[0] == visions[1] == visions[2]


def test_a_template_may_lie_in_three_places(folder, tmp_path):
    template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    inside = changed(
        folder,
        tmp_path / "a",
        "chat_template.jinja",
        tokenizer_config_json=json.dumps({**settings, "chat_template": template}),
    )
    beside = changed(
        folder,
        tmp_path / "b",
        "chat_template.jinja",
        chat_template_json=json.dumps({"chat_template": template}),
    )
    for other in (inside, beside):
        assert load_family(str(other)).parts.template == template
    empty = changed(folder, tmp_path / "c", "chat_template.jinja", chat_template_json="{}")
    with pytest.raises(ModelError, match="no chat template"):
        load_family(str(empty))


# Templates that cannot be trusted


TALK = row(
    turn("user", "one", 0, "two"),
    turn("assistant", "three"),
    images=(picture(),),
)
OPEN, CLOSE = "<|im_start|>{{ m.role }}\n", "<|im_end|>\n"


def encoder_with(folder, tmp_path, body, close=CLOSE):
    template = "{% for m in messages %}" + OPEN + body + close + "{% endfor %}"
    return encoder_of(changed(folder, tmp_path / "model", chat_template_jinja=template))


IMAGE = "{% if c.type == 'image' %}<|image_pad|>"


@pytest.mark.parametrize(
    "body",
    [
        "{{ m.content[-1].text }}",
        "{% for c in m.content %}{{ c.text }}{% endfor %}",
        "{% for c in m.content %}" + IMAGE + "{% endif %}{% endfor %}",
        "{% for c in m.content|reverse %}"
        + IMAGE
        + "{% else %}{{ c.text }}{% endif %}{% endfor %}",
        "{% for c in m.content + m.content %}"
        + IMAGE
        + "{% else %}{{ c.text }}{% endif %}{% endfor %}",
        "{% for c in m.content %}"
        + IMAGE
        + "<|image_pad|>{% else %}{{ c.text }}{% endif %}{% endfor %}",
    ],
    ids=["first parts dropped", "images dropped", "texts dropped", "reversed", "twice", "two pads"],
)
def test_a_template_that_drops_or_moves_a_part_is_refused(folder, tmp_path, body):
    with pytest.raises(ModelError, match="does not write every part once and in order"):
        encoder_with(folder, tmp_path, body).tokens(TALK)


GOOD = "{% for c in m.content %}" + IMAGE + "{% else %}{{ c.text }}{% endif %}{% endfor %}"


def test_a_template_that_keeps_them_is_not(folder, tmp_path):
    assert encoder_with(folder, tmp_path, GOOD).tokens(TALK).trained


def test_a_template_that_never_ends_an_answer_is_refused(folder, tmp_path):
    with pytest.raises(ModelError, match=r"does not close an answer with '<\|im_end\|>'"):
        encoder_with(folder, tmp_path, GOOD, close="\n").tokens(TALK)


@pytest.mark.parametrize("body", ["{{ m.content[", "{{ raise_exception('no system') }}"])
def test_a_template_that_fails_says_for_what(folder, tmp_path, body):
    with pytest.raises(ModelError, match="cannot write a conversation of user assistant"):
        encoder_with(folder, tmp_path, body).tokens(TALK)


def test_a_template_is_rendered_once_for_a_shape(encoder, monkeypatch):
    fresh = Encoder(encoder.family, encoder.contract)
    first = fresh.tokens(TALK)
    monkeypatch.setattr(
        type(encoder.family.parts.tokenizer), "apply_chat_template", lambda *_, **__: 1 / 0
    )
    other = turn("user", "four", 0, "five")
    assert isinstance(other.content[0], Text)
    again = fresh.tokens(row(other, TALK.messages[1], images=TALK.images))
    assert len(again) != 0
    assert first.visual == again.visual
