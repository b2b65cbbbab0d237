"""Several prepared datasets as one."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from vlmtune.data.dataset import PreparedDataset
from vlmtune.data.mixture import DataSource, Mixture, open_recorded, open_sources
from vlmtune.data.prepare import PrepareOptions, prepare
from vlmtune.errors import ChangedError, RecipeError, UsageError
from vlmtune.recipe import Recipe, recipe_from
from vlmtune.runs.folder import RunFolder
from vlmtune.verbs.observer import Observer

MakeTable = Callable[..., Path]


@pytest.fixture
def two(make_table: MakeTable, tmp_path: Path) -> tuple[Path, Path]:
    """Datasets of 10 and 40 train rows, of 2 and 3 validation rows."""
    bad = {5: ["images/none.png", "x"]}
    one = prepare(make_table(13, bad), tmp_path / "one", PrepareOptions(validation=2, max_bad=1))
    other = prepare(make_table(43), tmp_path / "other", PrepareOptions(validation=3))
    return one.path, other.path


def mix(*weighted: tuple[Path, float], seed: int = 0) -> Mixture:
    sources = [DataSource(path=str(path), weight=weight) for path, weight in weighted]
    return open_sources(sources, seed)


def counts(mixture: Mixture, name: str = "train") -> Counter[str]:
    return Counter(name.split("/")[0] for name in mixture.split(name).ids)


def test_rows_by_weight(two: tuple[Path, Path]) -> None:
    one, other = two
    assert counts(mix((one, 1), (other, 1))) == {"one": 10, "other": 40}
    assert counts(mix((one, 2), (other, 0.25))) == {"one": 10, "one@2": 10, "other": 10}
    assert counts(mix((one, 1.25), (other, 0.5))) == {"one": 10, "one@2": 3, "other": 20}
    assert counts(mix((one, 0.04), (other, 1))) == {"other": 40}
    mixture = mix((one, 2), (other, 0.25))
    assert counts(mixture, "validation") == {"one": 2, "other": 3}
    with pytest.raises(UsageError, match="no train row"):
        mix((one, 0.01))
    with pytest.raises(UsageError, match="not a prepared dataset"):
        mix((one.parent / "nothing", 1))


def test_rows_are_the_sources_rows(two: tuple[Path, Path]) -> None:
    one, other = two
    mixture = mix((one, 2.5), (other, 0.3))
    rows = mixture.split("train")
    assert len(rows) == 37
    assert [row.id for row in rows] == rows.ids
    assert len(set(rows.ids)) == len(rows)
    assert rows[-1].id == rows.ids[36]
    assert [row.id for row in rows[8:12]] == rows.ids[8:12]
    with pytest.raises(IndexError):
        rows[37]
    stored = {
        f"{path.name}/{row.id}": row
        for path in two
        for row in PreparedDataset.open(path).split("train")
    }
    for row in pickle.loads(pickle.dumps(rows)):
        name, _, identity = row.id.partition("/")
        origin = stored[f"{name.split('@')[0]}/{identity}"]
        assert (row.messages, row.images) == (origin.messages, origin.images)
    drawn = [name for name in rows.ids if name.startswith("other")]
    assert len(set(drawn)) == 12
    assert drawn == sorted(drawn)  # in the source's order


def test_what_decides_the_fingerprint(two: tuple[Path, Path], tmp_path: Path) -> None:
    one, other = two
    plain = mix((one, 1), (other, 0.5))
    assert plain.fingerprint == mix((one, 1), (other, 0.5)).fingerprint
    assert plain.split("train").ids == mix((one, 1), (other, 0.5)).split("train").ids
    ids = plain.split("train").ids
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in two:
        path.rename(moved / path.name)
    one, other = moved / "one", moved / "other"
    assert mix((one, 1), (other, 0.5)).fingerprint == plain.fingerprint
    others = [
        mix((one, 1), (other, 0.6)),
        mix((other, 0.5), (one, 1)),
        mix((one, 1), (other, 0.5), seed=1),
        mix((one, 1)),
    ]
    assert len({plain.fingerprint, *(mixture.fingerprint for mixture in others)}) == 5
    assert others[2].split("train").ids != ids


def test_datasets_of_one_name(two: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    second = two[1].rename(tmp_path / "x" / "one")
    mixture = mix((two[0], 1), (second, 1), (second, 1))
    assert mixture.names == ("one", "one-2", "one-3")
    ids = mixture.split("train").ids
    assert len(set(ids)) == len(ids) == 90


def test_a_run_records_and_finds_its_data(two: tuple[Path, Path]) -> None:
    one, other = two
    mixture = mix((one, 1.5), (other, 0.5), seed=3)
    facts = json.loads(json.dumps(mixture.facts()))
    assert facts["splits"] == {"train": 35, "validation": 5}
    assert facts["quarantined"] == {"image_missing": 1}
    assert [source["rows_in_an_epoch"] for source in facts["sources"]] == [15, 20]
    again = open_recorded(facts)
    assert again is not None
    assert again.fingerprint == mixture.fingerprint
    plain = PreparedDataset.open(one)
    assert (found := open_recorded(plain.facts())) is not None
    assert found.fingerprint == plain.fingerprint
    one.rename(one.with_name("gone"))
    assert open_recorded(facts) is None


def test_a_run_on_a_mixture(tiny_base: Path, tiny_data: Path, tmp_path: Path) -> None:
    """Killed halfway and continued it is the same run; every row is accounted for."""
    from tiny_world import fingerprint, lines, tiny_recipe
    from vlmtune.training.summary import report_content
    from vlmtune.verbs.train import train

    second = tmp_path / "second"
    second.symlink_to(tiny_data)
    sources = [{"path": str(tiny_data), "weight": 0.5}, {"path": str(second), "weight": 0.25}]
    wanted = tiny_recipe(tiny_base, tiny_data, data__path=None, data__sources=sources)
    train(wanted, run_dir=tmp_path / "a")
    facts = json.loads((tmp_path / "a/data.json").read_text())
    assert facts["splits"] == {"train": 18, "validation": 16}
    content = report_content(RunFolder(tmp_path / "a"))
    ledger = content.ledger
    assert ledger["in"] == 34
    assert ledger["trained"] == 18
    assert (ledger["not_reached"], ledger["validation"]) == (0, 16)
    trained = [
        name
        for record in lines(tmp_path / "a/ledger.jsonl")
        if record["event"] == "trained"
        for name in record["ids"]
    ]
    rows = mix((tiny_data, 0.5), (second, 0.25), seed=wanted.training.seed).split("train")
    assert sorted(trained[:18]) == sorted(rows.ids)  # the first epoch: each once

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Observer, "step", lambda _self, report: report.step == 4 and stop())
        with pytest.raises(KeyboardInterrupt):
            train(wanted, run_dir=tmp_path / "b")
    train(wanted, run_dir=tmp_path / "b", resume=True)
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")
    sources[0]["weight"] = 1
    changed = tiny_recipe(tiny_base, tiny_data, data__path=None, data__sources=sources)
    with pytest.raises(ChangedError, match=r"data: .* is now"):
        train(changed, run_dir=tmp_path / "b", resume=True)


def recipe(**data: object) -> Recipe:
    return recipe_from({"name": "x", "model": {"base": "b"}, "data": data})


def test_the_recipe() -> None:
    sources = recipe(sources=[{"path": "a", "weight": 0.5}, {"path": "b"}]).data.sources
    assert [(source.path, source.weight) for source in sources] == [("a", 0.5), ("b", 1.0)]
    for bad, message in (
        ({"path": "a", "sources": [{"path": "b"}]}, "exclude each other"),
        ({"sources": [{"path": "a", "weight": 0}]}, r"data\.sources\.0\.weight: .*greater than 0"),
        ({"sources": [{"path": "a", "wieght": 1}]}, "wieght"),
        ({"sources": [{"weight": 1}]}, r"data\.sources\.0\.path: missing"),
    ):
        with pytest.raises(RecipeError, match=message):
            recipe(**bad)
