"""Tiny models of the Gemma line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from vlmtune.testing.layout import HALF, seeded, token_id, write_folder, write_json
from vlmtune.testing.size import TinySize
from vlmtune.testing.vocabulary import CORPUS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# As the instruction-tuned Gemma 3 models on the hubs have it: the beginning of text is the
# template's own, a system turn opens the first user turn, texts are trimmed, the assistant is
# "model".
GEMMA_TEMPLATE = (
    "{{ bos_token }}"
    "{% set system = messages[0]['role'] == 'system' %}"
    "{% set words = messages[0]['content'] %}"
    "{% set opening = '' if not system else"
    " (words if words is string else words[0]['text']) + '\n\n' %}"
    "{% for message in (messages[1:] if system else messages) %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "<start_of_turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{{ opening if loop.first else '' }}"
    "{% if message['content'] is string %}{{ message['content'] | trim }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<start_of_image>"
    "{% elif part['type'] == 'text' %}{{ part['text'] | trim }}{% endif %}"
    "{% endfor %}{% endif %}<end_of_turn>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# Pieces of text that the author of the vocabulary defined: added tokens that are not special.
SYMBOLS = ("\n", "\n\n", "\n\n\n", "\n\n\n\n", "▁▁", "<table>")
CONTROLS = ("<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>")
SOFT = "<image_soft_token>"  # the only one behind the vocabulary
TOKENS_PER_IMAGE, PATCHES, PATCH = 16, 8, 14  # patches along a side, averaged two by two


def gemma3(folder: Path, seed: int, size: TinySize) -> None:
    """Gemma 3: SigLIP, averaged patches; all layers but the last have a sliding window.

    The window is narrower than an image, so that each cuts into the other.
    """
    import torch
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    tokenizer = _tokenizer(size)
    heads = size.hidden // 16
    config = Gemma3Config(
        text_config={
            "vocab_size": size.vocabulary,
            "hidden_size": size.hidden,
            "intermediate_size": 2 * size.hidden,
            "num_hidden_layers": size.layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads // 2,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "max_position_embeddings": 32768,
            "sliding_window": 12,
            "sliding_window_pattern": size.layers,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "hidden_size": size.vision_width,
            "intermediate_size": 2 * size.vision_width,
            "num_hidden_layers": size.vision_layers,
            "num_attention_heads": size.vision_width // 16,
            "image_size": PATCHES * PATCH,
            "patch_size": PATCH,
            "vision_use_head": False,
        },
        mm_tokens_per_image=TOKENS_PER_IMAGE,
        boi_token_index=token_id(tokenizer, "<start_of_image>"),
        eoi_token_index=token_id(tokenizer, "<end_of_image>"),
        image_token_index=token_id(tokenizer, SOFT),
    )
    model = seeded(Gemma3ForConditionalGeneration, config, seed)
    # Fresh, it is zero: no image would change anything.
    projection = model.get_parameter("model.multi_modal_projector.mm_input_projection_weight")
    torch.nn.init.normal_(projection, std=0.02, generator=torch.Generator().manual_seed(seed))
    write_folder(
        folder,
        model,
        tokenizer,
        {
            "image_processor_type": "Gemma3ImageProcessor",
            "processor_class": "Gemma3Processor",
            "do_convert_rgb": None,
            "do_normalize": True,
            "do_pan_and_scan": None,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": HALF,
            "image_std": HALF,
            "image_seq_length": TOKENS_PER_IMAGE,
            "rescale_factor": 1 / 255,
            "resample": 2,
            "size": {"height": PATCHES * PATCH, "width": PATCHES * PATCH},
        },
        ends=("<eos>", "<end_of_turn>"),
    )
    write_json(
        folder / "processor_config.json",
        {"processor_class": "Gemma3Processor", "image_seq_length": TOKENS_PER_IMAGE},
    )


def _tokenizer(size: TinySize) -> PreTrainedTokenizerFast:
    """SentencePiece's BPE without a blank before the text, and with symbols of its author's."""
    from tokenizers import (
        AddedToken,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    fixed = ["<pad>", "<eos>", "<bos>", "<unk>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    pieces = [*fixed, *CONTROLS, *SYMBOLS, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=max(size.vocabulary - 1, 480), special_tokens=pieces, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    # Bytes and symbols are pieces of text, not control tokens; the trainer knows only the latter.
    state = json.loads(tokenizer.to_str())
    special = {*fixed, *CONTROLS}
    state["added_tokens"] = [each for each in state["added_tokens"] if each["content"] in special]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.add_tokens(
        [AddedToken(symbol, normalized=False, special=False) for symbol in SYMBOLS]
    )
    tokenizer.add_special_tokens([SOFT])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A",
        pair="<bos> $A <bos> $B",
        special_tokens=[("<bos>", fixed.index("<bos>"))],
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        pad_token="<pad>",
        additional_special_tokens=list(CONTROLS[:2]),
        extra_special_tokens={
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": SOFT,
        },
        model_max_length=32768,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    made.chat_template = GEMMA_TEMPLATE
    return made
