"""The built-in base: shipped, opened by its name, and told apart from another one."""

from __future__ import annotations

import json
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

from vlmtune.errors import ContractMismatchError, ModelError
from vlmtune.models import builtin
from vlmtune.quickstart.base import card
from vlmtune.runs.resolve import base_of, resolve

PACKAGE = Path(builtin.__file__).parents[1]
LARGEST = 20_000_000


def test_it_is_shipped(builtin_base):
    import torch
    from safetensors import safe_open

    assert resolve(builtin_base).base.id == "builtin:base"
    files = sorted(builtin.FOLDER.iterdir())
    assert sum(path.stat().st_size for path in files) < LARGEST
    project = tomllib.loads((PACKAGE.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["vlmtune"]
    for path in (*files, card.CARD, card.CARD.with_name("processor.json")):
        name = path.relative_to(PACKAGE).as_posix()
        assert any(fnmatch(name, pattern) for pattern in patterns), name
    with safe_open(builtin.FOLDER / "model.safetensors", "pt") as weights:
        assert {weights.get_tensor(name).dtype for name in weights.keys()} == {  # noqa: SIM118
            torch.bfloat16
        }


def test_its_name_is_opened_wherever_a_model_may_stand(monkeypatch, tiny_base):
    monkeypatch.setattr(builtin, "FOLDER", tiny_base)
    resolved = resolve("builtin:base")
    assert (resolved.kind, resolved.base.folder) == ("model", tiny_base)
    assert resolved.base.identity().id == "builtin:base"


def test_an_installation_without_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(builtin, "FOLDER", tmp_path)
    with pytest.raises(ModelError, match=r"builtin:base.*Install vlmtune again"):
        resolve("builtin:base")


def test_an_adapter_of_another_version_of_it_is_refused(
    monkeypatch, tmp_path, tiny_base, tiny_data
):
    from vlmtune.testing import TinySize, tiny
    from vlmtune.verbs.predict import predict
    from vlmtune.verbs.train import train

    other = tiny("qwen2_vl", tmp_path / "b", seed=9, size=TinySize(hidden=32, vision_width=16))
    monkeypatch.setattr(builtin, "FOLDER", tiny_base)
    run = tmp_path / "run"
    options = {"training__max_steps": 1, "training__batch_size": 2, "evaluation__before": False}
    train(
        "quickstart",
        run_dir=run,
        data__path=str(tiny_data),
        evaluation__after=False,
        image__max_pixels=6272,
        **options,
    )
    picture = next(iter(sorted((tiny_data.parent).glob("**/*.png"))), None)
    assert base_of(resolve(run).contract).folder == tiny_base
    monkeypatch.setattr(builtin, "FOLDER", other)
    with pytest.raises(ContractMismatchError, match="builtin:base"):
        predict(run, [picture] if picture else [], "What is this?", max_new_tokens=2)


def test_the_card_takes_its_figures_from_the_logs(tmp_path):
    def line(step, exact=None):
        record = {"step": step, "rows": 10 * step, "seconds": 36 * step}
        return record | ({"loss": {"line": 1.0}} if exact is None else {"exact": {"line": exact}})

    def write(name, records):
        (tmp_path / name).write_text("".join(json.dumps(record) + "\n" for record in records))
        return tmp_path / name

    # Stopped after step 200 without a checkpoint since step 100, resumed there, then ended.
    first = write("a", [line(100, 0.1), line(150), line(200, 0.9), line(150, 0.2), line(250, 0.3)])
    last = write("b", [line(300, 0.625)])
    assert [r["step"] for r in card.read_logs([first, last])] == [100, 150, 250, 300]
    weights, page = tmp_path / "w.safetensors", tmp_path / "CARD.md"
    weights.write_bytes(bytes(2_000_000))
    page.write_text(f"before\n{card.MARKS[0]}\nold\n{card.MARKS[1]}\nafter\n", encoding="utf-8")
    card.main([str(first), str(last), "--hardware", "one core", "--weights", str(weights),
               "--card", str(page)])  # fmt: skip
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert "300 steps, 3,000 pictures, 3.00 core-hours of training on one core" in text
    assert "| 300 | 3,000 | 180 |  | 62.5% |  |  |" in text
    assert "90.0%" not in text
    assert "2.0 MB" in text
    with pytest.raises(ValueError, match="no place"):
        card.fill("a card", "figures")


def test_the_card_has_a_place_for_figures():
    assert card.fill(card.CARD.read_text(encoding="utf-8"), "x").count("\nx\n") == 1
