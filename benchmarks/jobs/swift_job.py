"""The job with ms-swift: its own data format, template and command, called in this process.

The template is its own without the newline after the end of an answer, which it would train too,
and with the image token of this vocabulary: it has the id of the released models written into it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from clock import Clock, know_torchvision

clock = Clock()
job = clock.job
know_torchvision()
os.environ["MAX_PIXELS"] = str(job["max_pixels"])  # as its manual says to do

from swift.arguments import SftArguments  # noqa: E402  # imports are timed
from swift.pipelines.train.sft import SwiftSft  # noqa: E402
from swift.template import TEMPLATE_MAPPING  # noqa: E402

template = TEMPLATE_MAPPING["qwen2_vl"]
template.suffix = ["<|im_end|>"]
with (Path(job["base"]) / "config.json").open(encoding="utf-8") as file:
    template.template_cls.image_token_id = json.load(file)["image_token_id"]
clock.watch_trainer()
SwiftSft._prepare_dataset = clock.timed("prepare", SwiftSft._prepare_dataset)
arguments = SftArguments(
    model=job["base"],
    model_type="qwen2_vl",
    template="qwen2_vl",
    adapters=[job["adapter"]],
    tuner_type="lora",
    dataset=[job["swift_rows"]],
    split_dataset_ratio=0.0,
    dataset_shuffle=False,
    train_dataloader_shuffle=False,
    max_length=8192,
    attn_impl="sdpa",
    torch_dtype="float32",
    gradient_checkpointing=False,
    output_dir=str(clock.folder / "out"),
    per_device_train_batch_size=job["micro_batch"],
    gradient_accumulation_steps=job["batch_size"] // job["micro_batch"],
    max_steps=job["steps"],
    learning_rate=job["learning_rate"],
    lr_scheduler_type="linear",
    warmup_ratio=0.0,
    weight_decay=0.0,
    adam_beta2=0.999,
    seed=job["seed"],
    logging_steps=1,
    save_strategy="no",
    report_to=["none"],
    dataloader_num_workers=0,
    use_cpu=True,
    use_hf=True,
    **job.get("swift", {}),
)
SwiftSft(arguments).main()
clock.write("ms-swift", "transformers", "peft", "datasets")
