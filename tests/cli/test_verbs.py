"""Every verb through the real command: exit status 0, one JSON object, the promised keys.

Outside scripts rely on these keys; more may be there.
"""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub.constants
import pytest

from fakehub import COMMIT, FakeHub, Repository

TRAIN = {
    "run", "checkpoint", "steps", "samples", "seconds", "samples_per_second", "loss", "before",
    "after", "report",
}  # fmt: skip
OF_FORMULAS = {"exact_match", "edit_similarity", "cer", "bleu", "render_match"}


def test_prepare(command, formula_table, tmp_path):
    done = command(
        "prepare", formula_table, "--out", tmp_path / "data", "--validation", "0.25", "--json"
    )
    assert done.status == 0
    result = done.json
    assert result.keys() >= {"path", "rows", "splits", "fingerprint", "quarantine"}
    assert result["path"] == str(tmp_path / "data")
    assert result["rows"] == {"in": 32, "kept": 32, "quarantined": 0}
    assert result["splits"] == {"train": 24, "validation": 8}
    assert result["quarantine"] == {}
    assert "preparing" in done.err
    again = command(
        "prepare", formula_table, "--out", tmp_path / "data", "--validation", "0.25", "--json"
    )
    assert (again.status, again.json) == (0, result)
    people = command("prepare", formula_table, "--out", tmp_path / "data", "--validation", "0.25")
    assert "32 of 32 rows kept (24 train, 8 validation); it was there already" in people.out


def test_check(command, tiny_data, tiny_base):
    alone = command("check", tiny_data, "--json")
    assert alone.status == 0
    facts = {"ok": True, "rows": 32, "findings": [], "tokens": {}}
    assert alone.json.items() >= facts.items()
    done = command("check", tiny_data, "--model", tiny_base, "--json")
    assert done.status == 0
    assert done.json["tokens"].keys() >= {"p50", "p95", "max", "total"}
    longest = done.json["tokens"]["max"]
    refused = command(
        "check", tiny_data, "--model", tiny_base, "--max-length", longest - 1, "--json"
    )
    assert refused.status == 4
    assert refused.json["ok"] is False
    finding = refused.json["findings"][0]
    assert finding.keys() >= {"code", "id", "source", "message"}
    assert finding["code"] == "too_long"


