"""List forms, contexts, answers and training rows, against the original's."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiny_rows import picture, row, turn
from vlmtune.data.conversation import Box, Message, Text
from vlmtune.data.formats.qwen_markup import parse
from vlmtune.errors import ModelError, RowError
from vlmtune.models.encode import IGNORED
from vlmtune.models.qwen_vl import original
from vlmtune.models.qwen_vl.chat import Chat, turns_that_fit
from vlmtune.models.qwen_vl.markup import elements, from_list_format, to_list_format
from vlmtune.models.qwen_vl.tokenization import text_ids

# Lists


def test_lists_become_the_originals_texts(golden, real):
    for case in golden["from_list_format"].values():
        assert from_list_format(case["list"]) == case["text_hub"]
        assert from_list_format(case["list"], blank=False) == case["text_int4"]
        assert original.encode(real, case["text_hub"]) == case["ids_hub"]
    interleaved = golden["from_list_format"]["interleaved"]
    assert from_list_format(reversed(interleaved["list"])) != interleaved["text_hub"]


@pytest.mark.parametrize(
    "element", [{"video": "x"}, {}, {"box": [[1, 2, 3]]}, {"box": 3}, {"box": [["a", 1, 2, 3]]}]
)
def test_what_is_no_element_is_named(element):
    with pytest.raises(RowError, match="found the element") as caught:
        from_list_format([{"text": "a"}, element])
    assert str(element) in str(caught.value)


def test_texts_become_the_originals_lists(golden):
    for case in golden["to_list_format"].values():
        assert to_list_format(case["text"]) == case["list"]
    with pytest.raises(RowError, match=r"<\|im_end\|>"):
        to_list_format("a<|im_end|>b")


def test_a_tag_without_its_partner_is_text():
    text = "</box> <ref>a <box>(1,2)</ref> </quad><img>"
    assert list(elements(text)) == [
        ("", "</box> "),
        ("ref", "a <box>(1,2)"),
        ("", " </quad><img>"),
    ]


@given(st.lists(st.sampled_from(["a", "<ref>", "</ref>", "<box>", "</box>", "<img>", "</img>"])))
def test_elements_lose_nothing(pieces):
    text = "".join(pieces)
    assert text == "".join(f"<{t}>{c}</{t}>" if t else c for t, c in elements(text))


def test_a_hostile_text_is_read_in_linear_time():
    assert len(list(elements("<box>" * 20_000 + "</ref>" * 20_000))) == 1


# Contexts


def contexts(golden):
    for name, case in golden["make_context"].items():
        settings = dict(case["kwargs"])
        settings["history"] = settings.get("history") or ()
        if settings.pop("chat_format", "chatml") == "chatml":
            settings["window"] = settings.pop("max_window_size", 6144)
            yield name, case, settings


def test_contexts_are_the_originals(golden, real):
    found = [name for name, *_ in contexts(golden)]
    assert len(found) == 7
    for _, case, settings in contexts(golden):
        context = original.make_context(real, **settings)
        assert (context.text, context.ids) == (case["raw_text"], case["ids"])
    raw = golden["make_context"]["raw"]  # without chat: the question as it stands
    assert original.encode(real, raw["kwargs"]["query"]) == raw["ids"]


def test_the_window_decides(golden, real):
    """The control: with room for all, or for none, the truncated context is another."""
    case = golden["make_context"]["window_truncates"]
    settings = {**case["kwargs"]}
    del settings["max_window_size"]
    lengths = {
        len(original.make_context(real, **settings, window=window).ids) for window in (0, 60, 6144)
    }
    assert len(lengths) == 3
    assert len(case["ids"]) == sorted(lengths)[1]


@given(st.lists(st.integers(1, 9), max_size=6), st.integers(1, 9), st.integers(0, 40))
def test_turns_fit_from_the_latest_on(lengths, system, window):
    kept = turns_that_fit(lengths, system=system, window=window)
    assert 0 <= kept <= len(lengths)
    assert kept == 0 or system + sum(lengths[len(lengths) - kept :]) < window
    more = lengths[len(lengths) - kept - 1 :]
    assert kept == len(lengths) or system + sum(more) >= window


def test_the_tiny_models_second_question(golden_model, small):
    (first, _), second = golden_model["chat"], golden_model["chat_second_context_ids"]
    history = [(first["query"], first["response"])]
    context = original.make_context(
        small, golden_model["chat"][1]["query"], history, system=original.SYSTEM
    )
    assert context.ids == second


def test_stop_words(golden, real):
    for chat_format, words in golden["stop_words"].items():
        assert original.stop_words(real, chat_format) == words


def test_answers_are_cut_as_in_the_original(golden, real):
    settings = golden["make_context"]["single"]["kwargs"]
    context = original.make_context(real, settings["query"], system=settings["system"])
    for case in golden["decode_tokens"]:
        answer = original.decode_answer(real, context, case["generated"])
        assert answer == case["response"]


def test_the_latest_picture(golden):
    case = golden["latest_picture"]
    history = [tuple(each) for each in case["history"]]
    assert original.latest_picture("<box>(1,2),(3,4)</box>", history) == case["result"]
    answer = "Picture 3: <img>c.png</img>"
    assert original.latest_picture(answer, history) == case["in_response"]
    assert original.latest_picture("no", [("no", "<img>d.png</img>")]) == case["none"]


# Training rows


def test_training_rows_are_the_originals(golden, real):
    rows = {each["id"]: each["conversations"] for each in golden["sample_json"]}
    for name, case in golden["finetune_preprocess"].items():
        turns = rows[name.partition("@")[0]]
        example = original.training_example(real, turns, case["max_len"])
        length = case["n_real"]
        assert len(example.ids) == len(example.labels) == case["total_len"]
        assert example.ids[:length] == case["input_ids_unpadded"]
        assert example.labels[:length] == case["labels_unpadded"]
        assert set(example.ids[length:]) <= {real.pad_token_id}
        assert set(example.labels[length:]) <= {IGNORED}
        assert example.mask == [each != real.pad_token_id for each in example.ids]
        assert sum(label != IGNORED for label in example.labels) == case["supervised"]
    assert len(golden["finetune_preprocess"]) == 8


def test_the_tiny_models_training_rows(golden_model, small):
    train = golden_model["train"]
    length = train["model_max_length"]
    for name, turns in train["conversations"].items():
        example = original.training_example(small, turns, length)
        assert (example.ids, example.labels) == (
            train[name]["input_ids"][0],
            train[name]["labels"][0],
        )


def test_ours_trains_on_the_answers_and_their_ends_only(golden, real, encoder_with):
    """The same ids as the original's without paths; of its labels, the answers' alone."""
    turns = golden["sample_json"][1]["conversations"]
    image = picture((640, 480))
    images: list[str] = []
    messages = []
    for each in turns:
        parts, _ = parse(each["value"], images)
        messages.append(Message(each["from"], tuple(_in_pixels(part) for part in parts)))
    tokens = encoder_with(real).tokens(row(*messages, images=(image,)))
    example = original.training_example(real, turns, len(tokens))
    assert tokens.ids.tolist() == without_paths(real, example.ids)
    answers = "".join(real.decode([label]) for label in tokens.labels if label != IGNORED)
    assert answers == "<|im_end|>".join(
        [*(each["value"] for each in turns if each["from"] == "assistant"), ""]
    )
    assert 0 < tokens.trained < sum(label != IGNORED for label in example.labels)


def _in_pixels(part):
    if not isinstance(part, Box):
        return part
    x1, y1, x2, y2 = part.xyxy
    return Box(part.image, part.label, (x1 * 0.64, y1 * 0.48, x2 * 0.64, y2 * 0.48))


# The chat of vlmtune: the encoder's tokens are the original's, images are images


def without_paths(tokenizer, ids):
    """What the native model is fed: placeholders where the original wrote a path."""
    start, end, pad = tokenizer.convert_tokens_to_ids(["<img>", "</img>", "<imgpad>"])
    within, replaced = False, []
    for identifier in ids:
        within = within and identifier != end
        replaced.append(pad if within else identifier)
        within = within or identifier == start
    return replaced


def conversation(settings, sizes=(64, 48)):
    """A golden chat as a conversation with images; paths are read by the formats."""
    images: list[str] = []
    messages = [turn("system", settings["system"])]
    for question, answer in (*settings["history"], (settings["query"], None)):
        messages.append(Message("user", parse(question, images)[0]))
        if answer is not None:
            messages.append(turn("assistant", answer))
    return row(*messages, images=tuple(picture(sizes, seed=n) for n in range(len(images))))


@pytest.mark.parametrize("name", ["single", "history", "window_truncates", "empty_system"])
def test_the_encoder_asks_as_the_original(golden, real, encoder_with, name):
    settings = dict(golden["make_context"][name]["kwargs"])
    settings["history"] = settings["history"] or []
    chat = Chat(encoder_with(real), window=settings.get("max_window_size", 6144))
    asked = chat.context(conversation(settings))
    expected = golden["make_context"][name]["ids"]
    assert asked.tokens.ids.tolist() == without_paths(real, expected)
    assert asked.positions.shape == (1, len(expected))
    assert asked.tokens.visual == 256 * len(asked.tokens.image_sizes)


def test_every_window_keeps_what_the_original_keeps(made, encoder_with):
    history = [("old", "r0"), ("<|im_end|>", "r1"), ("new", "")]
    settings = {"query": "q", "history": history, "system": "S"}
    encoder, seen = encoder_with(made), set()
    for window in range(70):
        expected = original.make_context(made, **settings, window=window).ids
        asked = Chat(encoder, window=window).context(conversation(settings))
        assert asked.tokens.ids.tolist() == expected
        seen.add(len(expected))
    assert len(seen) == 4  # the control: none to all three turns were kept


def test_injected_turns_stay_text(golden, real, encoder_with):
    case = golden["make_context"]["injection"]
    settings = {**case["kwargs"], "history": []}
    asked = Chat(encoder_with(real)).context(conversation(settings))
    assert asked.tokens.ids.tolist() == case["ids"]
    assert asked.tokens.ids.tolist() != original.encode(real, case["raw_text"])


def test_an_answer_with_boxes_is_the_same_history(golden, real, encoder_with):
    """``reply`` makes boxes of the answer's tags; as text they would be no control tokens."""
    case = golden["make_context"]["two_turns_two_images"]
    settings = case["kwargs"]
    (_, first), (_, boxed) = settings["history"]
    chat = Chat(encoder_with(real))
    whole = conversation(settings)
    questions = [message for message in whole.messages if message.role == "user"]

    grown = row(whole.messages[0], images=whole.images)
    for question, answer in zip(questions, (first, boxed, None), strict=True):
        grown = row(*grown.messages, question, images=whole.images)
        if answer is not None:
            ids = [*text_ids(real, answer, "image"), chat.stop_ids[0], 151643]
            assert chat.answer(ids) == answer
            grown = chat.reply(grown, ids)
    assert grown.messages[4].content == (Box(1, "x", (0.064, 0.096, 0.192, 0.192)),)
    assert chat.context(grown).tokens.ids.tolist() == without_paths(real, case["ids"])
    # The control: the same answers as text.
    assert chat.context(whole).tokens.ids.tolist() != without_paths(real, case["ids"])


