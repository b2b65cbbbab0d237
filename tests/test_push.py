"""Pushing a model to a hub on this computer: what arrives, what is refused, what is never said."""

from __future__ import annotations

import hashlib
import importlib.util
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest

from fakehub import Repository
from pushhub import TOKEN, PushHub, reached
from vlmtune.errors import HubError, MissingExtraError, RefusedError, UsageError, VlmtuneError
from vlmtune.hub import download_model
from vlmtune.hub.push import Destination, push_folder, require_pushable
from vlmtune.hub.push_files import stale_files

needs_modelscope = pytest.mark.skipif(
    importlib.util.find_spec("modelscope_hub") is None, reason="modelscope is not installed"
)
HUBS = ["huggingface", pytest.param("modelscope", marks=needs_modelscope)]
FILES = {
    "README.md": b"---\nlibrary_name: transformers\n---\n# latex\n",
    "config.json": b'{"model_type": "tiny"}',
    "contract.json": b"{}",
    "model-00001-of-00002.safetensors": bytes(range(256)) * 400,
    "model-00002-of-00002.safetensors": bytes(range(255, -1, -1)) * 300,
    "model.safetensors.index.json": b'{"weight_map": {}}',
    "tokenizer.json": b"{}",
}

# huggingface_hub 2.4 sends a file in a way that its client calls old.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PushHub]:
    with reached(tmp_path, monkeypatch) as fake:
        yield fake


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    return folder


def to(hub: str, repo: str = "owner/latex", *, private: bool = False) -> Destination:
    return Destination(repo=repo, hub=hub, private=private)  # type: ignore[arg-type]


def held(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", HUBS)
def test_what_is_pushed_is_what_comes_back(hub, model, name, tmp_path):
    pushed = push_folder(model, to(name))
    repository = hub.repositories["models/owner/latex"]
    assert {path: repository.files[path] for path in FILES} == FILES
    assert (pushed.hub, pushed.repo, pushed.revision) == (name, "owner/latex", repository.commit)
    assert pushed.url.startswith(hub.endpoint)
    assert pushed.url.endswith("owner/latex")
    back = download_model("owner/latex", hub=name, revision=None, out=tmp_path / "back")
    assert back.revision == pushed.revision
    for path, content in FILES.items():
        found = hashlib.sha256((back.path / path).read_bytes()).hexdigest()
        assert found == hashlib.sha256(content).hexdigest()
    assert held(model) == FILES  # no record of the upload, nothing taken


def test_large_files_go_in_parts(hub, model):
    hub.part_bytes = 30_000
    push_folder(model, to("huggingface"))
    repository = hub.repositories["models/owner/latex"]
    assert {path: repository.files[path] for path in FILES} == FILES
    assert sum(request.startswith("PUT blobs/") for request in hub.requests) == 4 + 3


@pytest.mark.parametrize("name", HUBS)
def test_private_is_private(hub, model, name):
    push_folder(model, to(name, private=True))
    assert hub.private == {"models/owner/latex"}
    push_folder(model, to(name, "owner/open"))
    assert hub.private == {"models/owner/latex"}
    # Again to the private one, asked for or not: it stays what it is.
    push_folder(model, to(name, private=True))
    push_folder(model, to(name))
    assert hub.private == {"models/owner/latex"}


@pytest.mark.parametrize("name", HUBS)
def test_private_is_never_sent_to_a_public_repository(hub, model, name):
    hub.repositories["models/owner/latex"] = before = Repository({"old.txt": b"x"})
    with pytest.raises(RefusedError, match="is not private"):
        push_folder(model, to(name, private=True))
    assert hub.repositories["models/owner/latex"] is before
    assert hub.blobs == {}


@pytest.mark.parametrize("name", HUBS)
def test_an_existing_repository_holds_the_new_model_alone(hub, model, name):
    kept = {"LICENSE": b"mine", "docs/plot.png": b"png", "configuration.json": b"{}"}
    old = {
        "model.safetensors": b"old weights",
        "model-00003-of-00003.safetensors": b"old shard",
        "adapter_config.json": b"{}",
        "pytorch_model.bin": b"a pickle",
        "vocab[1].txt": b"a name that is a pattern",
    }
    start = {**kept, **old, "README.md": b"old card", "config.json": FILES["config.json"]}
    hub.repositories["models/owner/latex"] = Repository(start)
    push_folder(model, to(name))
    assert hub.repositories["models/owner/latex"].files == {**kept, **FILES}
    before = list(hub.commits)
    again = push_folder(model, to(name))  # nothing new: nothing is sent twice
    assert again.revision == hub.repositories["models/owner/latex"].commit
    assert hub.commits == before or name == "modelscope"


def test_what_belongs_to_a_model():
    remote = ["a.safetensors", "x/a.safetensors", "README.md", ".gitattributes", "demo.py", "b.bin"]
    assert stale_files(remote, ["a.safetensors"]) == ["b.bin"]
    assert stale_files(remote, []) == ["a.safetensors", "b.bin"]


@pytest.mark.parametrize("name", HUBS)
def test_damage_on_the_way_is_noticed(hub, model, name):
    hub.damage = True
    with pytest.raises(HubError, match="whole, in") as caught:
        push_folder(model, to(name))
    assert "sha256" in str(caught.value) or "failed to upload" in str(caught.value)
    assert not any(path.endswith(".safetensors") for path in _files(hub))
    assert held(model) == FILES


@pytest.mark.parametrize("name", HUBS)
@pytest.mark.parametrize("file", ["model-00001-of-00002.safetensors", "config.json"])
def test_a_hub_that_holds_something_else_is_noticed(hub, model, name, file):
    hub.forge = {file}
    with pytest.raises(HubError, match="not those that were sent") as caught:
        push_folder(model, to(name))
    assert f"first: {file}" in str(caught.value)
    hub.forge = set()
    push_folder(model, to(name))  # the control: the same push to an honest hub


@pytest.mark.parametrize("name", HUBS)
@pytest.mark.parametrize("pushing", [True, False])
def test_nobody_is_logged_in(hub, model, name, pushing, monkeypatch):
    for token, words in (("", "there is no token"), ("hf_" + "wrong" * 5, "is not valid")):
        for variable in ("HF_TOKEN", "MODELSCOPE_API_TOKEN"):
            monkeypatch.setenv(variable, token)
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(model / "none"))
        with pytest.raises(HubError, match="login") as caught:
            push_folder(model, to(name)) if pushing else require_pushable(to(name))
        if token or not pushing:
            assert words in str(caught.value)
        assert "hf_wrong" not in str(caught.value)
    assert hub.repositories == {}
    assert held(model) == FILES


