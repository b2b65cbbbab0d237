from __future__ import annotations

import json
import pickle
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from vlmtune.data import writer as writer_module
from vlmtune.data.conversation import Box, Conversation, EncodedImage, Image, Message, Text
from vlmtune.data.dataset import PreparedDataset
from vlmtune.data.rows import conversation_to_row, row_to_conversation
from vlmtune.data.writer import DatasetWriter
from vlmtune.errors import ChangedError, RefusedError, UsageError

PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b55"
    "0000000a49444154789c63600000000200014821bc330000000049454e44ae426082"
)


def conversation(number: int, data: bytes = PNG) -> Conversation:
    return Conversation(
        f"id-{number}",
        (
            Message("system", (Text("你是助手"),)),
            Message("user", (Text("where?"), Image(0), Text(" \n"), Image(1))),
            Message("assistant", (Box(1, "击掌", (0.1, 1 / 3, 2.0, 1e9)), Text(f"{number}"))),
        ),
        (EncodedImage(data, "a/b.png"), EncodedImage(data + bytes([number % 256]))),
        (f"{number}", "other"),
        {"source": f"t.csv:{number}", "n": {"deep": [1, None]}},
    )


def write(out: Path, rows: list[Conversation], validation: set[int] | None = None) -> None:
    with DatasetWriter(out) as writer:
        for row in rows:
            writer.add(row)
        writer.finish(validation or set(), source="here", options={"a": 1})
        writer.publish()


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_row_round_trips() -> None:
    assert row_to_conversation(conversation_to_row(conversation(3))) == conversation(3)
    assert row_to_conversation(conversation_to_row(conversation(3))) != conversation(4)


def test_written_rows_are_read_back_equal(tmp_path: Path) -> None:
    rows = [conversation(number) for number in range(100)]
    write(tmp_path / "d", rows, validation={0, 50, 99})
    dataset = PreparedDataset.open(tmp_path / "d")
    train, validation = dataset.split("train"), dataset.split("validation")
    assert list(train) == [row for row in rows if row.id not in ("id-0", "id-50", "id-99")]
    assert [row.id for row in validation] == validation.ids == ["id-0", "id-50", "id-99"]
    assert train[-1].id == "id-98"
    assert train[5:7] == [train[5], train[6]]
    assert [train[index].id for index in (90, 3, 45, 3)] == ["id-92", "id-4", "id-46", "id-4"]
    with pytest.raises(IndexError):
        train[97]
    again = pickle.loads(pickle.dumps(train))
    assert again[7] == train[7]
    groups = pq.ParquetFile(next((tmp_path / "d/data").glob("train*"))).metadata
    assert max(groups.row_group(i).num_rows for i in range(groups.num_row_groups)) == 32
    dataset.verify()


def test_an_empty_validation_split(tmp_path: Path) -> None:
    write(tmp_path / "d", [conversation(0)])
    dataset = PreparedDataset.open(tmp_path / "d")
    assert len(dataset.split("validation")) == 0
    assert dataset.split("validation").ids == []
    with pytest.raises(UsageError, match=r"no split 'test'.*train \(1 rows\)"):
        dataset.split("test")


def test_equal_rows_make_equal_bytes(tmp_path: Path) -> None:
    rows = [conversation(number) for number in range(40)]
    write(tmp_path / "a", rows, validation={1})
    write(tmp_path / "b", rows, validation={1})
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_the_fingerprint_sees_order_text_image_and_split_but_not_paths(tmp_path: Path) -> None:
    rows = [conversation(0), conversation(1)]
    moved = Conversation(
        rows[0].id,
        rows[0].messages,
        tuple(EncodedImage(image.data, "elsewhere.png") for image in rows[0].images),
        rows[0].references,
    )
    other = conversation(0, data=PNG + b"x")
    variants = {
        "plain": (rows, {1}),
        "same": ([moved, rows[1]], {1}),
        "order": (rows[::-1], {0}),
        "split": (rows, {0}),
        "image": ([other, rows[1]], {1}),
        "fewer": (rows[:1], set()),
    }
    prints = {}
    for name, (content, validation) in variants.items():
        write(tmp_path / name, content, validation)
        prints[name] = PreparedDataset.open(tmp_path / name).fingerprint
    assert prints["plain"] == prints["same"] == prints.pop("order") != prints["split"]
    assert len(set(prints.values())) == len(prints) - 1


def test_the_fingerprint_sees_the_order_within_a_split(tmp_path: Path) -> None:
    rows = [conversation(0), conversation(1)]
    write(tmp_path / "a", rows)
    write(tmp_path / "b", rows[::-1])
    one, other = (PreparedDataset.open(tmp_path / name).fingerprint for name in "ab")
    assert one != other


def test_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "BYTES_PER_SHARD", 1)
    rows = [conversation(number) for number in range(70)]
    write(tmp_path / "d", rows)
    names = sorted(path.name for path in (tmp_path / "d/data").iterdir())
    assert names == [f"train-{number:05d}-of-00003.parquet" for number in range(3)]
    read = PreparedDataset.open(tmp_path / "d").split("train")
    assert list(read) == rows
    assert read.ids == [row.id for row in rows]


def test_hugging_face_datasets_reads_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    import datasets

    write(tmp_path / "d", [conversation(number, PNG[:]) for number in range(5)], validation={4})
    for name in ("quarantine.jsonl", "summary.json"):
        (tmp_path / "d" / name).write_text("{}\n")
    loaded = datasets.load_dataset(str(tmp_path / "d"), cache_dir=str(tmp_path / "cache"))
    assert {name: len(split) for name, split in loaded.items()} == {"train": 4, "validation": 1}
    row = loaded["train"][2]
    assert row["images"][0].size == (1, 1)
    assert row["messages"][1]["content"][0]["text"] == "where?"
    assert json.loads(row["meta"])["source"] == "t.csv:2"


def test_what_is_no_prepared_dataset(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"does not exist.*vlmtune prepare"):
        PreparedDataset.open(tmp_path / "nothing")
    with pytest.raises(UsageError, match=r"no dataset\.json.*vlmtune prepare"):
        PreparedDataset.open(tmp_path)


def test_a_newer_or_damaged_dataset(tmp_path: Path) -> None:
    write(tmp_path / "d", [conversation(0)])
    path = tmp_path / "d" / "dataset.json"
    info = json.loads(path.read_text())
    path.write_text(json.dumps({**info, "format_version": 2, "unknown": 1}))
    with pytest.raises(UsageError, match=r"version 2.*Upgrade"):
        PreparedDataset.open(tmp_path / "d")
    for broken in ("{", "[]", "{}", json.dumps({**info, "files": 3})):
        path.write_text(broken)
        with pytest.raises(ChangedError, match="not what vlmtune wrote"):
            PreparedDataset.open(tmp_path / "d")


def test_changed_parquet_files(tmp_path: Path) -> None:
    write(tmp_path / "d", [conversation(0)])
    file = next((tmp_path / "d/data").iterdir())
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(ChangedError, match="copied incompletely"):
        PreparedDataset.open(tmp_path / "d")
    file.write_bytes(content.replace(b"where?", b"whence"))
    with pytest.raises(ChangedError, match="sha256"):
        PreparedDataset.open(tmp_path / "d").verify()
    file.unlink()
    with pytest.raises(ChangedError, match="is missing"):
        PreparedDataset.open(tmp_path / "d")


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path / "d"):
        with pytest.raises(RefusedError, match="another process"), DatasetWriter(tmp_path / "d"):
            pass
        with DatasetWriter(tmp_path / "e"):
            pass
    assert list(tmp_path.iterdir()) == []