def long_chat(turns):
    """A chat whose every question has a picture of its own size."""
    images = tuple(picture((20 + number, 30)) for number in range(turns + 1))
    messages: list[Message] = []
    for number in range(turns):
        messages += [turn("user", number, f"q{number}"), turn("assistant", f"r{number}")]
    return row(*messages, turn("user", turns, "last"), images=images)


@pytest.mark.parametrize("system_prompt", [None, "Be brief."])
def test_pictures_keep_their_numbers_when_the_oldest_leave(made, encoder_with, system_prompt):
    encoder = encoder_with(made, system_prompt=system_prompt)
    whole = Chat(encoder).context(long_chat(3)).tokens
    counts = []
    for window in range(0, len(whole) + 50, 100):
        tokens = Chat(encoder, window=window).context(long_chat(3)).tokens
        text = made.decode([i for i, image in zip(tokens.ids, tokens.image_mask) if not image])  # noqa: B905
        numbers = [number for number in range(1, 5) if f"Picture {number}:" in text]
        widths = [size.width for size in tokens.image_sizes]
        assert widths == [19 + number for number in numbers]
        assert numbers == list(range(5 - len(numbers), 5))
        assert text.count("<|im_start|>") == 2 * len(numbers) + 1
        assert text.startswith(f"<|im_start|>system\n{system_prompt or original.SYSTEM}<|im_end|>")
        assert text.endswith("<|im_start|>assistant\n")
        counts.append(len(numbers))
    assert counts == sorted(counts)
    assert set(counts) == {1, 2, 3, 4}  # the control: every length of history occurred
    np.testing.assert_array_equal(tokens.ids, whole.ids)


