"""The hubs' own libraries against a hub on this computer, truthful or not."""

from __future__ import annotations

import gc
import hashlib
import importlib.util
import io
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fakehub import COMMIT, FakeHub, Repository
from vlmtune.errors import HubError, MissingExtraError
from vlmtune.hub import download_model, load_dataset_records
from vlmtune.hub.files import wanted_files

MODEL = {
    "config.json": b'{"model_type": "tiny"}',
    "model.safetensors": bytes(range(256)) * 400,
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "modeling_evil.py": b"raise SystemExit",
    "pytorch_model.bin": b"a pickle",
    "onnx/config.json": b"{}",
}
KEPT = ("chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json")

# datasets 5.2 leaves tables open when it finds that their columns do not go together; the collector
# closes them, with a complaint that would fall on whatever test runs then.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def _tables_are_closed() -> Iterator[None]:
    yield
    gc.collect()


needs_modelscope = pytest.mark.skipif(
    importlib.util.find_spec("modelscope_hub") is None, reason="modelscope is not installed"
)
HUBS = ["huggingface", pytest.param("modelscope", marks=needs_modelscope)]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    fake = FakeHub().start()
    fake.repositories["models/owner/tiny"] = Repository(dict(MODEL))
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", fake.endpoint)
    template = fake.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", fake.endpoint)
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "modelscope"))
    monkeypatch.setenv("MODELSCOPE_HOME", str(tmp_path / "modelscope_home"))
    yield fake
    fake.stop()


@pytest.mark.parametrize("name", HUBS)
@pytest.mark.usefixtures("hub")
def test_a_model_arrives_without_what_could_run_code(name):
    result = download_model("owner/tiny", hub=name)
    assert result.revision == COMMIT
    assert result.hub == name
    assert {n: (result.path / n).read_bytes() for n in KEPT} == {n: MODEL[n] for n in KEPT}
    assert not any((result.path / n).exists() for n in MODEL if n not in KEPT)
    assert result.bytes == sum(len(MODEL[n]) for n in KEPT)
    lines = "".join(f"{hashlib.sha256(MODEL[n]).hexdigest()}  {n}\n" for n in KEPT)
    assert result.sha256 == hashlib.sha256(lines.encode()).hexdigest()


@pytest.mark.parametrize("name", HUBS)
@pytest.mark.usefixtures("hub")
def test_out_holds_the_same_files(name, tmp_path):
    result = download_model("owner/tiny", hub=name, out=tmp_path / "here")
    assert result.path == tmp_path / "here"
    assert result.sha256 == download_model("owner/tiny", hub=name).sha256
    assert (tmp_path / "here" / "model.safetensors").read_bytes() == MODEL["model.safetensors"]


@pytest.mark.parametrize("out", [None, "here"])
@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_wrong_bytes_are_fetched_again(hub, file, out, tmp_path):
    hub.repositories["models/owner/tiny"].wrong[file] = 2
    result = download_model("owner/tiny", out=out and tmp_path / out)
    assert (result.path / file).read_bytes() == MODEL[file]


@needs_modelscope
def test_wrong_bytes_are_fetched_again_from_modelscope(hub, monkeypatch):
    monkeypatch.setattr("modelscope_hub._download.DOWNLOAD_INTEGRITY_RETRY_BACKOFF", 0.01)
    hub.repositories["models/owner/tiny"].wrong["model.safetensors"] = 2
    result = download_model("owner/tiny", hub="modelscope")
    assert (result.path / "model.safetensors").read_bytes() == MODEL["model.safetensors"]


@pytest.mark.parametrize("name", HUBS)
def test_bytes_that_stay_wrong_are_refused_and_removed(hub, name, tmp_path, monkeypatch):
    if name == "modelscope":
        monkeypatch.setattr("modelscope_hub._download.DOWNLOAD_INTEGRITY_RETRY_BACKOFF", 0.01)
    hub.repositories["models/owner/tiny"].wrong["model.safetensors"] = 99
    with pytest.raises(HubError, match=r"model\.safetensors of owner/tiny on"):
        download_model("owner/tiny", hub=name)
    wrong = bytes([MODEL["model.safetensors"][0] ^ 1]) + MODEL["model.safetensors"][1:]
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert all(path.read_bytes() != wrong for path in left)


@pytest.mark.parametrize("name", HUBS)
def test_what_is_cached_needs_no_network(hub, name, tmp_path):
    online = download_model("owner/tiny", hub=name)
    hub.stop()
    assert download_model("owner/tiny", hub=name) == online
    assert download_model("owner/tiny", hub=name, out=tmp_path / "x").sha256 == online.sha256


@pytest.mark.parametrize("name", HUBS)
def test_damage_in_the_cache_is_seen_without_a_network(hub, name):
    online = download_model("owner/tiny", hub=name)
    hub.stop()
    weights = (online.path / "model.safetensors").resolve()
    weights.write_bytes(weights.read_bytes()[::-1])
    with pytest.raises(HubError, match=r"model\.safetensors of owner/tiny"):
        download_model("owner/tiny", hub=name)


@pytest.mark.parametrize("name", HUBS)
def test_a_part_in_the_cache_is_no_model(hub, name):
    online = download_model("owner/tiny", hub=name)
    hub.stop()
    (online.path / "model.safetensors").unlink()
    with pytest.raises(HubError, match="could not be reached"):
        download_model("owner/tiny", hub=name)


def test_a_cache_filled_by_another_program(hub):
    online = download_model("owner/tiny")
    hub.stop()
    for tree in online.path.parents[1].glob("trees/*"):
        tree.unlink()
    assert download_model("owner/tiny") == online


