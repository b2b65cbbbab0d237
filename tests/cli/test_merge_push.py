"""``vlmtune merge --push``: from a run to another machine's folder, through a hub here."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from pushhub import TOKEN, PushHub, reached
from vlmtune.hub import download_model

# huggingface_hub 2.4 sends a file in a way that its client calls old.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PushHub]:
    with reached(tmp_path, monkeypatch) as fake:
        yield fake


def sha256s(folder: Path) -> dict[str, str]:
    files = [path for path in folder.iterdir() if path.is_file()]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_merged_and_pushed_is_what_others_download(hub, lora_run, tmp_path, command):
    """The whole way: run -> merged folder -> hub -> another machine's folder."""
    out = tmp_path / "merged"
    done = command("merge", lora_run, "--out", out, "--push", "owner/latex", "--private", "--json")
    assert done.status == 0, done.err
    pushed = done.json["pushed"]
    repository = hub.repositories["models/owner/latex"]
    assert pushed == {
        "hub": "huggingface",
        "repo": "owner/latex",
        "revision": repository.commit,
        "url": f"{hub.endpoint}/owner/latex",
    }
    assert hub.private == {"models/owner/latex"}
    back = download_model("owner/latex", out=tmp_path / "back").path
    mine, theirs = sha256s(out), sha256s(back)
    assert {name: theirs[name] for name in mine} == mine
    assert {"model.safetensors", "contract.json", "README.md"} <= mine.keys()
    # No token, and no place on this machine, in anything that was said or sent.
    said = done.out.encode() + done.err.encode()
    assert TOKEN.encode() not in b"".join([said, *repository.files.values()])
    assert str(tmp_path.parent).encode() not in repository.files["README.md"]


def test_the_folder_stays_when_the_push_fails(hub, lora_run, tmp_path, command):
    hub.refuse["api/models/owner/latex/commit"] = 403
    out = tmp_path / "merged"
    done = command("merge", lora_run, "--out", out, "--push", "owner/latex", "--json")
    assert done.status == 1
    assert done.json["error"]["code"] == "hub"
    assert "does not let this login write to owner/latex" in done.message
    assert f"`hf upload owner/latex {out}`" in done.message
    assert TOKEN not in done.out + done.err
    assert {"model.safetensors", "contract.json", "README.md"} <= sha256s(out).keys()


def test_a_push_that_cannot_be_is_refused_before_merging(hub, lora_run, tmp_path, command):
    out = tmp_path / "merged"
    for options, status, words in (
        (["--push", "latex"], 2, "expected OWNER/NAME"),
        (["--private"], 2, "add --push OWNER/NAME"),
        (["--push", "owner/latex", "--push-hub", "github"], 2, "expected huggingface or"),
    ):
        done = command("merge", lora_run, "--out", out, *options)
        assert (done.status, out.exists()) == (status, False)
        assert words in done.message
    hub.stop()
    done = command("merge", lora_run, "--out", out, "--push", "owner/latex")
    assert (done.status, out.exists()) == (1, False)
    assert "could not be reached" in done.message