def test_the_context_holds_no_answer_and_no_closed_turn_of_it(made, encoder_with):
    chat = Chat(encoder_with(made))
    asked = row(turn("user", "q"))
    answered = row(turn("user", "q"), turn("assistant", "old answer"))
    first, second = (chat.context(each).tokens.ids.tolist() for each in (asked, answered))
    assert first == second


def test_another_familys_encoder_is_refused():
    parts = SimpleNamespace(tokenizer="another")
    with pytest.raises(ModelError, match="found str"):
        Chat(SimpleNamespace(family=SimpleNamespace(parts=parts)))  # type: ignore[arg-type]


# Answers


@pytest.fixture(scope="module")
def chat(made, encoder_with):
    return Chat(encoder_with(made))


@pytest.mark.parametrize("stop", [0, 1, 2])
def test_an_answer_ends_at_any_stop(made, chat, stop):
    names = made.convert_ids_to_tokens(list(chat.stop_ids))
    assert names == ["<|im_end|>", "<|im_start|>", "<|endoftext|>"]
    ids = text_ids(made, " <ref>狗</ref> ", "image")
    rest = text_ids(made, "unread")
    assert chat.answer([*ids, chat.stop_ids[stop], *rest]) == "<ref>狗</ref>"
    assert chat.answer([*ids, *rest]) == "<ref>狗</ref> unread"  # nothing is lost without a stop
    assert chat.answer([]) == ""


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=12), st.integers(0, 255))
def test_what_is_said_so_far_begins_the_answer(made, chat, text, odd):
    """At every token, also in the middle of a character, and with a byte that is no text."""
    ids = [*text_ids(made, text), odd, *text_ids(made, "狗。"), chat.stop_ids[0]]
    said = [chat.so_far(ids[:length]) for length in range(len(ids) + 1)]
    assert said[-1] == chat.answer(ids)
    for before, after in itertools.pairwise(said):
        assert after.startswith(before)