@pytest.mark.parametrize("name", HUBS)
def test_another_s_name_is_refused(hub, model, name):
    with pytest.raises(HubError, match="does not let this login write to stranger/latex"):
        push_folder(model, to(name, "stranger/latex"))
    hub.repositories["models/owner/latex"] = Repository({"config.json": b"{}"})
    refused = "api/models/owner" if name == "huggingface" else "api/v1/repos"
    hub.refuse[refused] = 403
    with pytest.raises(HubError) as caught:
        push_folder(model, to(name))
    assert "write" in str(caught.value) or "failed to upload" in str(caught.value)


def test_the_hub_s_own_reason_is_told_without_the_token(hub, model):
    hub.refuse["api/models/owner/latex/commit"] = 413
    with pytest.raises(HubError, match=r"it answered 413, no, \*\*\* may not") as caught:
        push_folder(model, to("huggingface"))
    assert TOKEN not in str(caught.value)
    assert "`hf upload owner/latex" in str(caught.value)


@pytest.mark.parametrize("name", HUBS)
def test_no_network_is_one_sentence_within_seconds(hub, model, name):
    hub.stop()
    start = time.monotonic()
    for attempt in (require_pushable, lambda where: push_folder(model, where)):
        with pytest.raises(HubError, match="could not be reached to push owner/latex") as caught:
            attempt(to(name))
        assert "\n" not in str(caught.value)
    assert time.monotonic() - start < 5
    assert held(model) == FILES


def test_offline_mode_is_honoured(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="OfflineModeIsEnabled"):
        require_pushable(to("huggingface"))
    assert hub.requests == []


@pytest.mark.parametrize("repo", ["latex", "a/b/c", "/latex", "owner/", "owner/la tex", "../x/y"])
def test_a_name_that_is_none(repo):
    with pytest.raises(UsageError, match="expected OWNER/NAME"):
        require_pushable(to("huggingface", repo))


def test_modelscope_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=r"vlmtune\[modelscope\]"):
        require_pushable(to("modelscope"))


@pytest.mark.parametrize("name", HUBS)
def test_standard_output_is_ours(hub, model, name, capfd):
    push_folder(model, to(name))
    hub.refuse = {"api/": 403}
    with pytest.raises(VlmtuneError):
        push_folder(model, to(name))
    said = capfd.readouterr()
    assert said.out == ""
    assert TOKEN not in said.err


def _files(hub: PushHub) -> list[str]:
    return [path for each in hub.repositories.values() for path in each.files]
