"""The verb: which models share their weights, passwords, a package that is missing."""

from __future__ import annotations

import sys

import pytest

from vlmtune.errors import MissingExtraError, UsageError
from vlmtune.verbs.ui import open_sides, read_password, ui


def test_an_adapter_and_its_base_share_the_weights(lora_run, tiny_base):
    for compare in (tiny_base, "base"):
        (served,) = open_sides(lora_run, compare)
        tuned, base = served.models.values()
        assert (tuned.adapter is None, base.adapter) == (False, None)
        # The same question: pictures are made as the adapter was trained.
        assert base.encoder.contract == tuned.encoder.contract
    assert base.name == f"{lora_run.name} (base)"


def test_an_adapter_beside_the_base_it_stands_on(lora_run, tiny_base):
    (served,) = open_sides(tiny_base, lora_run)
    assert [each.adapter is None for each in served.models.values()] == [True, False]


def test_other_models_stand_by_themselves(tiny_base, full_run):
    tuned, base = open_sides(full_run, tiny_base)
    policy = tuned.first.encoder.contract.image
    assert base.first.encoder.contract.image == policy
    assert base.model is not tuned.model
    # The same model twice: the names differ, so that one can tell them apart.
    first, second = open_sides(tiny_base, tiny_base)
    assert first.first.name != second.first.name
    with pytest.raises(UsageError, match="--compare base"):
        open_sides(full_run, "base")


def test_a_password_file(tmp_path, caplog):
    file = tmp_path / "password"
    for text in ("", " \nx", None):
        if text is not None:
            file.write_text(text, encoding="utf-8")
        with pytest.raises(UsageError, match="--password-file"):
            read_password(file if text is not None else tmp_path / "none")
    file.write_text(" sesame \nmore", encoding="utf-8")
    file.chmod(0o600)
    assert read_password(file) == "sesame"
    assert caplog.text == ""
    file.chmod(0o644)
    assert read_password(file) == "sesame"
    assert "chmod 600" in caplog.text


def test_without_gradio(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "vlmtune.serving.webui.app", raising=False)
    monkeypatch.delitem(sys.modules, "vlmtune.serving.webui.page", raising=False)
    with pytest.raises(MissingExtraError, match=r"vlmtune\[ui\]") as caught:
        ui("nowhere", folder=tmp_path)
    assert "gradio" in str(caught.value)
