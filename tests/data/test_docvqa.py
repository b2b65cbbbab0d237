"""Document questions as they stand on the hub: nested questions, lists of answers and more."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest

from docvqa_table import page, parquet, rows
from fakehub import COMMIT, FakeHub, Repository
from vlmtune.data.conversation import Image, Text
from vlmtune.data.dataset import PreparedDataset
from vlmtune.data.prepare import PrepareOptions, prepare
from vlmtune.errors import FormatError

COLUMNS = {"image": "image", "question": "query.en", "answers": "answers"}
ROWS = 12


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "train-00000-of-00001.parquet"
    path.write_bytes(parquet(ROWS))
    return path


def check(dataset: PreparedDataset, language: str = "en", count: int = ROWS) -> None:
    found = {row.id: row for name in dataset.info.splits for row in dataset.split(name)}
    assert list(dict.fromkeys(found)) == [row["id"] for row in rows(count)]
    for number, given in enumerate(rows(count)):
        row = found[given["id"]]
        asked, answered = row.messages
        assert asked.content == (Image(0), Text(f"{language}: what is {number}?"))
        assert row.references == tuple(given["answers"])
        assert answered.content in [(Text(text),) for text in given["answers"]]
        assert [image.data for image in row.images] == [page(number)]
    said = {row.answer for row in found.values()}
    assert "wrong" not in said  # the column ``answer`` is something else, and is not read


def test_a_local_table(table, tmp_path):
    options = PrepareOptions(columns=COLUMNS, validation=3)
    result = prepare(table, tmp_path / "out", options)
    assert result.rows.to_json() == {"in": ROWS, "kept": ROWS, "quarantined": 0}
    check(PreparedDataset.open(tmp_path / "out"))


def test_the_columns_are_found_by_themselves(table, tmp_path):
    """``answer`` and the others are structs and lists: no texts to train on."""
    prepare(table, tmp_path / "out")
    check(PreparedDataset.open(tmp_path / "out"))


def test_another_language(table, tmp_path):
    prepare(table, tmp_path / "out", PrepareOptions(columns={**COLUMNS, "question": "query.fr"}))
    check(PreparedDataset.open(tmp_path / "out"), "fr")


def test_a_language_that_is_not_there_is_said(table, tmp_path):
    options = PrepareOptions(columns={**COLUMNS, "question": "query.eng"})
    with pytest.raises(FormatError, match=r"did you mean 'query\.en'"):
        prepare(table, tmp_path / "out", options)


def test_which_answer_stands_in_a_row_is_drawn_by_seed(table, tmp_path):
    answers = []
    for seed in (0, 0, 1):
        out = tmp_path / f"{len(answers)}"
        prepare(table, out, PrepareOptions(columns=COLUMNS, seed=seed))
        answers.append([row.answer for row in PreparedDataset.open(out).split("train")])
    assert answers[0] == answers[1] != answers[2]
    firsts = [given["answers"][0] for given in rows(ROWS)]
    assert answers[0] != firsts


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    import datasets

    fake = FakeHub().start()
    fake.repositories["datasets/nielsr/docvqa_1200_examples"] = Repository(
        {
            "README.md": b"# docvqa\n",
            "data/train-00000-of-00001.parquet": parquet(ROWS),
            "data/test-00000-of-00001.parquet": parquet(2),
        }
    )
    for name, value in {
        "ENDPOINT": fake.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": fake.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_OFFLINE": False,
    }.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", fake.endpoint)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setattr(
        datasets.config, "DOWNLOADED_DATASETS_PATH", str(tmp_path / "datasets" / "downloads")
    )
    yield fake
    fake.stop()


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("limit", [None, 5])
def test_from_the_hub(tmp_path, limit):
    options = PrepareOptions(columns=COLUMNS, split="train", limit=limit)
    prepare("nielsr/docvqa_1200_examples", tmp_path / "out", options)
    dataset = PreparedDataset.open(tmp_path / "out")
    assert dataset.info.source == f"nielsr/docvqa_1200_examples@{COMMIT}"
    check(dataset, count=limit or ROWS)