@pytest.mark.parametrize("name", HUBS)
def test_no_network_is_one_sentence_within_seconds(hub, name):
    hub.stop()
    start = time.monotonic()
    with pytest.raises(HubError) as caught:
        download_model("owner/tiny", hub=name)
    assert time.monotonic() - start < 5
    message = str(caught.value)
    assert "model.base=DIR" in message
    assert "vlmtune download owner/tiny" in message
    assert "model.hub=" in message
    assert message.count(". ") == 0
    assert "\n" not in message


def test_offline_mode_is_honoured(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="offline mode is set"):
        download_model("owner/tiny")
    assert hub.requests == []


@pytest.mark.parametrize("name", HUBS)
def test_refusals(hub, name):
    hub.repositories["models/owner/gated"] = Repository({}, status=403)
    hub.repositories["models/owner/pickled"] = Repository(
        {"config.json": b"{}", "pytorch_model.bin": b"x"}
    )
    for model, words in {
        "owner/gated": "gated or private",
        "owner/absent": "There is no model owner/absent",
        "owner/pickled": "must be safetensors and nothing is unpickled",
    }.items():
        with pytest.raises(HubError, match=words):
            download_model(model, hub=name)
    with pytest.raises(HubError, match="no revision 'v9'"):
        download_model("owner/tiny", hub=name, revision="v9")


@pytest.mark.usefixtures("hub")
def test_a_name_that_is_none():
    with pytest.raises(HubError, match="expected owner/name"):
        download_model("a/b/c")


def test_modelscope_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=r"vlmtune\[modelscope\]"):
        download_model("owner/tiny", hub="modelscope")


def test_a_second_copy_of_the_weights_is_left_out():
    names = ["consolidated.safetensors", "model-00001-of-00001.safetensors", "config.json"]
    assert wanted_files(names, "m") == names[1:]
    assert wanted_files(["consolidated.safetensors"], "m") == ["consolidated.safetensors"]


# Data sets


def _picture(color: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), color).save(buffer, "PNG")
    return buffer.getvalue()


PICTURES = [_picture((200, 10, 10)), _picture((10, 200, 10))]


@pytest.fixture
def dataset(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.endpoint)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setattr(
        datasets.config, "DOWNLOADED_DATASETS_PATH", str(tmp_path / "datasets" / "downloads")
    )
    features = datasets.Features(
        {"image": datasets.Image(), "text": datasets.Value("string")}
    ).arrow_schema
    images = [
        {"bytes": PICTURES[0], "path": "0.png"},
        {"bytes": PICTURES[1], "path": "1.png"},
        {"bytes": None, "path": str(Path(__file__))},  # a file of the reader's computer
    ]
    table = pa.table({"image": images, "text": ["red", "green", "stolen"]}, schema=features)
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    hub.repositories["datasets/owner/colors"] = Repository(
        {
            "README.md": b"# colors\n",
            "data/train-00000-of-00001.parquet": buffer.getvalue(),
            "extra.py": b"raise SystemExit('must not run')",
        }
    )
    return hub


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", HUBS)
@pytest.mark.usefixtures("dataset")
def test_rows_keep_their_bytes_and_steal_none(name, streaming):
    rows, revision = load_dataset_records("owner/colors", hub=name, streaming=streaming)
    assert revision == COMMIT
    assert list(rows) == [
        {"image": {"bytes": PICTURES[0], "path": "0.png"}, "text": "red"},
        {"image": {"bytes": PICTURES[1], "path": "1.png"}, "text": "green"},
        {"image": {"bytes": None, "path": "test_hub.py"}, "text": "stolen"},
    ]


# The csv reader of ``datasets`` leaves its file to the garbage collector.
@pytest.mark.filterwarnings(
    "ignore:Exception ignored in.*FileIO:pytest.PytestUnraisableExceptionWarning"
)
def test_pictures_that_lie_beside_the_table(dataset):
    dataset.repositories["datasets/owner/folder"] = Repository(
        {
            "metadata.csv": b"file_name,text\nred.png,red\ngreen.png,green\n",
            "red.png": PICTURES[0],
            "green.png": PICTURES[1],
        }
    )
    rows, _ = load_dataset_records("owner/folder")
    assert sorted((row["text"], row["image"]["bytes"]) for row in rows) == [
        ("green", PICTURES[1]),
        ("red", PICTURES[0]),
    ]


@pytest.mark.parametrize("name", HUBS)
@pytest.mark.usefixtures("dataset")
def test_splits_that_exist_are_named(name):
    with pytest.raises(HubError, match="no split 'test'; it has: train"):
        load_dataset_records("owner/colors", hub=name, split="test")


@pytest.mark.usefixtures("dataset")
def test_subsets_that_exist_are_named():
    with pytest.raises(HubError, match="default"):
        load_dataset_records("owner/colors", subset="other")


def test_a_loading_script_is_not_run(dataset):
    dataset.repositories["datasets/owner/scripted"] = Repository(
        {"scripted.py": b"raise SystemExit('must not run')"}
    )
    with pytest.raises(HubError, match="cannot be read"):
        load_dataset_records("owner/scripted")


@pytest.mark.parametrize("name", HUBS)
def test_refused_data_sets(dataset, name):
    with pytest.raises(HubError, match="There is no dataset owner/absent"):
        load_dataset_records("owner/absent", hub=name)
    dataset.repositories["datasets/owner/gated"] = Repository({}, status=403)
    with pytest.raises(HubError, match="gated or private"):
        load_dataset_records("owner/gated", hub=name)
    dataset.stop()
    with pytest.raises(HubError, match="give a local file or folder"):
        load_dataset_records("owner/colors", hub=name)
