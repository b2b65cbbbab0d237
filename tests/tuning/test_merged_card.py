"""The card of merged weights: the run's figures, the proof, the licence, and no place."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from tiny_world import copied
from vlmtune.evaluation.intervals import score
from vlmtune.evaluation.run import Evaluation, Prediction
from vlmtune.runs.best import chosen_checkpoint
from vlmtune.runs.folder import RunFolder
from vlmtune.runs.resolve import resolve
from vlmtune.verbs.merged_card import placeless, write_merged_card

PROOF = {"changed": {"language": 14}, "max_logit_difference": 1e-6, "stored_as": "torch.float32"}


def evaluation(*texts: str) -> Evaluation:
    rows = [f"{number}" for number in range(len(texts))]
    metrics = score(["exact_match"], texts, [["x"]] * len(texts))
    predictions = tuple(
        Prediction(row, "Read.", text, ("x",), True, 9, 3, {"exact_match": float(text == "x")})
        for row, text in zip(rows, texts, strict=True)
    )
    return Evaluation(metrics, predictions, 12)


@pytest.fixture
def run(lora_run: Path, tmp_path: Path) -> Path:
    folder = copied(lora_run, tmp_path / "latex")
    evaluation("y", "y", "y", "x").write(folder / "evaluation" / "before")
    evaluation("x", "x", "y", "x").write(folder / "evaluation" / "after")
    return folder


def card(model: Path, out: Path) -> tuple[dict, str]:
    out.mkdir()
    write_merged_card(out, resolve(model), "mine", PROOF)
    head, body = (out / "README.md").read_text(encoding="utf-8").split("\n---\n", 1)
    return yaml.safe_load(head.removeprefix("---\n")), body


def test_a_run_s_figures_are_on_the_card(run, tmp_path):
    matter, body = card(run, tmp_path / "out")
    assert "| Exact match | 0.250 \\[" in body
    assert "| 0.750 \\[" in body
    assert "before it was merged into these weights" in body
    assert "14" in body.split("## Merge")[1].split("##")[0]
    assert matter["library_name"] == "transformers"
    assert "vlmtune merge" not in body
    assert "learning_rate: 0.01" in body


def test_a_checkpoint_alone_has_no_figures(run, tmp_path):
    """Whatever it was measured at, the run's figures are of the checkpoint that stands for it."""
    first = sorted((run / "checkpoints").glob("step-*"))[0]
    assert first != chosen_checkpoint(RunFolder(run))
    _, body = card(first, tmp_path / "out")
    assert "## Results" not in body
    assert body.startswith("\n# mine\n")
    assert "## Merge" in body


def test_no_place_on_this_machine_is_named(run, tmp_path):
    _, body = card(run, tmp_path / "out")
    assert str(tmp_path) not in body
    assert str(tmp_path.parent) not in body
    assert "path: data" in body
    # Negative control: what the run itself notes does name them.
    assert str(tmp_path.parent.parent) in (run / "recipe.yaml").read_text(encoding="utf-8")
    nested = {"a": ["/home/me/x.csv", {"b": "/srv/y"}], "c": "owner/name", "d": 3}
    assert placeless(nested) == {"a": ["x.csv", {"b": "y"}], "c": "owner/name", "d": 3}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\n---\n# x", 3),
        ("---\nlicense: apache-2.0\ntags: [a]\n---\n# x", 1),
        ("---\nlicense: [a, b]\n---\n", 0),
        ("---\n: : :\n---\n", 0),
        ("no front matter", 0),
    ],
)
def test_the_base_s_licence_goes_along(run, tmp_path, text, expected):
    resolved = resolve(run)
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text(text, encoding="utf-8")
    moved = replace(resolved, base=replace(resolved.base, folder=base))
    write_merged_card(tmp_path, moved, "mine", PROOF)
    matter = yaml.safe_load(
        (tmp_path / "README.md").read_text(encoding="utf-8").split("\n---\n")[0]
    )
    assert len([key for key in matter if key.startswith("license")]) == expected
