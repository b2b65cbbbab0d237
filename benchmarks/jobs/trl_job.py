"""The job with TRL: rows of ``prompt`` and ``completion``, its own collator."""

from __future__ import annotations

from clock import Clock, know_torchvision

clock = Clock()
job = clock.job
know_torchvision()

from datasets import Features, Image, List, Value, load_dataset  # noqa: E402  # imports are timed
from peft import PeftModel  # noqa: E402
from transformers import (  # noqa: E402
    AutoProcessor,
    Qwen2VLForConditionalGeneration,
    set_seed,
)
from trl import SFTConfig, SFTTrainer  # noqa: E402

set_seed(job["seed"])
clock.watch_trainer()
turns = List({"role": Value("string"), "content": Value("string")})
features = Features({"prompt": turns, "completion": turns, "images": List(Image())})
with clock.phase("prepare"):
    rows = load_dataset(
        "json",
        data_files=job["trl_rows"],
        features=features,
        split="train",
        cache_dir=str(clock.folder / "cache"),
    )
processor = AutoProcessor.from_pretrained(job["peer_base"])
model = Qwen2VLForConditionalGeneration.from_pretrained(job["peer_base"], dtype="float32")
model = PeftModel.from_pretrained(model, job["adapter"], is_trainable=True)
arguments = SFTConfig(
    output_dir=str(clock.folder / "out"),
    per_device_train_batch_size=job["micro_batch"],
    gradient_accumulation_steps=job["batch_size"] // job["micro_batch"],
    max_steps=job["steps"],
    max_length=None,
    learning_rate=job["learning_rate"],
    lr_scheduler_type="linear",
    gradient_checkpointing=False,
    bf16=False,
    seed=job["seed"],
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
    train_sampling_strategy="sequential",
    use_cpu=True,
    **job.get("trl", {}),
)
SFTTrainer._prepare_dataset = clock.timed("prepare", SFTTrainer._prepare_dataset)
trainer = SFTTrainer(model=model, args=arguments, train_dataset=rows, processing_class=processor)
trainer.train()
trainer.save_model()
clock.write("trl", "transformers", "peft", "datasets")
