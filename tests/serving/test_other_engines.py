"""What the docs promise other engines: transformers' own classes see the trained resolution."""

from __future__ import annotations

import pytest

from tiny_rows import asked, encoder_of, lively, picture
from vlmtune.data.media import ImagePolicy, open_image
from vlmtune.models.save import save_model
from vlmtune.serving.vllm.proof import check_pictures
from vlmtune.testing import tiny


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_the_stock_processor_of_a_saved_folder(tmp_path, family):
    from transformers import AutoImageProcessor

    base = tiny(family, tmp_path / "base")
    encoder = encoder_of(base, ImagePolicy(max_pixels=50_000))
    out = tmp_path / "saved"
    save_model(lively(base), out, family=encoder.family, contract=encoder.contract, base=base)
    image = picture((640, 400))
    encoded = encoder.encode(asked("What?", "x", image).prompt(), ask=True)
    upright = open_image(image.data, encoder.contract.image)
    theirs = AutoImageProcessor.from_pretrained(out)(images=[upright], return_tensors="pt")
    assert theirs["image_grid_thw"].tolist() == encoded.vision["image_grid_thw"].tolist()
    assert (theirs["pixel_values"] - encoded.vision["pixel_values"]).abs().max() < 0.05
    check_pictures(out, encoder)  # what ``--engine vllm`` asks of a folder before it serves it
    # The control: as the base came, it would see more.
    before = AutoImageProcessor.from_pretrained(base)(images=[upright], return_tensors="pt")
    assert before["image_grid_thw"].prod() > theirs["image_grid_thw"].prod()
