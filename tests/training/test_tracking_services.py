"""What each service has written is read back with its own means: figures, pictures, captions.

SwanLab's dashboard wants an older rich than everything else; these tests need an environment of
their own with ``swanlab[dashboard] wandb trackio``, and are skipped where one of them is absent.
"""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from PIL import Image

from vlmtune.training.tracking import background
from vlmtune.training.tracking.config import TrackingConfig
from vlmtune.training.tracking.service import Shown
from vlmtune.training.tracking.trackers import open_trackers

pytestmark = pytest.mark.slow
HYPERPARAMETERS = {"tuning": {"rank": 64, "targets": ["q_proj"]}, "rows": 996}
ANSWER = r"x ^ { 2 } <b> | *步骤* {step}"


def needs(*packages):
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(absent), reason=f"{', '.join(absent)} is not installed")


def png(colour):
    encoded = io.BytesIO()
    Image.new("RGB", (90, 40), colour).save(encoded, "PNG")
    return encoded.getvalue()


COLOURS = {"row-0": (255, 0, 0), "row-1": (0, 0, 255)}


def answer(step):
    return ANSWER.replace("{step}", str(step))


@pytest.fixture
def track(tmp_path, monkeypatch, caplog):
    """Three steps and two evaluations in a service; no warning may be heard."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "wandb-data"))
    for name in ("SWANLAB_API_KEY", "WANDB_API_KEY", "SWANLAB_MODE", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(background, "CLOSE_S", 120.0)  # a library's first import takes its time
    caplog.set_level(logging.WARNING)

    def run(service, mode, steps=(1, 2, 3), shown=(0, 3)):
        trackers = open_trackers(
            TrackingConfig(to=(service,), mode=mode, project="formulas", name="first"),
            folder=tmp_path,
            name="run",
            hyperparameters=HYPERPARAMETERS,
            begins=min(steps) if steps[0] > 1 else 0,
        )
        for step in sorted({*steps, *shown}):
            if step in steps:
                trackers.log(step, {"train/loss": 1 / step})
            if step in shown:
                rows = [
                    Shown(
                        id=name,
                        question="what?",
                        truth="x ^ { 2 }",
                        prediction=answer(step),
                        scores={"cer": 0.5},
                        picture=png(colour),
                    )
                    for name, colour in COLOURS.items()
                ]
                trackers.show(step, [*rows, Shown(id="t", question="", truth="", prediction="")])
        trackers.finish()
        assert [record.getMessage() for record in caplog.records] == []
        return tmp_path / "tracking" / service

    return run


def colour_of(data):
    image = Image.open(io.BytesIO(data)).convert("RGB")
    assert image.size == (90, 40)
    return image.getpixel((45, 20))


@needs("swanlab", "swanboard")
def test_swanlabs_dashboard(track):
    folder = track("swanlab", "local")
    with Dashboard(folder) as get:
        (experiment,) = json.loads(get("project"))["data"]["experiments"]
        assert (experiment["name"], experiment["status"]) == ("first", 1)
        assert experiment["config"]["rows"]["value"] == 996
        here = f"experiment/{experiment['id']}"

        def tag(name):
            return json.loads(get(f"{here}/tag/{name}"))["data"]["list"]

        losses = [(entry["index"], entry["data"]) for entry in tag("train/loss")]
        assert losses == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]
        entries = tag("Prediction")
        assert [entry["index"] for entry in entries] == [0, 3]
        for entry in entries:
            captions = [more["caption"] for more in entry["more"]]
            assert captions == [answer(entry["index"])] * 2
            pictures = [
                get(f"media/{name}?tag=Prediction&experiment_id={experiment['id']}")
                for name in entry["data"]
            ]
            assert [colour_of(picture) for picture in pictures] == list(COLOURS.values())
        texts = tag("predictions")[1]
        assert texts["data"][0] == f"prediction: {answer(3)}\ntruth: x ^ {{ 2 }}"
        assert [more["caption"] for more in texts["more"]] == ["row-0", "row-1", "t"]


class Dashboard:
    """SwanLab's own dashboard on a free port; gives what fetches from it."""

    def __init__(self, folder):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/api/v1/"
        program = Path(sys.executable).with_name("swanlab")
        self.command = [program, "watch", folder, "--port", str(port)]

    def __enter__(self):
        self.process = subprocess.Popen(
            self.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 60
        while True:
            try:
                self.get("project")
            except URLError:
                assert time.monotonic() < deadline
                time.sleep(0.1)
            else:
                return self.get

    def get(self, path):
        with urlopen(self.url + path) as answered:
            return answered.read()

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()


@needs("swanlab")
def test_swanlab_offline(track):
    folder = track("swanlab", "offline")
    track("swanlab", "offline", steps=(3, 4), shown=(4,))  # resumed
    first, second = (swanlab_records(run) for run in sorted(folder.glob("run-*")))
    assert first["start"][0].id == second["start"][0].id
    assert scalars(first) == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]
    assert scalars(second) == [(3, pytest.approx(1 / 3)), (4, 0.25)]
    media = [record for record in first["media"] if record.key == "Prediction"]
    assert [record.step for record in media] == [0, 3]
    (run, _) = sorted(folder.glob("run-*"))
    for record in media:
        assert [item.caption for item in record.value.items] == [answer(record.step)] * 2
        files = [run / "media" / "image" / item.filename for item in record.value.items]
        assert [colour_of(file.read_bytes()) for file in files] == list(COLOURS.values())
    (table,) = (r for r in first["media"] if r.key == "predictions" and r.step == 3)
    shown = json.loads((run / "media" / "echarts" / table.value.items[0].filename).read_text())
    assert shown["rowData"][1] == {
        "id": "row-1",
        "question": "what?",
        "truth": "x ^ { 2 }",
        "prediction": answer(3),
        "cer": 0.5,
    }


