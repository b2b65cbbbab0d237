"""The tokenizer, against what the original makes of the same texts."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import unicodedata

import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

from vlmtune.errors import ModelError, RowError
from vlmtune.models.qwen_vl import original
from vlmtune.models.qwen_vl.controls import CONTROLS, IMAGE_TAGS
from vlmtune.models.qwen_vl.tokenization import (
    PATTERN,
    load_tokenizer,
    make_backend,
    read_ranks,
    text_ids,
    token_bytes,
)

any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
hostile = st.lists(st.one_of(st.sampled_from(CONTROLS), any_text), max_size=6).map("".join)


def by_ranks(ranks, text):
    """The rule of the ranks, straight: of all neighbours the lowest joint rank, leftmost first."""
    ids = []
    for piece in regex.findall(PATTERN, unicodedata.normalize("NFC", text)):
        whole = piece.encode()
        parts = [whole] if whole in ranks else [bytes([value]) for value in whole]
        while len(parts) > 1:
            joint = [ranks.get(a + b, len(ranks)) for a, b in itertools.pairwise(parts)]
            if (best := min(joint)) == len(ranks):
                break
            place = joint.index(best)
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        ids += [ranks[part] for part in parts]
    return ids


# Against the original


def test_the_vocabulary_is_the_originals(golden, real, shared_data):
    facts = golden["vocab"]
    data = (shared_data / "model_meta" / "qwen_vl_chat" / "qwen.tiktoken").read_bytes()
    assert hashlib.sha256(data.replace(b"\r\n", b"\n")).hexdigest() == facts["sha256_lf"]
    assert real.vocab_size == facts["n_ranks"]
    assert len(real) == facts["n_vocab"]
    assert facts["pat_str"] == PATTERN
    for token, identifier in facts["special_ids"].items():
        assert real.convert_tokens_to_ids(token) == identifier
    assert list(real.get_added_vocab()) == list(CONTROLS)
    assert list(real.get_added_vocab().values()) == list(range(facts["n_ranks"], facts["n_vocab"]))
    assert (real.is_fast, real.eos_token_id, real.pad_token_id) == (True, 151643, 151643)


def test_every_text_encodes_as_in_the_original(golden, real):
    for case in golden["encode"].values():
        assert original.encode(real, case["text"]) == case["ids"]
        if "<img>" not in case["text"]:
            assert text_ids(real, case["text"], "all") == case["ids"]
            assert real(case["text"])["input_ids"] == case["ids"]
    assert len(golden["encode"]) == 20
    # What else the original's call gives, token types that are all zero, no model reads.
    assert set(real("x")) == set(golden["call_keys"]) - {"token_type_ids"}


def test_with_image_tags_only_the_chats_tokens_are_text(golden, real):
    for case in golden["encode_allowed_IMAGE_ST_only"].values():
        assert original.encode(real, case["text"], "image") == case["ids"]
    special = golden["encode_allowed_IMAGE_ST_only"]["special_in_text"]
    assert original.encode(real, special["text"], "all") != special["ids"]


@pytest.mark.parametrize(
    ("case", "change"),
    [
        ("nfd", {"normalizer": None}),
        ("code", {"pattern": PATTERN.replace(r"|\s+(?!\S)", "")}),
        ("en", {"pattern": PATTERN.replace("| ?[", "|[")}),
    ],
)
def test_another_rule_gives_other_ids(golden, real, case, change):
    """The control: each rule of the tokenizer is seen by the golden texts."""
    other = Tokenizer(real.backend_tokenizer.model)
    other.normalizer = change.get("normalizer", normalizers.NFC())
    pattern = Regex(change.get("pattern", PATTERN))
    other.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    text, ids = golden["encode"][case]["text"], golden["encode"][case]["ids"]
    assert other.encode(text).ids != ids
    assert text_ids(real, text) == ids


def test_paths_up_to_256_bytes_have_room(golden, real):
    pad, end = real.convert_tokens_to_ids(["<imgpad>", "</img>"])
    for length, expected in golden["path_length"].items():
        text = f"<img>{'a' * int(length)}</img>"
        if "error" in expected:
            with pytest.raises(RowError, match="257 bytes"):
                original.encode(real, text)
            continue
        ids = original.encode(real, text)
        assert (len(ids), ids.count(pad)) == (expected["n_ids"], expected["n_pad"])
        # The original model looks for the path's end before the last place of the span.
        assert (pad in ids[1 : ids.index(end) - 1]) == expected["model_can_extract"]
        if "decode_error" in expected:
            with pytest.raises(RowError, match="no padding"):
                original.decode(real, ids)
        else:
            assert original.decode(real, ids) == text


def test_odd_image_tags(golden, real):
    for case in golden["odd_img"].values():
        if "error" in case:
            with pytest.raises(RowError) as caught:
                original.encode(real, case["text"])
            assert caught.value.code == "bad_markup"
        else:
            assert original.encode(real, case["text"]) == case["ids"]
    with pytest.raises(RowError, match="not closed"):
        original.decode(real, original.encode(real, "<img>a</img>")[:-1])


def test_ids_decode_as_in_the_original(golden, real):
    case = golden["decode"]
    ids = case["ids"]
    assert original.decode(real, ids) == case["plain"]
    assert original.decode(real, ids, skip_controls=True) == case["skip_special"]
    kept = original.decode(real, ids, skip_controls=True, keep_tags=True)
    assert kept == case["skip_special_keep_image"]
    cut = golden["decode_partial"]
    assert original.decode(real, cut["ids"][:1]) == cut["first_replace"]
    assert original.decode(real, cut["ids"][:1], errors="ignore") == cut["first_ignore"]
    assert original.decode(real, cut["ids"]) == "\U0001fae8"
    # transformers' own decode is the same where there is no path.
    plain = golden["encode"]["two_box"]
    assert real.decode(plain["ids"]) == original.decode(real, plain["ids"]) == plain["text"]


def test_the_tiny_vocabulary_counts_its_controls_from_its_own_size(golden_model, small):
    assert small.convert_tokens_to_ids("<|endoftext|>") == golden_model["ids"]["eod"]
    assert small.convert_tokens_to_ids("<imgpad>") == golden_model["ids"]["imgpad"]
    assert len(small) == golden_model["ids"]["n_vocab"]
    for prompt in golden_model["prompts"].values():
        assert original.encode(small, prompt["text"]) == prompt["input_ids"]


# Real texts, and the rule itself


def tutorials(shared_data):
    names = ("TUTORIAL.md", "TUTORIAL_zh.md")
    return [(shared_data / "qwen_vl_assets" / name).read_text(encoding="utf-8") for name in names]


def test_real_texts_survive(real, shared_data):
    for text in tutorials(shared_data):
        decomposed = unicodedata.normalize("NFD", text + "é")
        for allowed in ("none", "image", "all"):
            ids = text_ids(real, decomposed, allowed)
            assert real.decode(ids) == text + "é" != decomposed
            assert token_bytes(real, ids).decode() == text + "é"


def test_real_texts_follow_the_rule_of_the_ranks(real, shared_data):
    ranks = read_ranks(shared_data / "model_meta" / "qwen_vl_chat" / "qwen.tiktoken")
    for text in tutorials(shared_data):
        ids = text_ids(real, text)
        assert ids == by_ranks(ranks, text)
        # The control: with two ranks exchanged, the rule gives others.
        exchanged = {**ranks, b" the": ranks[b"\xe7\x9a\x84"], b"\xe7\x9a\x84": ranks[b" the"]}
        assert ids != by_ranks(exchanged, text)


@given(text=any_text)
def test_any_text_follows_the_rule_of_the_ranks(made, ranks_folder, text):
    ranks = read_ranks(ranks_folder / "qwen.tiktoken")
    assert text_ids(made, text) == by_ranks(ranks, text)


@given(text=any_text)
def test_any_text_survives(made, text):
    ids = text_ids(made, text)
    assert made.decode(ids) == unicodedata.normalize("NFC", text)


# Control tokens


@given(text=hostile)
def test_no_text_becomes_a_control_token(made, text):
    first = made.vocab_size
    assert all(identifier < first for identifier in text_ids(made, text))
    tags = set(map(made.convert_tokens_to_ids, IMAGE_TAGS))
    assert {i for i in text_ids(made, text, "image") if i >= first} <= tags


@pytest.mark.parametrize("token", ["<|im_end|>", "<|extra_204|>", "<img>", "</ref>", "<imgpad>"])
def test_unless_the_caller_says_so(made, token):
    """The control: the same text with control tokens allowed."""
    identifier = made.convert_tokens_to_ids(token)
    assert identifier in text_ids(made, f"a{token}b", "all")
    assert (identifier in text_ids(made, f"a{token}b", "image")) == (token in IMAGE_TAGS)
    assert made(f"a{token}b")["input_ids"] == text_ids(made, f"a{token}b", "all")


def test_a_tag_that_normalisation_breaks_is_none(made):
    """``>`` and a combining stroke are one character, here as in the original."""
    for ids in (text_ids(made, "<ref>\u0338", "all"), made("<ref>\u0338")["input_ids"]):
        assert made.convert_tokens_to_ids("<ref>") not in ids
        assert made.decode(ids) == "<ref\u226f"


# Folders


def test_a_saved_tokenizer_is_the_same(made, tmp_path):
    made.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    again = load_tokenizer(tmp_path)
    text = "the 12 dogs <ref>你好</ref><|im_end|> Café\n"
    for allowed in ("none", "image", "all"):
        assert text_ids(again, text, allowed) == text_ids(made, text, allowed)
    assert again.backend_tokenizer.to_str() == made.backend_tokenizer.to_str()
    assert again.chat_template == made.chat_template
    assert again.get_added_vocab() == made.get_added_vocab()
    assert again.eos_token == again.pad_token == "<|endoftext|>"
    # The control: the saved file is what was read, not the ranks.
    (tmp_path / "qwen.tiktoken").write_text("damaged", encoding="utf-8")
    assert len(load_tokenizer(tmp_path)) == len(made)


@pytest.mark.slow
def test_the_real_tokenizer_saved_is_the_same(real, golden, shared_data, tmp_path):
    real.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    for case in golden["encode"].values():
        assert original.encode(again, case["text"]) == case["ids"]
    for text in tutorials(shared_data):
        assert again(text)["input_ids"] == real(text)["input_ids"]


def test_a_folder_that_asks_for_foreign_code_gets_none(ranks_folder, tmp_path):
    (tmp_path / "qwen.tiktoken").write_bytes((ranks_folder / "qwen.tiktoken").read_bytes())
    asks = {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]}
    settings = {"tokenizer_class": "QWenTokenizer", "auto_map": asks, "model_max_length": 8192}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (tmp_path / "tokenization_qwen.py").write_text("raise SystemExit(3)", encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.model_max_length == 8192
    tokenizer.save_pretrained(tmp_path / "saved")
    assert "auto_map" not in (tmp_path / "saved" / "tokenizer_config.json").read_text("utf-8")


def test_line_ends_of_another_system_are_read(ranks_folder, tmp_path):
    data = (ranks_folder / "qwen.tiktoken").read_bytes()
    (tmp_path / "qwen.tiktoken").write_bytes(data.replace(b"\n", b"\r\n"))
    assert read_ranks(tmp_path / "qwen.tiktoken") == read_ranks(ranks_folder / "qwen.tiktoken")


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"tokenizer\.json or qwen\.tiktoken"):
        load_tokenizer(tmp_path)


def test_damage_is_named(ranks_folder, tmp_path):
    lines = (ranks_folder / "qwen.tiktoken").read_text("utf-8").splitlines()

    def damaged(*lines: str) -> None:
        (tmp_path / "qwen.tiktoken").write_text("\n".join(lines), encoding="utf-8")
        load_tokenizer(tmp_path)

    damaged(*lines)  # the control
    with pytest.raises(ModelError, match=r"qwen\.tiktoken:3: expected base64"):
        damaged(*lines[:2], "version https://git-lfs", *lines[3:])
    with pytest.raises(ModelError, match=r"1 are missing"):
        damaged(*lines[:255], f"{base64.b64encode(b'xyz').decode()} 255", *lines[256:])
    with pytest.raises(ModelError, match="expected each from 0 on once"):
        damaged(*lines[:-2], lines[-1])
    (tmp_path / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match="cannot be read"):
        load_tokenizer(tmp_path)


def test_a_piece_that_is_a_token_needs_no_merges():
    """Ranks decide, not a history of merges: "abc" is known although "ab" and "bc" are not."""
    ranks = {bytes([value]): value for value in range(256)} | {b"abc": 256}
    backend = make_backend(ranks)
    assert backend.encode("abc").ids == [256]
    assert backend.encode("xabc").ids == by_ranks(ranks, "xabc") == [*b"xabc"]
