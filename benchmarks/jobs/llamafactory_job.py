"""The job with LLaMA-Factory: its own data format, template and command, called in this process.

The template is its ``qwen2_vl`` without the newline after the end of an answer, which it would
train too. It takes a step's rows in one batch: of several it would average the means.
"""

from __future__ import annotations

from clock import Clock, know_no_sound, know_torchvision

clock = Clock()
job = clock.job
know_torchvision()
know_no_sound()

from llamafactory.data import template as templates  # noqa: E402  # imports are timed
from llamafactory.train import tuner  # noqa: E402
from llamafactory.train.sft import workflow  # noqa: E402

theirs = templates.TEMPLATES["qwen2_vl"]
theirs.format_assistant = templates.StringFormatter(slots=["{{content}}<|im_end|>"])
clock.watch_trainer()
workflow.get_dataset = clock.timed("prepare", workflow.get_dataset)
tuner.run_exp(
    {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": job["base"],
        "adapter_name_or_path": job["adapter"],
        "finetuning_type": "lora",
        "template": "qwen2_vl",
        "dataset": "rows",
        "dataset_dir": job["llamafactory_rows"],
        "cutoff_len": 8192,
        "image_max_pixels": job["max_pixels"],
        "disable_shuffling": True,
        "freeze_vision_tower": True,
        "freeze_multi_modal_projector": True,
        "disable_gradient_checkpointing": True,
        "flash_attn": "sdpa",
        "output_dir": str(clock.folder / "out"),
        "overwrite_cache": True,
        "per_device_train_batch_size": job["batch_size"],
        "gradient_accumulation_steps": 1,
        "max_steps": job["steps"],
        "learning_rate": job["learning_rate"],
        "lr_scheduler_type": "linear",
        "seed": job["seed"],
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "fp16": False,
        "bf16": False,
        **job.get("llamafactory", {}),
    }
)
clock.write("llamafactory", "transformers", "peft", "datasets")