def swanlab_records(run):
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record
    from swanlab.sdk.internal.core_python.store import DataStoreReader

    reader = DataStoreReader()
    (file,) = run.glob("*.swanlab")
    reader.open(file)
    found = {"start": [], "scalar": [], "media": []}
    while (data := reader.scan()) is not None:
        record = Record()
        record.ParseFromString(data)
        for kind, records in found.items():
            if record.HasField(kind):
                records.append(getattr(record, kind))
    reader.close()
    return found


def scalars(records):
    return [(r.step, r.value.number) for r in records["scalar"] if r.key == "train/loss"]


@needs("wandb")
def test_wandb_offline(track):
    folder = track("wandb", "offline")
    track("wandb", "offline", steps=(3, 4), shown=(4,))  # resumed
    runs = sorted((folder / "wandb").glob("offline-run-*"))
    first, second = (wandb_records(run) for run in runs)
    assert first["run_id"] == second["run_id"]
    assert first["config"]["tuning"] == HYPERPARAMETERS["tuning"]
    losses = [(h["step"], h["train/loss"]) for h in first["history"] if "train/loss" in h]
    assert losses == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]
    losses = [(h["step"], h["train/loss"]) for h in second["history"] if "train/loss" in h]
    assert losses == [(3, pytest.approx(1 / 3)), (4, 0.25)]
    evaluations = [h for h in first["history"] if "Prediction" in h]
    assert [h["step"] for h in evaluations] == [0, 3]
    for shown in evaluations:
        assert shown["Prediction"]["captions"] == [answer(shown["step"])] * 2
        files = [runs[0] / "files" / name for name in shown["Prediction"]["filenames"]]
        assert [colour_of(file.read_bytes()) for file in files] == list(COLOURS.values())
        table = json.loads((runs[0] / "files" / shown["predictions"]["path"]).read_text())
        assert table["columns"] == ["image", "id", "question", "truth", "prediction", "cer"]
        expected = ["row-1", "what?", "x ^ { 2 }", answer(shown["step"]), 0.5]
        assert table["data"][1][1:] == expected
    assert first["table_pictures"] >= 2  # the table's own, in its artifact


