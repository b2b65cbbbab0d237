"""What is Qwen-VL's own as a family; what it shares with the others is in tests/families."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from tiny_rows import as_chat, asked, encoder_of, lively, mixed_rows, picture, row, turn
from vlmtune.data.conversation import Box
from vlmtune.data.formats.qwen_markup import parse
from vlmtune.data.media import ImagePolicy
from vlmtune.errors import ModelError, UsageError
from vlmtune.models import decode
from vlmtune.models.decode import Decoding, pad_left
from vlmtune.models.families import load_family
from vlmtune.models.generate import generate
from vlmtune.models.load import load_model
from vlmtune.models.qwen_vl import original
from vlmtune.models.qwen_vl.tokenization import text_ids
from vlmtune.models.save import save_model
from vlmtune.testing import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny("qwen_vl", tmp_path_factory.mktemp("qwen_vl") / "model", seed=3)


@pytest.fixture(scope="module")
def encoder(folder):
    return encoder_of(folder, ImagePolicy())


# transformers' own way


def test_the_processor_makes_the_same_of_a_conversation(folder, encoder):
    """For those who use the classes without vlmtune's encoder."""
    from transformers import AutoProcessor

    load_family(str(folder))  # makes the classes known
    processor = AutoProcessor.from_pretrained(folder)
    assert type(processor).__name__ == encoder.family.facts.processor_class
    for conversation in mixed_rows(3, seed=4):
        theirs = processor.apply_chat_template(
            as_chat(conversation), tokenize=True, return_dict=True, return_tensors="pt"
        )
        ours = encoder.encode(conversation)
        np.testing.assert_array_equal(ours.tokens.ids, theirs["input_ids"][0].numpy())
        if ours.vision:
            assert torch.equal(ours.vision["pixel_values"], theirs["pixel_values"])


def test_a_saved_folder_has_all_of_it(folder, encoder, tmp_path):
    """After a merge, transformers alone makes of a row what was trained."""
    from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

    model = load_model(folder, dtype=torch.float32, device=torch.device("cpu"))
    save_model(model, tmp_path, family=encoder.family, contract=encoder.contract, base=folder)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "qwen"
    assert (tmp_path / "qwen.tiktoken").read_bytes() == (folder / "qwen.tiktoken").read_bytes()
    processor = AutoProcessor.from_pretrained(tmp_path)
    conversation = asked("What? 这是什么？", "yes", picture((70, 41)), picture((30, 90), seed=1))
    theirs = processor.apply_chat_template(
        as_chat(conversation), tokenize=True, return_dict=True, return_tensors="pt"
    )
    ours = encoder.encode(conversation)
    np.testing.assert_array_equal(ours.tokens.ids, theirs["input_ids"][0].numpy())
    assert torch.equal(ours.vision["pixel_values"], theirs["pixel_values"])
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == encoder.family.parts.template
    size = dict(AutoImageProcessor.from_pretrained(tmp_path).size)
    assert size == {"height": 56, "width": 56}


def test_pillow_alone_resizes(folder):
    with pytest.raises(ModelError, match="resizes images with Pillow alone"):
        load_family(str(folder), "torchvision")


def test_there_is_no_choice_of_size(encoder):
    with pytest.raises(UsageError, match=r"image.max_pixels: the family qwen_vl has no such"):
        encoder.family.settle(ImagePolicy(max_pixels=50176))


# Answers


def test_an_answer_ends_where_a_turn_begins(folder, encoder):
    """The original stops at ``<|im_start|>`` too; a model that goes on asks itself questions."""
    tokenizer = encoder.family.parts.tokenizer
    names = tokenizer.convert_ids_to_tokens(sorted(encoder.end_ids))
    assert set(names) == {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}
    model = load_model(folder, dtype=torch.float32, device=torch.device("cpu"))
    question = asked("?", "x", picture())
    whole = generate(model, encoder, [question], max_new_tokens=4)[0]
    assert not whole.finished
    with torch.no_grad():
        start = encoder.control_id("<|im_start|>")
        model.lm_head.weight[start] = model.lm_head.weight.abs().sum(dim=0)  # the likeliest
        hidden = model.transformer.ln_f.weight
        hidden.zero_()
        model.lm_head.register_forward_hook(lambda *_: _likely(start))
    ended = generate(model, encoder, [question], max_new_tokens=4)[0]
    assert (ended.text, ended.finished, ended.completion_tokens) == ("", True, 1)


def _likely(token):
    logits = torch.zeros(1, 1, 512)
    logits[..., token] = 1.0
    return logits


# Boxes


def ids_of(encoder, *parts):
    image = picture((1000, 1000))
    return encoder.tokens(row(turn("user", 0, "?"), turn("assistant", *parts), images=(image,))).ids


