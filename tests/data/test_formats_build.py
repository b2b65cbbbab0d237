"""Formats through ``prepare`` and the builder: files, boxes, URLs."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as Pillow

from format_samples import COCO_BOXES, COCO_CAPTIONS, read, rows_of
from vlmtune.data.boxes import to_grid
from vlmtune.data.build import Builder
from vlmtune.data.conversation import Box, Conversation, Image, Text
from vlmtune.data.dataset import PreparedDataset
from vlmtune.data.formats import FORMATS
from vlmtune.data.layouts import rows_of_document
from vlmtune.data.media import Size
from vlmtune.data.prepare import PrepareOptions, PrepareResult, prepare
from vlmtune.data.quarantine import HINTS, read_quarantine
from vlmtune.data.sources import FieldError, open_local
from vlmtune.errors import FetchError, FormatError


def save(path: Path, size: tuple[int, int] = (12, 8), **options: Any) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    Pillow.new("RGB", size).save(path, **options)
    return path.read_bytes()


def made(source: Path, **options: Any) -> tuple[PrepareResult, list[Conversation]]:
    out = source.parent / "prepared"
    result = prepare(source, out, PrepareOptions(max_bad=99, **options))
    return result, list(PreparedDataset.open(out).split("train"))


def build(row: dict[str, Any], folder: Path, **options: Any) -> Conversation:
    return Builder(**options).build(read([row])[0], "1", folder, "here")


def boxes_of(conversation: Conversation) -> list[Box]:
    return [part for part in conversation.parts() if isinstance(part, Box)]


def test_the_golden_conversions_of_swift(shared_data: Path, tmp_path: Path) -> None:
    golden = json.loads((shared_data / "golden" / "expected_values.json").read_text())
    pairs = golden["grounding"]["ms_swift_conversion"]["pairs"]
    assert len(pairs) > 3
    for pair in pairs:
        size = Size(*pair["implied_image"])
        save(tmp_path / "a.png", size)
        row = {
            "messages": [
                {"role": "user", "content": "<image>?"},
                {"role": "assistant", "content": "<bbox>"},
            ],
            "images": ["a.png"],
            "objects": {"ref": [], "bbox": [pair["real"]]},
        }
        if len(pair["real"]) != 4:  # a point
            with pytest.raises(FieldError, match="points are no boxes"):
                build(row, tmp_path)
            continue
        (box,) = boxes_of(build(row, tmp_path))
        assert box.xyxy == tuple(pair["real"])
        assert list(to_grid(box.xyxy, size, 1000)) == pair["norm1000"]
        normed = [x / side for x, side in zip(pair["real"], [*size, *size], strict=True)]
        row["objects"] = {"ref": [], "bbox": [normed], "bbox_type": "norm1"}
        (box,) = boxes_of(build(row, tmp_path))
        assert box.xyxy == pytest.approx(pair["real"])
        assert list(to_grid(box.xyxy, size, 1000)) == pair["norm1000"]


def test_boxes_of_a_grid_are_of_the_upright_image(tmp_path: Path) -> None:
    turned = Pillow.Exif()
    turned[274] = 6
    save(tmp_path / "a.jpg", (400, 200), exif=turned)  # upright 200 x 400
    value = "Picture 1: <img>a.jpg</img>\n?"
    row = {
        "conversations": [
            {"from": "user", "value": value},
            {"from": "assistant", "value": "<ref>x</ref><box>(500,250),(999,1500)</box>"},
        ]
    }
    conversation = build(row, tmp_path)
    # Outside of the image: kept, ``check`` finds it.
    assert boxes_of(conversation) == [Box(0, "x", (100.0, 100.0, 199.8, 600.0))]
    assert conversation.references == ()
    assert "notes" not in conversation.meta


@pytest.mark.parametrize("box", [[5, 1, 4, 2], [1, 2, 3, 1.5]])
def test_boxes_the_wrong_way_round(tmp_path: Path, box: list[float]) -> None:
    save(tmp_path / "a.png")
    row = {"query": "<image>?", "response": "<bbox>", "images": ["a.png"]}
    assert boxes_of(build({**row, "objects": {"bbox": [[1, 2, 1, 2]]}}, tmp_path))
    for objects in ({"bbox": [box]}, {"bbox": [[0, 0, 1, 1]], "image_id": [1]}):
        with pytest.raises(FieldError) as caught:
            build({**row, "objects": objects}, tmp_path)
        assert caught.value.code == "bad_box"


def test_coco_captions(tmp_path: Path) -> None:
    save(tmp_path / "1.png")
    save(tmp_path / "2.png")
    orphan = {"image_id": 5, "id": 1, "caption": "Of nothing."}
    document = {**COCO_CAPTIONS, "annotations": [*COCO_CAPTIONS["annotations"], orphan]}
    (tmp_path / "captions.json").write_text(json.dumps(document))
    result, rows = made(tmp_path / "captions.json", prompt="Describe.")
    assert result.detection.name == "coco"
    assert result.to_json()["rows"] == {"in": 3, "kept": 2, "quarantined": 1}
    assert [row.id for row in rows] == ["391895", "522418"]
    assert rows[0].references == ("A man with a red helmet.", "Man riding a motor bike.")
    assert rows[0].answer in rows[0].references
    assert rows[0].messages[0].content == (Image(0), Text("Describe."))
    (entry,) = read_quarantine(tmp_path / "prepared/quarantine.jsonl")
    assert (entry["code"], entry["field"]) == ("missing_field", "file_name")
    summary = json.loads((tmp_path / "prepared/summary.json").read_text())
    assert summary["format"] == result.detection.to_json()


def test_coco_boxes(tmp_path: Path) -> None:
    save(tmp_path / "1.png", (640, 480))
    (tmp_path / "instances.json").write_text(json.dumps(COCO_BOXES))
    _, (row,) = made(tmp_path / "instances.json")
    assert row.messages[0].content == (Image(0),)
    assert row.messages[1].content == (
        Box(0, "person", (10.5, 20, 40.5, 60.25)),
        Box(0, "car", (0, 0, 640, 480)),
    )
    assert row.meta["notes"] == ["1 crowd annotations left out"]
    assert row.references == ()


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"bbox": [1, 2, 3]}, "bad_box"),
        ({"bbox": [1, 2, -3, 4]}, "bad_box"),
        ({"bbox": None}, "bad_box"),
        ({"category_id": 99}, "missing_field"),
        ({"iscrowd": 1}, "empty_answer"),
        ({"caption": "Both?"}, None),
    ],
)
def test_coco_faults(tmp_path: Path, change: dict[str, Any], code: str | None) -> None:
    save(tmp_path / "1.png", (640, 480))
    annotation = {**COCO_BOXES["annotations"][0], **change}
    (row,) = rows_of_document({**COCO_BOXES, "annotations": [annotation]}) or []
    if code is None:
        assert build(row, tmp_path).answer == "Both?"
        return
    with pytest.raises(FieldError) as caught:
        build(row, tmp_path)
    assert caught.value.code == code
    assert code in HINTS


def test_boxes_of_an_image_of_another_size(tmp_path: Path) -> None:
    save(tmp_path / "1.png", (480, 640))
    (row,) = rows_of_document(COCO_BOXES) or []
    with pytest.raises(FieldError, match="640 x 480 pixels, the file has 480 x 640") as caught:
        build(row, tmp_path)
    assert caught.value.code == "size_mismatch"


def test_a_json_object_that_is_no_coco(tmp_path: Path) -> None:
    for document in ({}, {"images": [], "annotations": {}}, {"images": [1], "annotations": []}):
        (tmp_path / "x.json").write_text(json.dumps(document))
        with pytest.raises(FormatError, match="a JSON dict; expected a list of objects, or COCO"):
            list(open_local(tmp_path / "x.json").records)


def test_folders_of_classes(tmp_path: Path) -> None:
    folder = tmp_path / "animals"
    for name in ("train/cat/1.png", "train/dog/1.jpg", "test/cat/2.png"):
        save(folder / name)
    (folder / "README.md").write_text("x")
    (folder / "train/cat/.DS_Store").write_text("x")
    (folder / "train/cat/notes.txt").write_text("x")
    result, rows = made(folder, split_by="column:split", prompt="Which animal?")
    assert result.detection.name == "imagefolder"
    assert result.splits == {"train": 2, "validation": 1}
    assert [row.answer for row in rows] == ["cat", "dog"]
    assert rows[0].messages[0].content == (Image(0), Text("Which animal?"))
    # What lies there and is no image is not passed over silently.
    assert result.quarantine == {"image_not_an_image": 1}


@pytest.mark.parametrize("names", [("1.png",), ("images/1.png",), ("train/1.png", "val/2.png")])
def test_folders_that_are_no_classes(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        save(tmp_path / "folder" / name)
    with pytest.raises(FormatError, match="no table"):
        open_local(tmp_path / "folder")


def test_an_image_folder_with_metadata(tmp_path: Path) -> None:
    save(tmp_path / "train/a.png")
    save(tmp_path / "train/b.png")
    rows = [{"file_names": ["a.png", "b.png"], "text": "both"}, {"file_name": "a.png", "text": "a"}]
    (tmp_path / "train/metadata.jsonl").write_text("\n".join(map(json.dumps, rows[:1])))
    result, (row,) = made(tmp_path / "train")
    assert result.detection.name == "imagefolder"
    assert row.messages[0].content == (Image(0), Image(1))


def test_data_urls(tmp_path: Path) -> None:
    data = save(tmp_path / "a.png")
    row = rows_of("openai", "parts with data and other URLs")[0]
    parts = row["messages"][1]["content"]

    def asked(url: str, fetch: Callable[[str], bytes] | None = None) -> Conversation:
        part = {"type": "image_url", "image_url": {"url": url}}
        messages = [{"role": "user", "content": [parts[0], part]}, row["messages"][2]]
        return build({"messages": messages}, tmp_path, fetch=fetch)

    encoded = base64.b64encode(data).decode()
    found = asked(f"data:image/png;base64,{encoded[:20]}\n{encoded[20:]}")
    assert found.images[0].data == data
    assert found.images[0].path is None
    assert asked("a.png").images[0].data == data
    for url, code in (
        ("data:image/png;base64,@@@", "bad_data_url"),
        ("data:image/png,abc", "bad_data_url"),
        ("data:", "bad_data_url"),
        ("data:image/png;base64,AAAA", "image_not_an_image"),
        ("data:image/png;base64,", "image_empty"),
        ("https://x.org/a.jpg", "url_not_allowed"),
        ("file:///etc/passwd", "url_not_allowed"),
        ("../a.png", "path_outside"),
    ):
        with pytest.raises(FieldError) as caught:
            asked(url)
        assert (caught.value.code, caught.value.field) == (code, "messages"), url
        assert code in HINTS


def test_data_urls_have_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmtune.data.build.MAX_FILE_BYTES", 100)
    row = {"image": "data:image/png;base64," + "A" * 400, "text": "x"}
    with pytest.raises(FieldError) as caught:
        build(row, tmp_path)
    assert caught.value.code == "image_too_large"
    assert len(str(caught.value)) < 200


def test_a_fetcher_opens_web_addresses_only(tmp_path: Path) -> None:
    data = save(tmp_path / "a.png")
    asked: list[str] = []

    def fetch(url: str) -> bytes:
        asked.append(url)
        return data

    url = "HTTPS://me:secret@x.org/a.png?key=1"
    row = {"image": url, "text": "x"}
    image = build(row, tmp_path, fetch=fetch).images[0]
    assert (image.data, image.path) == (data, "https://x.org/a.png")
    assert build({**row, "image": {"bytes": None, "path": url}}, tmp_path, fetch=fetch).images
    assert build({**row, "image": {"bytes": data, "path": url}}, tmp_path).images
    assert asked == [url, url]
    with pytest.raises(FieldError, match="URL"):
        build({**row, "image": "ftp://x.org/a.png"}, tmp_path, fetch=fetch)

    def fail(_: str) -> bytes:
        raise FetchError("url_timeout", "no answer in time")

    with pytest.raises(FieldError) as caught:
        build(row, tmp_path, fetch=fail)
    assert (caught.value.code, caught.value.field) == ("url_timeout", "image")
    assert "secret" not in str(caught.value.value)


def test_nested_columns_and_a_system_prompt(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    row = {
        "scan": {"file": "a.png"},
        "query": {"en": "What?", "de": "Was?"},
        "answer.text": "dotted",
        "answer": {"text": "nested"},
        "role": "Be brief.",
    }
    columns = {
        "image": "scan.file",
        "question": "query.de",
        "text": "answer.text",
        "system": "role",
    }
    (draft,) = read([row], "table", **columns)
    assert draft.images == ("a.png",)
    assert [message.text for message in draft.messages] == ["Be brief.", "Was?", "dotted"]
    (draft,) = read([row], "table", **{**columns, "text": "query.en"})
    assert draft.messages[-1].text == "What?"
    with pytest.raises(FormatError, match=r"did you mean 'query\.en'"):
        read([row], "table", **{**columns, "text": "query.eng"})
    reader = FORMATS["table"].reader([row], columns)
    with pytest.raises(FieldError) as caught:
        reader({**row, "scan": None})
    assert (caught.value.code, caught.value.field) == ("missing_field", "scan.file")


def test_image_id_is_an_id_only_where_it_can_be() -> None:
    rows = [{"image_id": n, "image": "a.png", "text": "x"} for n in (7, 8)]
    assert [draft.id for draft in read(rows)] == ["7", "8"]
    assert [draft.id for draft in read([rows[0], rows[0]])] == [None, None]
    asking = [{**row, "question": "?"} for row in rows]
    assert [draft.id for draft in read(asking)] == [None, None]
    assert [draft.id for draft in read([{**row, "id": "x"} for row in rows[:1]])] == ["x"]
    assert [draft.id for draft in read(asking, id="image_id")] == ["7", "8"]


def test_half_a_question_is_not_dropped() -> None:
    row = {"instruction": "Translate.", "input": "Hund", "output": "dog"}
    with pytest.raises(FormatError, match="not clear which column holds the question"):
        read([row])