def wandb_records(run):
    from wandb.proto.wandb_internal_pb2 import Record

    found = {"history": [], "config": {}, "run_id": None, "table_pictures": 0}
    (file,) = run.glob("*.wandb")
    for data in leveldb_records(file.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        if record.HasField("run"):
            found["run_id"] = record.run.run_id
            for item in record.run.config.update:
                found["config"][item.key] = json.loads(item.value_json)
        if record.HasField("history"):
            entry = {}
            for item in record.history.item:
                entry[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
            found["history"].append(nested(entry))
        if record.HasField("artifact"):
            names = [entry.path for entry in record.artifact.manifest.contents]
            found["table_pictures"] += sum(name.endswith(".png") for name in names)
        if record.request.HasField("log_artifact"):
            names = [e.path for e in record.request.log_artifact.artifact.manifest.contents]
            found["table_pictures"] += sum(name.endswith(".png") for name in names)
    return found


def nested(entry):
    made = {}
    for key, value in entry.items():
        section, _, rest = key.partition(".")
        if rest and "/" not in section:
            made.setdefault(section, {})[rest] = value
        else:
            made[key] = value
    return made


def leveldb_records(data):
    """Records of a log in LevelDB's format: blocks of 32 KiB after a header of 7 bytes."""
    place, parts = 7, []
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        parts.append(data[place + 7 : place + 7 + length])
        place += 7 + length
        if kind in (1, 4):  # the whole of it, or its last part
            yield b"".join(parts)
            parts = []


@needs("trackio")
def test_trackio(track, tmp_path):
    track("trackio", "local")
    track("trackio", None, steps=(3, 4), shown=(4,))  # resumed
    program = """
import json, trackio
from trackio.sqlite_storage import SQLiteStorage
(run,) = trackio.Api().runs("formulas")
logs = SQLiteStorage.get_logs("formulas", run.name)
print(json.dumps({"name": run.name, "config": run.config, "logs": logs}, default=str))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    told = json.loads(done.stdout)
    assert told["name"].startswith("first-")
    assert told["config"]["tuning"] == HYPERPARAMETERS["tuning"]
    losses = {log["step"]: log["train/loss"] for log in told["logs"] if "train/loss" in log}
    assert losses == {1: 1.0, 2: 0.5, 3: pytest.approx(1 / 3), 4: 0.25}
    tables = {log["step"]: log["predictions"] for log in told["logs"] if "predictions" in log}
    assert sorted(tables) == [0, 3, 4]
    for step, table in tables.items():
        rows = table["_value"]
        assert rows[2]["image"] is None
        assert [row["prediction"] for row in rows[:2]] == [answer(step)] * 2
        files = [tmp_path / "trackio" / "media" / row["image"]["file_path"] for row in rows[:2]]
        assert [colour_of(file.read_bytes()) for file in files] == list(COLOURS.values())
        assert rows[0]["image"]["caption"] == answer(step)


@needs("tensorboard")
def test_tensorboard(track):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = track("tensorboard", None)
    track("tensorboard", "local", steps=(3, 4), shown=(4,))  # resumed
    events = EventAccumulator(str(folder)).Reload()
    losses = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert losses == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3)), (4, 0.25)]
    for number, colour in enumerate(COLOURS.values()):
        images = events.Images(f"Prediction/{number:02d}")
        assert [image.step for image in images] == [0, 4]  # 3 is shown again by the resumed run
        assert [colour_of(image.encoded_image_string) for image in images] == [colour] * 2
        texts = [
            e.tensor_proto.string_val[0].decode()
            for e in events.Tensors(f"Prediction/{number:02d}/text")
        ]
        assert len(texts) == 3
        for step, text in zip((0, 3, 4), texts, strict=True):
            assert f"    {answer(step)}" in text