def test_half_a_character_is_held_back(made, chat):
    cut = [*text_ids(made, "a"), made.convert_tokens_to_ids("ç")]  # the first byte of three
    assert chat.so_far(cut) == "a"
    assert chat.answer(cut) == "a\ufffd"  # the control


# The template


def test_the_template_numbers_pictures_over_the_whole_conversation(made):
    content = [{"type": "image"}, {"type": "text", "text": "a"}, {"type": "image"}]
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": [{"type": "image"}]},
    ]
    text = made.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    image = "Picture {}: <img><imgpad></img>\n"
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{image.format(1)}a{image.format(2)}<|im_end|>\n"
        "<|im_start|>assistant\nb<|im_end|>\n"
        f"<|im_start|>user\n{image.format(3)}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    messages.insert(0, {"role": "system", "content": "S"})
    own = made.apply_chat_template(messages, tokenize=False)
    assert own.startswith("<|im_start|>system\nS<|im_end|>\n<|im_start|>user")


def test_lists_and_datasets_agree(golden):
    """What ``from_list_format`` writes is what the data formats read."""
    for case in golden["from_list_format"].values():
        images: list[str] = ["before.png"]
        parts, notes = parse(from_list_format(case["list"]), images)
        assert images[1:] == [each["image"] for each in case["list"] if "image" in each]
        boxes = [part for part in parts if isinstance(part, Box)]
        assert len(boxes) == sum(len(each.get("box", ())) for each in case["list"])
        assert not any("<" in part.text for part in parts if isinstance(part, Text))
        assert not notes
