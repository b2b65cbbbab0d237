"""torchvision: working it is a choice, absent it is not missed, broken it does no harm."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from PIL import Image as Pictures
from transformers.utils.import_utils import is_torchvision_available

from tiny_rows import encoder_of
from vlmtune.data.media import ImagePolicy, Size, open_image
from vlmtune.errors import ContractMismatchError, ModelError
from vlmtune.models import torchvision as module
from vlmtune.models.contract import verify_contract
from vlmtune.models.families import load_family
from vlmtune.models.torchvision import torchvision_fault

FAULT = torchvision_fault()
importable = pytest.mark.skipif(FAULT is not None, reason=f"torchvision: {FAULT}")
# Between the two resizes, in a normalised pixel; a step of 8 bits is 0.0150 at most.
STEP = 0.02


def smooth(size):
    """A picture as photographs are: what one rounding step changes is one step."""
    return Pictures.linear_gradient("L").resize(size).convert("RGB")


@importable
def test_pillow_is_taken_although_torchvision_could_be(folder):
    processor = load_family(str(folder)).parts.image_processor
    assert type(processor).__name__ == "Qwen2VLImageProcessorPil"


@importable
@pytest.mark.parametrize("size", [(320, 50), (64, 48), (500, 400)])
def test_torchvision_sees_almost_what_pillow_sees(encoder, folder, size):
    other = load_family(str(folder), "torchvision")
    policy = encoder.contract.image
    images = [smooth(size), smooth(size[::-1])]
    ours, theirs = (each.image_inputs(images, policy) for each in (encoder.family, other))
    assert torch.equal(ours["image_grid_thw"], theirs["image_grid_thw"])
    difference = (ours["pixel_values"] - theirs["pixel_values"]).abs().max()
    assert difference < STEP
    for image in images:
        counted = other.visual_tokens(Size(*image.size), policy)
        assert counted == encoder.family.visual_tokens(Size(*image.size), policy)


@importable
def test_real_formulas_differ_by_two_steps_at_most(encoder, folder, shared_data):
    """Seen: 0.0300 in 200 pictures."""
    other = load_family(str(folder), "torchvision")
    policy = ImagePolicy(max_pixels=56448)
    for number in range(200):
        path = shared_data / "latex_ocr" / "images" / f"{number}.png"
        image = open_image(path.read_bytes(), policy)
        ours, theirs = (each.image_inputs([image], policy) for each in (encoder.family, other))
        assert torch.equal(ours["image_grid_thw"], theirs["image_grid_thw"])
        assert (ours["pixel_values"] - theirs["pixel_values"]).abs().max() < 2 * STEP


@importable
def test_a_model_trained_with_one_is_not_served_with_the_other(encoder, folder):
    other = load_family(str(folder), "torchvision")
    with pytest.raises(ContractMismatchError, match=r"processor\.backend: pil != torchvision"):
        verify_contract(encoder.contract, other, encoder.contract.base.weights_sha256)
    assert encoder_of(other).contract.processor.backend == "torchvision"


@pytest.mark.skipif(FAULT is None, reason="torchvision works here")
def test_without_torchvision_its_backend_is_refused(folder):
    with pytest.raises(ModelError, match=r"model\.backend: torchvision cannot be used here.*=pil"):
        load_family(str(folder), "torchvision")


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """A torchvision that is found and raises when it is imported."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision/__init__.py").write_text("raise RuntimeError('no torchvision::nms')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchvision", sys)  # so that the hiding is undone
    monkeypatch.delitem(sys.modules, "torchvision")
    is_torchvision_available.cache_clear()
    yield tmp_path
    monkeypatch.undo()
    is_torchvision_available.cache_clear()


@pytest.mark.usefixtures("broken")
def test_a_broken_one_is_hidden_and_its_fault_told():
    assert is_torchvision_available()  # installed is taken for working
    assert module.torchvision_fault.__wrapped__() == "RuntimeError: no torchvision::nms"
    assert not is_torchvision_available()


@pytest.mark.slow
def test_a_broken_one_stops_neither_pillow_nor_models(folder, broken):
    """In a process of its own: what is imported stays imported."""
    script = f"""
import torch
from pathlib import Path
from vlmtune.errors import ModelError
from vlmtune.models.families import load_family
from vlmtune.models.load import load_model
try:
    load_family({str(folder)!r}, "torchvision")
except ModelError as error:
    assert "no torchvision::nms" in str(error) and "model.backend=pil" in str(error), error
else:
    raise AssertionError("not refused")
print(type(load_family({str(folder)!r}).parts.image_processor).__name__)
load_model(Path({str(folder)!r}), dtype=torch.float32, device=torch.device("cpu"))
"""
    paths = os.pathsep.join([str(broken), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "Qwen2VLImageProcessorPil"), done.stderr
