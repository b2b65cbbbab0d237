"""The tokenizer of Qwen-VL (2023), made from the ranks in ``qwen.tiktoken``.

Byte-level BPE after NFC; every digit is a token. Of two neighbouring tokens those are merged first
whose joint bytes have the lowest rank. No token is added at a text's beginning or end.
"""

from __future__ import annotations

import base64
import binascii
import re
import unicodedata
from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import TokenizersBackend

from vlmtune.errors import ModelError
from vlmtune.models.plain_text import Place, TextTokenizer
from vlmtune.models.qwen_vl.controls import CONTROLS, END_OF_TEXT, IMAGE_TAGS

RANKS_FILE = "qwen.tiktoken"
BACKEND_FILE = "tokenizer.json"
FILES = {"tokenizer_file": BACKEND_FILE, "vocab_file": RANKS_FILE}
INPUTS = ["input_ids", "attention_mask"]

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = """\
{%- set pictures = namespace(count=0) -%}
{%- if not messages or messages[0]['role'] != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}
{%- set pictures.count = pictures.count + 1 -%}
{{- 'Picture ' ~ pictures.count ~ ': <img><imgpad></img>\\n' -}}
{%- else -%}
{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

# The original pads and ends with the same token.
NAMED = {"eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT}

Allowed = Literal["none", "image", "all"]
ALLOWED: dict[Allowed, tuple[str, ...]] = {"none": (), "image": IMAGE_TAGS, "all": CONTROLS}


class QWenTokenizer(TokenizersBackend):
    """Qwen-VL's tokenizer on the ``tokenizers`` library.

    It has the name that the original folders give in ``tokenizer_config.json``, so that
    ``AutoTokenizer`` finds it there. Called on a text, it takes every control token in it for one;
    ``text_ids`` does not.

    Args:
        tokenizer_file: ``tokenizer.json`` as ``save_pretrained`` writes it.
        vocab_file: ``qwen.tiktoken``; read where there is no ``tokenizer_file``.
        settings: As for every tokenizer of transformers.
    """

    vocab_files_names: dict[str, str] = FILES
    model_input_names: list[str] = INPUTS

    def __init__(
        self, vocab_file: str | None = None, tokenizer_file: str | None = None, **settings: Any
    ) -> None:
        if tokenizer_file is not None:
            self._tokenizer = Tokenizer.from_file(tokenizer_file)
        elif vocab_file is not None:
            self._tokenizer = make_backend(read_ranks(Path(vocab_file)))
        else:
            raise ModelError(f"a Qwen-VL tokenizer needs {BACKEND_FILE} or {RANKS_FILE}")
        settings.pop("auto_map", None)  # names code that is not run here, nor beside a copy
        for name, value in (*NAMED.items(), ("chat_template", CHAT_TEMPLATE)):
            settings[name] = settings.get(name) or value
        super().__init__(**settings)

    @cached_property
    def plain(self) -> TextTokenizer:
        """The same vocabulary without control tokens."""
        return TextTokenizer(self.backend_tokenizer)

    @classmethod
    def convert_to_native_format(
        cls,
        trust_remote_code: bool = False,  # noqa: ARG003
        **arguments: Any,
    ) -> dict[str, Any]:
        """What ``__init__`` takes; nothing is read before."""
        return arguments

    def save_vocabulary(
        self,
        save_directory: str,  # noqa: ARG002
        filename_prefix: str | None = None,  # noqa: ARG002
    ) -> Any:
        """Nothing: ``tokenizer.json`` holds the vocabulary."""
        return ()


def load_tokenizer(folder: str | Path) -> QWenTokenizer:
    """The tokenizer of a folder with ``tokenizer.json``, or with ``qwen.tiktoken`` alone.

    Raises:
        ModelError: If neither is there, or one cannot be read.
    """
    folder = Path(folder)
    if not any((folder / name).is_file() for name in (BACKEND_FILE, RANKS_FILE)):
        raise ModelError(
            f"{folder} has no tokenizer; expected {BACKEND_FILE} or {RANKS_FILE}. Fetch the model "
            "again"
        )
    try:
        tokenizer = QWenTokenizer.from_pretrained(str(folder))
    except ModelError:
        raise
    except Exception as error:  # the errors of tokenizers have no other class
        raise ModelError(f"{folder}: the tokenizer cannot be read: {error}") from error
    assert isinstance(tokenizer, QWenTokenizer)
    return tokenizer


def text_ids(tokenizer: QWenTokenizer, text: str, allowed: Allowed = "none") -> list[int]:
    """Ids of a text in which only the allowed control tokens are more than text.

    Args:
        tokenizer: Qwen-VL's.
        text: Any text.
        allowed: ``"none"``; ``"image"`` for the nine tags of images, phrases and boxes; ``"all"``.
    """
    text = unicodedata.normalize("NFC", text)
    controls = tokenizer.get_added_vocab()
    ids: list[int] = []
    for piece in _splitter(allowed).split(text):
        if piece in ALLOWED[allowed]:
            ids.append(controls[piece])
        elif piece:
            ids += tokenizer.plain.ids(piece, Place.WITHIN)
    return ids


def token_bytes(tokenizer: QWenTokenizer, ids: Sequence[int]) -> bytes:
    """The bytes that ids stand for; a character may be cut at either end."""
    controls = tokenizer.get_added_vocab()
    found = bytearray()
    for token in tokenizer.convert_ids_to_tokens(list(ids)):
        if token in controls:
            found += token.encode()
        else:
            found += bytes(_byte_values()[character] for character in token)
    return bytes(found)


def read_ranks(path: Path) -> dict[bytes, int]:
    """Ranks of byte sequences, one a line: base64, a blank, the rank.

    Raises:
        ModelError: If the file is damaged or is not of this form.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise ModelError(
                f"{path}:{number}: expected base64, a blank and a rank, found {line[:40]!r}. "
                "Fetch the model again"
            ) from error
    missing = 256 - sum(bytes([value]) in ranks for value in range(256))
    if missing or sorted(ranks.values()) != list(range(len(ranks))):
        raise ModelError(
            f"{path}: {len(ranks)} ranks; expected each from 0 on once, and every single byte "
            f"({missing} are missing). Fetch the model again"
        )
    return ranks


