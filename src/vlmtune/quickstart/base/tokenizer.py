r"""The base's tokenizer: byte-level BPE in which ``\frac``, ``{`` and each word are one token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from vlmtune.formulas.notation import RULES, SAID
from vlmtune.quickstart.words import ENGLISH, MORE_COMMANDS, SHAPE_WORDS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VOCABULARY = 2048
CONTROLS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>",
    "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
# A command with its backslash is one piece; every digit and every mark stands alone.
PIECES = r" ?\\?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]|\s+(?!\S)|\s+"

TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def latex_pieces() -> list[str]:
    """Every LaTeX token that a formula of the grammar can hold, sorted."""
    pieces = {word for latex, _ in RULES.values() for word in latex if word != "@"}
    return sorted(pieces | set(SAID))


def spoken_words() -> list[str]:
    """Every word that a formula can be said with, sorted."""
    words = {word for _, said in RULES.values() for word in said if word != "@"}
    return sorted(words.union(*(said.split() for said in SAID.values())))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer, with the family's control tokens; its ChatML asks for no system turn."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(CONTROLS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.add_special_tokens(list(CONTROLS))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(CONTROLS),
        model_max_length=32768,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = TEMPLATE
    return fast


def _corpus() -> Iterator[str]:
    """Words to be whole tokens, weighted: what occurs often is merged first."""
    for word in (*latex_pieces(), *spoken_words()):
        yield f"{word} {word}"
    for word in ("user", "assistant", "system", *SHAPE_WORDS, *spoken_words(), *latex_pieces()):
        yield f"{word} {word}"
        yield f" {word}"
    for word in ENGLISH:
        yield f" {word}"
        yield f"{word} {word}"
    for command in MORE_COMMANDS:
        yield f" \\{command}"
