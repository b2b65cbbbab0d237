"""The job in the tutorials' way: ``map`` to lists, transformers' Trainer, padding to the longest.

Images are opened in the main process. The collator is theirs but for one thing: they squeeze all
pictures to one size and stack them; here each keeps its own, as it does everywhere else.
"""

from __future__ import annotations

from typing import Any

from clock import Clock, know_torchvision

clock = Clock()
job = clock.job
know_torchvision()

import torch  # noqa: E402  # imports are timed
from datasets import Dataset, disable_progress_bars  # noqa: E402
from peft import PeftModel  # noqa: E402
from PIL import Image  # noqa: E402
from transformers import (  # noqa: E402
    AutoProcessor,
    DataCollatorForSeq2Seq,
    Qwen2VLForConditionalGeneration,
    Trainer,
    TrainingArguments,
    set_seed,
)

set_seed(job["seed"])
disable_progress_bars()
clock.watch_trainer()
# Its own limit is 1,003,520 pixels; a larger picture would be shrunk here and nowhere else.
processor = AutoProcessor.from_pretrained(job["base"], max_pixels=job["max_pixels"])
tokenizer = processor.tokenizer
tokenizer.padding_side = "right"
end = tokenizer.convert_tokens_to_ids("<|im_end|>")


def process(example: dict[str, Any]) -> dict[str, Any]:
    content = [{"type": "image"}, {"type": "text", "text": job["prompt"]}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    picture = Image.open(example["image_path"]).convert("RGB")
    inputs = processor(text=[text], images=[picture], padding=True, return_tensors="pt")
    inputs = {key: value.tolist() for key, value in inputs.items()}
    response = [*tokenizer(example["text"], add_special_tokens=False)["input_ids"], end]
    asked = inputs["input_ids"][0]
    return {
        "input_ids": asked + response,
        "attention_mask": [1] * len(asked + response),
        "mm_token_type_ids": inputs["mm_token_type_ids"][0] + [0] * len(response),
        "labels": [-100] * len(asked) + response,
        "pixel_values": torch.tensor(inputs["pixel_values"]),
        "image_grid_thw": torch.tensor(inputs["image_grid_thw"]).squeeze(0),
    }


pad_text = DataCollatorForSeq2Seq(tokenizer, padding=True)


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    names = ("input_ids", "attention_mask", "labels")
    pixels = [torch.tensor(row.pop("pixel_values")) for row in rows]
    grids = torch.tensor([row.pop("image_grid_thw") for row in rows])
    kinds = [torch.tensor(row.pop("mm_token_type_ids")) for row in rows]
    batch = pad_text([{name: row[name] for name in names} for row in rows])
    batch["mm_token_type_ids"] = torch.nn.utils.rnn.pad_sequence(kinds, batch_first=True)
    return {**batch, "pixel_values": torch.cat(pixels), "image_grid_thw": grids}


with clock.phase("prepare"):
    cache = str(clock.folder / "cache")
    rows = Dataset.from_csv(job["ordered_table"], cache_dir=cache).map(process)
model = Qwen2VLForConditionalGeneration.from_pretrained(job["base"], dtype="float32")
model.enable_input_require_grads()
model = PeftModel.from_pretrained(model, job["adapter"], is_trainable=True)
arguments = TrainingArguments(
    output_dir=str(clock.folder / "out"),
    per_device_train_batch_size=job["micro_batch"],
    gradient_accumulation_steps=job["batch_size"] // job["micro_batch"],
    max_steps=job["steps"],
    learning_rate=job["learning_rate"],
    lr_scheduler_type="linear",
    seed=job["seed"],
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
    remove_unused_columns=False,
    train_sampling_strategy="sequential",
    use_cpu=True,
)
trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collate)
trainer.train()
trainer.save_model()
clock.write("transformers", "peft", "datasets")
