"""Small tokenizers of the two kinds that the families have."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CORPUS = [
    r"\frac { 1 } { 2 } x ^ { 2 } + \sum _ { i = 0 } ^ { n } a _ { i } = \int _ { 0 } ^ { \infty }",
    r"\left( \alpha \beta \gamma \delta \lambda \right) \sqrt { x } \partial _ { t } \mathrm { e }",
    r"\operatorname { s i n } \theta \cdot \hat { p } \bar { q } \to \phi \psi \pi , \quad \dots",
    "You are a helpful assistant. Describe this picture in one sentence, please.",
    "A man is riding a brown horse on the beach while two dogs are playing with a red ball.",
    "What is the total amount on the invoice? The answer is 1234567890.",
    "system\nuser\nassistant\n",
    "目标是读取用户输入的照片，转换成公式。这是什么？框出图中的位置。",
]


def byte_level_bpe(
    size: int, controls: list[str], *, end: str, pad: str, **named: str
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with Qwen2's pre-tokenizer, trained on a few lines.

    Args:
        size: Pieces of text in the vocabulary.
        controls: Control tokens after them.
        end: The end-of-text token.
        pad: The padding token.
        **named: Control tokens that the family's processor asks the tokenizer for by these names.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    split = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(size, 512),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(controls)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=end,
        pad_token=pad,
        additional_special_tokens=controls,
        extra_special_tokens=named,
        model_max_length=32768,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def sentencepiece_bpe(
    size: int, controls: list[str], *, end: str = "</s>", pad: str = "<unk>", **named: str
) -> PreTrainedTokenizerFast:
    """A BPE tokenizer as converted from SentencePiece: blanks are ``▁``, unknown letters bytes.

    It puts ``<s>`` before a text and a blank before each stretch of it, as Llama's and Mistral's
    do. The arguments are those of ``byte_level_bpe``.
    """
    from tokenizers import (
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    fixed = ["<unk>", "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    # Trained word by word, so that a blank stands only at a piece's beginning, as in real ones.
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=max(size, 480),
        special_tokens=[*fixed, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.pre_tokenizer = None
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    # Bytes are pieces of text, not control tokens; the trainer knows only the latter.
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < len(fixed)]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.add_special_tokens(controls)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", fixed.index("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token=end,
        unk_token="<unk>",
        pad_token=pad,
        additional_special_tokens=controls,
        extra_special_tokens=named,
        model_max_length=32768,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
