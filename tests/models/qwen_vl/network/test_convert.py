"""Pickled originals become safetensors, and what a pickle may hold besides is never run."""

from __future__ import annotations

import json
import os
import zipfile

import pytest
import torch
from safetensors.torch import load_file

from qwen_vl_network import batch, text
from vlmtune.errors import ModelError, UsageError
from vlmtune.models.qwen_vl import convert
from vlmtune.models.qwen_vl.convert import INDEX, SINGLE, convert_to_safetensors


@pytest.fixture
def weights(tiny):
    found = dict(tiny.state_dict())
    found["lm_head.weight"] = found["lm_head.weight"].to(torch.bfloat16)
    found["transformer.ln_f.weight"] = torch.tensor([float("nan"), -0.0] * 32)
    return found


@pytest.fixture
def pickled(tiny, weights, tmp_path):
    """A folder in the layout of the first releases: two pickles, an index, code."""
    folder = tmp_path / "original"
    tiny.config.save_pretrained(folder)
    write(folder, weights, files=2)
    for name in ("modeling_qwen.py", "qwen.tiktoken", "generation_config.json", "LICENSE"):
        (folder / name).write_text("{}")
    return folder


def write(folder, weights, *, files):
    names = sorted(weights)
    placed = {}
    for number in range(files):
        file = f"pytorch_model-{number + 1:05}-of-{files:05}.bin"
        part = {name: weights[name] for name in names[number::files]}
        torch.save(part, folder / file)
        placed |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": placed}
    (folder / INDEX).write_text(json.dumps(index))


def read(folder):
    return {
        name: tensor
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def same(found, meant):
    assert found.keys() == meant.keys()
    for name, tensor in meant.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        bits = [value.contiguous().view(torch.uint8) for value in (found[name], tensor)]
        assert torch.equal(*bits), name


def nothing_left(out):
    assert not out.exists()
    assert not list(out.parent.glob(f".{out.name}.*"))


def test_every_bit_arrives(pickled, weights, tmp_path):
    out, seen = tmp_path / "new" / "converted", []
    done = convert_to_safetensors(pickled, out, progress=lambda *step: seen.append(step))
    same(read(out), weights)
    assert done.path == out
    assert done.tensors == len(weights)
    assert done.bytes == sum(tensor.nbytes for tensor in weights.values())
    assert done.files == tuple(f"model-0000{n}-of-00002.safetensors" for n in (1, 2))
    assert seen == [(1, 2), (2, 2)]
    assert done.copied == ("LICENSE", "config.json", "generation_config.json", "qwen.tiktoken")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == done.bytes
    assert set(index["weight_map"]) == set(weights)
    files = {path.name for path in out.iterdir()}
    assert files == {*done.files, *done.copied, "model.safetensors.index.json"}


def test_the_converted_folder_loads(tiny, tmp_path):
    from transformers import AutoModelForImageTextToText

    folder = tmp_path / "original"
    tiny.config.save_pretrained(folder)
    torch.save(tiny.state_dict(), folder / SINGLE)
    done = convert_to_safetensors(folder, tmp_path / "out")
    assert done.files == ("model.safetensors",)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.equal(model(batch(text(9))).logits, tiny(batch(text(9))).logits)


def test_old_pickles_views_and_shared_memory(weights, tmp_path):
    """Pickles from before torch 1.6 are no archives; tensors may be parts of one another."""
    whole = torch.arange(12.0).view(3, 4)
    weights |= {"whole": whole, "part": whole[1], "turned": whole.T, "same": whole}
    folder = tmp_path / "original"
    folder.mkdir()
    torch.save(weights, folder / SINGLE, _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(folder / SINGLE)
    convert_to_safetensors(folder, tmp_path / "out")
    same(read(tmp_path / "out"), weights)


class Payload:
    def __init__(self, trace):
        self._trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self._trace),)


@pytest.mark.parametrize("archive", [True, False])
def test_code_in_a_pickle_is_not_run(pickled, tmp_path, archive):
    trace, file = tmp_path / "ran", pickled / "pytorch_model-00002-of-00002.bin"
    torch.save(
        {**torch.load(file), "payload": Payload(trace)},
        file,
        _use_new_zipfile_serialization=archive,
    )
    with pytest.raises(ModelError, match=r"cannot be read as weights.*never run"):
        convert_to_safetensors(pickled, tmp_path / "out")
    assert not trace.exists()
    nothing_left(tmp_path / "out")
    torch.load(file, weights_only=False)
    assert trace.exists()  # the trap works


def _cut(folder):
    file = folder / "pytorch_model-00001-of-00002.bin"
    file.write_bytes(file.read_bytes()[:-2000])


def _missing(folder):
    (folder / "pytorch_model-00002-of-00002.bin").unlink()


def _elsewhere(folder):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = "../original/pytorch_model-00001-of-00002.bin"
    (folder / INDEX).write_text(json.dumps(index))


def _another_name(folder):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["lm_tail.weight"] = index["weight_map"].pop("lm_head.weight")
    (folder / INDEX).write_text(json.dumps(index))


def _no_map(folder):
    (folder / INDEX).write_text("{}")


def _no_tensors(folder):
    torch.save({"step": 7}, folder / "pytorch_model-00001-of-00002.bin")


def _none(folder):
    for path in folder.glob("pytorch_model*"):
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut, "cannot be read as weights"),
        (_missing, "which is not in the folder"),
        (_elsewhere, "which is not in the folder"),
        (_another_name, "lm_head.weight"),
        (_no_map, "no 'weight_map'"),
        (_no_tensors, "something else than named tensors"),
        (_none, "holds no pickled weights"),
    ],
)
def test_damage_is_named_and_leaves_nothing(pickled, tmp_path, damage, message):
    damage(pickled)
    with pytest.raises(ModelError, match=message):
        convert_to_safetensors(pickled, tmp_path / "out")
    nothing_left(tmp_path / "out")


def test_what_the_disk_gives_back_is_compared(pickled, tmp_path, monkeypatch):
    real = convert.save_file

    def bad(tensors, path, metadata):
        name = sorted(tensors)[3]
        real({**tensors, name: tensors[name] + 1e-3}, path, metadata=metadata)

    monkeypatch.setattr(convert, "save_file", bad)
    with pytest.raises(ModelError, match="read back otherwise than it was written"):
        convert_to_safetensors(pickled, tmp_path / "out")
    nothing_left(tmp_path / "out")


def test_nothing_is_overwritten(pickled, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    with pytest.raises(UsageError, match="not empty"):
        convert_to_safetensors(pickled, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_the_command(pickled, tmp_path, capsys):
    assert convert.main([str(pickled), str(tmp_path / "out")]) == 0
    assert load_file(next((tmp_path / "out").glob("*.safetensors")))
    assert str(tmp_path / "out") in capsys.readouterr().out
    assert convert.main([str(pickled), str(tmp_path / "out")]) == 2
    assert "is not empty" in capsys.readouterr().err
