"""transformers' own processors, which ours must equal; without their video parts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from generic_models import SHOWING
from tiny_rows import reference_processor


def settings_of(folder: Path, name: str) -> dict[str, Any]:
    """A JSON file of a folder, without the names of classes."""
    import json

    path = folder / name
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {key: value for key, value in found.items() if key != "processor_class"}


def internvl(folder: Path) -> Any:
    import re

    from transformers import AutoTokenizer, GotOcr2ImageProcessorPil, InternVLProcessor

    class ImageOnly(InternVLProcessor):
        @classmethod
        def get_attributes(cls) -> list[str]:
            return ["image_processor", "tokenizer"]

        def __init__(self, image_processor, tokenizer, image_seq_length, chat_template):
            super(InternVLProcessor, self).__init__(
                image_processor, tokenizer, chat_template=chat_template
            )
            self.image_seq_length = image_seq_length
            self.start_image_token = tokenizer.start_image_token
            self.end_image_token = tokenizer.end_image_token
            self.image_token = tokenizer.context_image_token
            self.image_token_id = tokenizer.context_image_token_id
            self.video_token = tokenizer.video_token
            self.multimodal_pattern = re.compile(f"(?P<image>{re.escape(self.image_token)})")

    return ImageOnly(
        GotOcr2ImageProcessorPil.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
        chat_template=(folder / "chat_template.jinja").read_text(encoding="utf-8"),
        **settings_of(folder, "processor_config.json"),
    )


def gemma3(folder: Path) -> Any:
    from transformers import AutoTokenizer, Gemma3ImageProcessorPil, Gemma3Processor

    return Gemma3Processor(
        Gemma3ImageProcessorPil.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
        chat_template=(folder / "chat_template.jinja").read_text(encoding="utf-8"),
        **settings_of(folder, "processor_config.json"),
    )


def idefics2(folder: Path) -> Any:
    from transformers import AutoTokenizer, Idefics2ImageProcessorPil, Idefics2Processor

    return Idefics2Processor(
        Idefics2ImageProcessorPil.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
        chat_template=(folder / "chat_template.jinja").read_text(encoding="utf-8"),
        **settings_of(folder, "processor_config.json"),
    )


def idefics3(folder: Path) -> Any:
    from transformers import AutoTokenizer, Idefics3ImageProcessorPil, Idefics3Processor

    return Idefics3Processor(
        Idefics3ImageProcessorPil.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
        chat_template=(folder / "chat_template.jinja").read_text(encoding="utf-8"),
        **settings_of(folder, "processor_config.json"),
    )


def smolvlm(folder: Path) -> Any:
    from transformers import AutoTokenizer, ProcessorMixin, SmolVLMImageProcessorPil
    from transformers.models.smolvlm.processing_smolvlm import SmolVLMProcessor

    class ImageOnly(SmolVLMProcessor):
        # What the class does with conversations is about videos alone.
        apply_chat_template = ProcessorMixin.apply_chat_template

        @classmethod
        def get_attributes(cls) -> list[str]:
            return ["image_processor", "tokenizer"]

        def __init__(self, image_processor, tokenizer, image_seq_len, chat_template):
            self.fake_image_token = "<fake_token_around_image>"
            self.image_token, self.global_image_token = "<image>", "<global-img>"
            self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
            self.image_seq_len = image_seq_len
            super(SmolVLMProcessor, self).__init__(
                image_processor, tokenizer, chat_template=chat_template
            )

    return ImageOnly(
        SmolVLMImageProcessorPil.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
        settings_of(folder, "processor_config.json")["image_seq_len"],
        (folder / "chat_template.jinja").read_text(encoding="utf-8"),
    )


def llava(folder: Path) -> Any:
    from transformers import AutoTokenizer, CLIPImageProcessorPil, LlavaProcessor

    return LlavaProcessor(
        CLIPImageProcessorPil.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
        chat_template=(folder / "chat_template.jinja").read_text(encoding="utf-8"),
        **settings_of(folder, "processor_config.json"),
    )


class SideBySide:
    """A processor whose images' views follow each other, without those that pad to the most.

    transformers pads all images to the same number of views; its models take the padding off again
    or get the views like this.
    """

    def __init__(self, processor: Any, views_of: Callable[[Any, Any], list[int]]) -> None:
        self.processor, self.views_of = processor, views_of

    def apply_chat_template(self, chat: Any, **options: Any) -> Any:
        output = self.processor.apply_chat_template(chat, **options)
        if "pixel_values" in output:
            views = self.views_of(output, self.processor.image_processor)
            padded = output["pixel_values"]
            output["pixel_values"] = torch.cat(
                [each[:count] for each, count in zip(padded, views, strict=True)]
            )
        return output


def llava_next(folder: Path) -> Any:
    from transformers import AutoTokenizer, LlavaNextImageProcessorPil, LlavaNextProcessor
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    def views(output, processor):
        grids, side = processor.image_grid_pinpoints, output["pixel_values"].shape[-1]
        return [image_size_to_num_patches(size, grids, side) for size in output["image_sizes"]]

    processor = LlavaNextProcessor(
        LlavaNextImageProcessorPil.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
        chat_template=(folder / "chat_template.jinja").read_text(encoding="utf-8"),
        **settings_of(folder, "processor_config.json"),
    )
    return SideBySide(processor, views)


def llava_onevision(folder: Path) -> Any:
    from transformers import AutoTokenizer, LlavaOnevisionImageProcessorPil
    from transformers.models.llava_onevision.modeling_llava_onevision import (
        image_size_to_num_patches,
    )
    from transformers.models.llava_onevision.processing_llava_onevision import (
        LlavaOnevisionProcessor,
    )

    class ImageOnly(LlavaOnevisionProcessor):
        @classmethod
        def get_attributes(cls) -> list[str]:
            return ["image_processor", "tokenizer"]

        def __init__(self, image_processor, tokenizer, chat_template, **settings):
            vars(self).update(settings)
            self.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
            super(LlavaOnevisionProcessor, self).__init__(
                image_processor, tokenizer, chat_template=chat_template
            )

        def apply_chat_template(self, chat, **options):
            """The last answer as it is asked for: its line without a blank before it."""
            if chat[-1]["role"] == "assistant":
                asked = "<|im_start|>assistant\n{{ messages[-1]['content'][0]['text'] }}"
                last = self.chat_template + asked + "<|im_end|>"
                options["chat_template"] = last.replace("in messages %}", "in messages[:-1] %}", 1)
            return super().apply_chat_template(chat, **options)

    def views(output, processor):
        if output["batch_num_images"].tolist() != [1]:
            return [1] * len(output["image_sizes"])
        grids, side = processor.image_grid_pinpoints, output["pixel_values"].shape[-1]
        return [image_size_to_num_patches(size, grids, side) for size in output["image_sizes"]]

    processor = ImageOnly(
        LlavaOnevisionImageProcessorPil.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
        (folder / "chat_template.jinja").read_text(encoding="utf-8"),
        **settings_of(folder, "processor_config.json"),
    )
    return SideBySide(processor, views)


class FirstQwenVL:
    """The text rules of 2023 written out, their paths replaced by placeholders.

    transformers never had a processor of the first Qwen-VL. ``original`` equals what its own code
    gave (see tests/models/qwen_vl), and so do the pixels.
    """

    def __init__(self, folder: Path) -> None:
        from vlmtune.models.qwen_vl.tokenization import load_tokenizer

        self.tokenizer = load_tokenizer(folder)
        self.visual = settings_of(folder, "config.json")["visual"]

    def apply_chat_template(self, chat: Any, add_generation_prompt: bool, **_: Any) -> Any:
        from vlmtune.models.qwen_vl.original import SYSTEM, encode
        from vlmtune.models.qwen_vl.pixels import pixel_values

        start, end = self.tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
        line = encode(self.tokenizer, "\n")
        pictures: list[Any] = []
        turns = [] if chat[0]["role"] == "system" else [("system", SYSTEM)]
        for message in chat:
            said = ""
            for part in message["content"]:
                if part["type"] == "image":
                    pictures.append(part["image"])
                    said += f"Picture {len(pictures)}: <img>{len(pictures)}.png</img>\n"
                else:
                    said += part["text"]
            turns.append((message["role"], said))
        ids: list[int] = []
        for role, said in turns:
            content = self.without_paths(encode(self.tokenizer, said, "image"))
            ids += [start, *encode(self.tokenizer, role), *line, *content, end, *line]
        if add_generation_prompt:
            ids += [start, *encode(self.tokenizer, "assistant"), *line]
        output = {"input_ids": torch.tensor([ids])}
        if pictures:
            side = self.visual["image_size"]
            values = [pixel_values(picture, side) for picture in pictures]
            output["pixel_values"] = torch.stack(values)
        return output

    def without_paths(self, ids: list[int]) -> list[int]:
        start = self.visual["image_start_id"]
        replaced: list[int] = []
        while start in ids:
            place = ids.index(start)
            replaced += [*ids[: place + 1], *[start + 2] * self.visual["n_queries"]]
            ids = ids[ids.index(start + 1, place) :]
        return replaced + ids


def automatic(folder: Path) -> Any:
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(folder)


REFERENCES: dict[str, Callable[[Path], Any]] = {
    "qwen2_vl": reference_processor,
    "qwen2_5_vl": partial(reference_processor, kind="Qwen2_5_VLProcessor"),
    "qwen3_vl": partial(reference_processor, kind="Qwen3VLProcessor"),
    "qwen_vl": FirstQwenVL,
    "internvl": internvl,
    "idefics2": idefics2,
    "idefics3": idefics3,
    "smolvlm": smolvlm,
    "llava": llava,
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "gemma3": gemma3,
    **{f"generic:{name}": automatic for name in SHOWING},
}