def test_check_notes_are_status_3(command, tmp_path):
    from PIL import Image

    Image.new("RGBA", (40, 30), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    (tmp_path / "t.csv").write_text("image,text\nclear.png,nothing\n", encoding="utf-8")
    assert command("prepare", tmp_path / "t.csv", "--out", tmp_path / "data").status == 0
    done = command("check", tmp_path / "data", "--json")
    assert (done.status, done.json["ok"]) == (3, True)
    assert [finding["code"] for finding in done.json["findings"]] == ["transparent"]


def test_train_eval_predict_merge_report(
    command, train_arguments, tiny_data, formula_table, tmp_path
):
    """A model's life; each verb takes what the one before made."""
    run = tmp_path / "run"
    done = command(*train_arguments, "--run", run, "--json")
    assert done.status == 0, done.err
    result = done.json
    assert result.keys() >= TRAIN
    assert (result["run"], result["steps"], result["samples"]) == (str(run), 2, 8)
    assert result["before"].keys() == result["after"].keys() == OF_FORMULAS
    assert Path(result["checkpoint"]) == run / "checkpoints/step-000002"
    assert Path(result["report"]).is_file()
    assert "step 1/2" in done.err
    assert "step 1/2" not in done.out

    finished = command(*train_arguments, "--run", run, "--resume", "--json")
    assert (finished.status, finished.json) == (0, result)
    assert "is finished; nothing to do" in finished.err

    out = tmp_path / "evaluation"
    options = ("--limit", 3, "--max-new-tokens", 4, "--metrics", "cer, exact_match", "--out", out)
    evaluated = command("eval", run, "--data", tiny_data, *options, "--json")
    assert evaluated.status == 0, evaluated.err
    assert evaluated.json.keys() >= {"metrics", "samples", "predictions", "report"}
    assert evaluated.json["samples"] == 3
    assert evaluated.json["metrics"].keys() == {"cer", "exact_match"}
    for value in evaluated.json["metrics"].values():
        assert value.keys() >= {"value", "low", "high"}
        assert value["low"] <= value["value"] <= value["high"]
    assert len((out / "predictions.jsonl").read_text(encoding="utf-8").splitlines()) == 3

    picture = formula_table.parent / "images/000000.png"
    answer = command("predict", run, "--image", picture, "--max-new-tokens", 4, "--json")
    assert answer.status == 0, answer.err
    assert answer.json.keys() >= {"text", "boxes", "tokens", "seconds"}
    assert answer.json["tokens"].keys() >= {"prompt", "completion"}
    assert 1 <= answer.json["tokens"]["completion"] <= 4

    merged = command("merge", run, "--out", tmp_path / "model", "--json")
    assert merged.status == 0, merged.err
    assert merged.json.keys() >= {"path", "changed", "max_logit_difference", "greedy_equal"}
    assert merged.json["changed"].keys() == {"vision", "projector", "language"}
    same = command(
        "predict", tmp_path / "model", "--image", picture, "--max-new-tokens", 4, "--json"
    )
    assert same.json["text"] == answer.json["text"]
    assert same.json["tokens"] == answer.json["tokens"]

    reported = command("report", run, "--json")
    assert (reported.status, reported.json["report"]) == (0, str(run / "report.html"))


def test_for_people_there_is_no_json(command, lora_run, tiny_data, tmp_path):
    done = command(
        "eval", lora_run, "--data", tiny_data, "--limit", 2, "--max-new-tokens", 2,
        "--metrics", "cer", "--out", tmp_path / "e",
    )  # fmt: skip
    assert done.status == 0
    assert done.out.startswith("cer: ")
    assert "report: " in done.out


def test_stdout_is_whole_json_even_for_errors(command, tmp_path):
    done = command("predict", tmp_path, "--prompt", "x", "--json")
    assert done.json.keys() == {"error"}
    assert done.json["error"].keys() == {"code", "message"}
    assert done.json["error"]["message"] == done.message


def test_recipes(command, tmp_path):
    listed = command("recipes", "list", "--json")
    assert listed.status == 0
    assert listed.json["recipes"].keys() >= {"latex-ocr", "coco-caption", "quickstart"}
    shown = command("recipes", "show", "latex-ocr", "--json").json
    assert shown["training"]["batch_size"] == 16
    copied = command("recipes", "copy", "latex-ocr", tmp_path / "mine.yaml", "--json")
    assert copied.json == {"path": str(tmp_path / "mine.yaml")}
    assert "# Formula images" in (tmp_path / "mine.yaml").read_text(encoding="utf-8")
    again = command("recipes", "copy", "latex-ocr", tmp_path / "mine.yaml")
    assert (again.status, again.message) == (4, f"{tmp_path}/mine.yaml exists; choose another name")


def test_download(command, tmp_path, monkeypatch):
    files = {"config.json": b"{}", "model.safetensors": bytes(99), "tokenizer.json": b"{}"}
    fake = FakeHub().start()
    fake.repositories["models/owner/tiny"] = Repository(files)
    constants = huggingface_hub.constants
    template = fake.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", fake.endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    try:
        done = command("download", "owner/tiny", "--out", tmp_path / "model", "--json")
    finally:
        fake.stop()
    assert done.status == 0, done.err
    assert done.json.keys() >= {"path", "revision", "bytes", "sha256"}
    assert (done.json["revision"], done.json["path"]) == (COMMIT, str(tmp_path / "model"))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_quickstart(command, tmp_path, monkeypatch, tiny_base):
    monkeypatch.setattr("vlmtune.models.builtin.FOLDER", tiny_base)
    done = command("quickstart", "--task", "shapes", "--out", tmp_path / "q", "--json")
    assert done.status == 0, done.err
    assert done.json.keys() >= TRAIN | {"task", "recipe", "merged", "predict"}
    assert (tmp_path / "q/model/config.json").is_file()


def test_json_holds_no_nan(command, lora_run):
    """A figure that is not a number would be no JSON for a strict reader."""
    result = json.loads((lora_run / "result.json").read_text(encoding="utf-8"))
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert command("report", lora_run.parent, "--json").status == 2