def make_backend(ranks: dict[bytes, int]) -> Tokenizer:
    """The ranks as a tokenizer with merges.

    Every way to cut a token into two known ones is a merge, as the ranks alone decide what is
    merged, not the history of the vocabulary. ``ignore_merges``: a piece that is a token is one.
    """
    characters = {value: character for character, value in _byte_values().items()}
    # latin-1 gives every byte the character of its value, which ``translate`` then replaces.
    vocabulary = {
        token.decode("latin-1").translate(characters): rank for token, rank in ranks.items()
    }
    merges: list[tuple[str, str]] = []
    for token in sorted(vocabulary, key=vocabulary.__getitem__):
        cuts = [(token[:place], token[place:]) for place in range(1, len(token))]
        known = [cut for cut in cuts if cut[0] in vocabulary and cut[1] in vocabulary]
        merges += sorted(known, key=lambda cut: (vocabulary[cut[0]], vocabulary[cut[1]]))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    # Looked for in the normalised text, as by the original: NFC may change a tag's last character.
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=True) for token in CONTROLS]
    )
    return tokenizer


@cache
def _byte_values() -> dict[str, int]:
    """GPT-2's characters for bytes: visible ones stand for themselves, others for 256 and up."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in visible]
    return {
        **{chr(value): value for value in visible},
        **{chr(256 + place): value for place, value in enumerate(others)},
    }


@cache
def _splitter(allowed: Allowed) -> re.Pattern[str]:
    longest_first = sorted(ALLOWED[allowed], key=len, reverse=True)
    # Without an alternative the group would match the empty text between any two characters.
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