def test_a_phrase_stands_once_before_its_boxes(encoder):
    """The form that Qwen-VL was trained on, and the ids that its own training makes of it."""
    tokenizer = encoder.family.parts.tokenizer
    text = (
        "<ref>dogs</ref><box>(1,2),(3,4)</box><box>(5,6),(7,8)</box> and "
        "<ref>a cat</ref><box>(9,9),(10,10)</box><box>(0,0),(1,1)</box>."
    )
    parts, _ = parse(text, ["a.png"])
    labels = [part.label for part in parts if isinstance(part, Box)]
    assert labels == ["dogs", "dogs", "a cat", "a cat"]  # nothing is lost for other families
    ids = ids_of(encoder, *parts).tolist()
    answer = original.encode(tokenizer, text)
    assert ids[-len(answer) - 2 : -2] == answer
    # Another phrase between two boxes, or text, and the label stands again.
    for text in (
        "<ref>a</ref><box>(1,2),(3,4)</box> <ref>a</ref><box>(5,6),(7,8)</box>",
        "<ref>a</ref><box>(1,2),(3,4)</box><ref>b</ref><box>(5,6),(7,8)</box>",
        "<box>(1,2),(3,4)</box><box>(5,6),(7,8)</box>",
    ):
        answer = text_ids(tokenizer, text, "image")
        ids = ids_of(encoder, *parse(text, ["a.png"])[0]).tolist()
        assert ids[-len(answer) - 2 : -2] == answer


# Long prompts, in batches that others join and leave


@pytest.fixture(scope="module")
def stretching(folder, tmp_path_factory):
    """The tiny model with a ``seq_length`` of 64: dynamic NTK and logn attention are at work."""
    short = tmp_path_factory.mktemp("short") / "model"
    shutil.copytree(folder, short)
    config = json.loads((short / "config.json").read_text(encoding="utf-8"))
    (short / "config.json").write_text(json.dumps({**config, "seq_length": 64}), encoding="utf-8")
    return lively(short), encoder_of(short, ImagePolicy())


QUESTIONS = (
    asked("?", "x"),
    asked("What is it?", "x", picture((40, 60))),
    asked("What is the difference between them?", "x", *(picture(seed=n) for n in range(6))),
    asked("And now?", "x", *(picture((50, 30), seed=n) for n in range(12))),
)


def alone(model, encoder, encoded, steps):
    from transformers import GenerationConfig

    inputs = encoder.family.generate_inputs(pad_left(encoder, [encoded]))
    settings = GenerationConfig(do_sample=False, pad_token_id=encoder.pad_id, eos_token_id=None)
    with torch.no_grad():
        output = model.generate(**inputs, generation_config=settings, max_new_tokens=steps)
    return output[0, len(encoded.tokens) :]


def spoken(decoding, steps):
    said = []
    for _ in range(steps):
        said.append(decoding.logits.argmax(dim=-1))
        decoding.step(said[-1])
    return torch.stack(said, dim=1)


def joined_and_left(model, encoder, rows, expected):
    """Rows of all lengths in a batch that others join and leave: what each says, and should."""
    running = Decoding(model, encoder, rows[:2])
    found = [spoken(running, 3)]
    running.join(Decoding(model, encoder, rows[2:]))
    found.append(spoken(running, 3))
    running.keep([3, 0])
    found.append(spoken(running, 3))
    wanted = (
        expected[:2, :3],
        torch.cat([expected[:2, 3:6], expected[2:, :3]]),
        torch.stack([expected[3, 3:6], expected[0, 6:9]]),
    )
    return all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


def test_stretched_and_plain_rows_share_a_batch(stretching, monkeypatch):
    model, encoder = stretching
    rows = [encoder.encode(question, ask=True) for question in QUESTIONS]
    lengths = [len(each.tokens) for each in rows]
    assert lengths[0] < 64 < lengths[1] < 128 < lengths[2] < 256 < lengths[3]
    expected = torch.stack([alone(model, encoder, each, 9) for each in rows])
    assert joined_and_left(model, encoder, rows, expected)
    # The control: rows that go on with the frequencies of others say something else.
    states = decode._states

    def mixed(cache):
        return {name: state.flip(0) for name, state in states(cache).items()}

    monkeypatch.setattr(decode, "_states", mixed)
    assert not joined_and_left(model, encoder, rows, expected)


def test_stretched_rows_are_the_same_packed_and_alone(stretching):
    """In evaluation too, where dynamic NTK is on: the probe of a run packs its rows."""
    from vlmtune.batching.collate import pack
    from vlmtune.training.loss import label_logits

    model, encoder = stretching
    rows = [encoder.encode(question) for question in QUESTIONS]
    with torch.no_grad():
        single = torch.cat(
            [label_logits(model, encoder.family, pack(encoder.family, [each])) for each in rows]
        )
        packed = label_logits(model, encoder.family, pack(encoder.family, rows))
    assert (packed - single).abs().max() <= 1e-5 * single.abs().max()
