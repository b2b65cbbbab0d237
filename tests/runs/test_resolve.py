"""One resolver for every MODEL argument."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tiny_world import copied
from vlmtune.errors import (
    CheckpointError,
    ContractMismatchError,
    HubError,
    ModelError,
    UsageError,
)
from vlmtune.models.contract import Contract
from vlmtune.models.load import LoadingConfig
from vlmtune.runs.resolve import open_model, resolve
from vlmtune.testing import TinySize, tiny

CPU = LoadingConfig(device="cpu")


def test_a_local_model(tiny_base):
    found = resolve(tiny_base)
    assert (found.kind, found.adapter, found.contract) == ("model", None, None)
    assert found.base.folder == tiny_base


def test_a_run_is_its_newest_checkpoint(lora_run, tiny_base):
    found = resolve(lora_run)
    assert found.kind == "adapter"
    assert found.adapter == lora_run / "checkpoints/step-000006"
    assert found.base.folder == tiny_base
    assert found.contract == Contract.read(lora_run / "checkpoints/step-000006")


def test_a_run_with_a_damaged_newest_is_the_one_before(lora_run, tmp_path, caplog):
    run = copied(lora_run, tmp_path / "run")
    (run / "checkpoints/step-000006/adapter_model.safetensors").write_bytes(b"")
    assert resolve(run).adapter == run / "checkpoints/step-000004"
    assert "step-000006 is damaged" in caplog.text


def test_a_checkpoint(lora_run, full_run):
    adapter = resolve(str(lora_run / "checkpoints/step-000002"))
    assert adapter.kind == "adapter"
    assert adapter.adapter is not None
    whole = resolve(full_run / "checkpoints/step-000002")
    assert (whole.kind, whole.adapter) == ("model", None)
    assert whole.contract is not None
    assert whole.contract.trained == ("vision", "projector", "language")


def test_an_adapter_away_from_its_run(lora_run, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors", "contract.json"):
        shutil.copyfile(lora_run / "checkpoints/step-000006" / name, folder / name)
    assert resolve(folder).kind == "adapter"
    (folder / "contract.json").unlink()
    with pytest.raises(UsageError, match="an adapter without contract"):
        resolve(folder)


def test_an_empty_run_says_how_to_go_on(lora_run, tmp_path):
    run = copied(lora_run, tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(CheckpointError, match=r"no checkpoint yet; continue it with .* --resume"):
        resolve(run)


def test_all_checkpoints_damaged(lora_run, tmp_path):
    run = copied(lora_run, tmp_path / "run")
    for manifest in run.glob("checkpoints/*/manifest.json"):
        manifest.unlink()
    with pytest.raises(CheckpointError, match="all 3 checkpoints"):
        resolve(run)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("nowhere", "neither an existing folder"),
        ("a/b/c", "neither an existing folder"),
        ("/no/such/folder", "neither an existing folder"),
        ("owner/name with spaces", "neither an existing folder"),
        ("", "neither an existing folder"),
    ],
)
def test_nothing_of_the_kind(argument, message, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    if argument:
        with pytest.raises(UsageError, match=message):
            resolve(argument)
        return
    with pytest.raises(UsageError, match="holds no model"):  # "" is the folder one stands in
        resolve(argument)


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(UsageError, match="holds no model"):
        resolve(tmp_path)


def test_a_hub_id_is_fetched(tiny_base, monkeypatch):
    from vlmtune import hub
    from vlmtune.runs import resolve as module

    asked = []

    def download(name: str, **options: object) -> hub.Downloaded:
        asked.append((name, options))
        return hub.Downloaded(tiny_base, "c0ffee", "huggingface", 1, "")

    monkeypatch.setattr(module, "download_model", download)
    found = resolve("owner/name", revision="v1")
    assert asked == [("owner/name", {"hub": "huggingface", "revision": "v1"})]
    assert (found.base.id, found.base.revision) == ("owner/name", "c0ffee")

    def fail(*_: object, **__: object) -> hub.Downloaded:
        raise HubError("no network")

    monkeypatch.setattr(module, "download_model", fail)
    with pytest.raises(HubError):
        resolve("owner/name")


# Bases that are not the trained one


@pytest.fixture(scope="module")
def other_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with other random weights."""
    size = TinySize(hidden=32, vision_width=16)
    return tiny("qwen2_vl", tmp_path_factory.mktemp("other") / "base", seed=2, size=size)


def test_other_weights_are_refused(lora_run, other_base):
    with pytest.raises(ContractMismatchError, match="hold other weights"):
        open_model(resolve(lora_run, base=str(other_base)), CPU)


def test_the_same_weights_elsewhere_are_not(lora_run, tiny_base, tmp_path):
    moved = copied(tiny_base, tmp_path / "moved")
    opened = open_model(resolve(lora_run, base=str(moved)), CPU)
    assert opened.adapter is not None


def test_another_template_is_refused(lora_run, tiny_base, tmp_path):
    moved = copied(tiny_base, tmp_path / "moved")
    template = moved / "chat_template.jinja"
    template.write_text(template.read_text("utf-8").replace("helpful", "rude"), encoding="utf-8")
    with pytest.raises(ContractMismatchError, match="template_sha256"):
        open_model(resolve(lora_run, base=str(moved)), CPU)


def test_a_base_that_is_gone_is_named(lora_run, tmp_path):
    adapter = copied(lora_run / "checkpoints/step-000006", tmp_path / "adapter")
    text = (adapter / "contract.json").read_text(encoding="utf-8")
    contract = Contract.read(adapter)
    gone = contract.base.model_copy(update={"id": "/gone/base"})
    contract.model_copy(update={"base": gone}).write(adapter)
    assert (adapter / "contract.json").read_text(encoding="utf-8") != text
    with pytest.raises(UsageError, match=r"/gone/base .*--base DIR"):
        resolve(adapter)


def test_a_contract_of_the_future(lora_run, tmp_path):
    adapter = copied(lora_run / "checkpoints/step-000006", tmp_path / "adapter")
    contract = (adapter / "contract.json").read_text(encoding="utf-8")
    later = contract.replace('"format": 1', '"format": 2')
    (adapter / "contract.json").write_text(later, encoding="utf-8")
    with pytest.raises(ModelError, match=r"has format 2.*Upgrade vlmtune"):
        resolve(adapter)
    (adapter / "contract.json").write_text(contract[:50], encoding="utf-8")
    with pytest.raises(ModelError, match="cannot be read as a contract"):
        resolve(adapter)
