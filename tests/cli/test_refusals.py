"""What a user can do wrong: the exit status, and one paragraph that says what to do."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tiny_world import copied, lines
from vlmtune.cli.progress import Lines
from vlmtune.runs.folder import RunFolder
from vlmtune.testing import TinySize, tiny

# Exit status 2: wrong usage, nothing was started


def test_every_mistake_of_a_recipe_at_once(command):
    done = command(
        "train", "latex-ocr", "training.bach_size=4", "tuning.rnak=8", "training.precision=fp8",
        "image.max_pixels=-1", "learning_rate=1", "evaluation.metrics=[cer,exact_mach]", "--json",
    )  # fmt: skip
    assert done.status == 2
    message = done.message
    assert "6 mistake(s)" in message
    assert "training.bach_size: no such option, did you mean training.batch_size?" in message
    assert "tuning.rnak: no such option, did you mean tuning.rank?" in message
    assert "training.precision: " in message
    assert "'fp32', 'bf16' or 'fp16'" in message
    assert "image.max_pixels: " in message
    assert "learning_rate: no such option, did you mean training.learning_rate?" in message
    assert "evaluation.metrics: " in message
    assert "exact_mach" in message
    assert done.json == {"error": {"code": "recipe", "message": message}}


WRONG = {
    "recipe": (["train", "latex-orc"], "did you mean 'latex-ocr'"),
    "recipe file": (["train", "none.yaml"], "none.yaml cannot be read"),
    "override": (["train", "latex-ocr", "batch"], "'batch' is no override; expected a.b=c"),
    "no data": (["train", "latex-ocr"], "data.path: missing; prepare a data set"),
    "data": (["train", "latex-ocr", "data.path=none", "model.base={base}"], "none"),
    "base": (["train", "latex-ocr", "model.base=/none", "data.path={data}"], "model.base: '/none'"),
    "metric": (["eval", "{base}", "--data", "{data}", "--metrics", "cer,blue"], "'blue'"),
    "split": (["eval", "{base}", "--data", "{data}", "--split", "test"], "test"),
    "model": (["eval", "none", "--data", "{data}"], "MODEL: 'none' is neither"),
    "dtype": (["predict", "{base}", "--prompt", "x", "--dtype", "fp8"], "found 'fp8'"),
    "nothing asked": (["predict", "{base}"], "at least one --image or a --prompt"),
    "merge": (["merge", "{base}", "--out", "o"], "there is nothing to merge"),
    "report": (["report", "{data}"], "holds no run"),
    "hub": (["download", "a/b", "--out", "o", "--hub", "github"], "--hub: found 'github'"),
    "source": (["prepare", "none.csv", "--out", "o"], "none.csv"),
    "format": (["prepare", "{table}", "--out", "o", "--format", "xml"], "xml"),
    "columns": (["prepare", "{table}", "--out", "o", "--columns", "image"], "expected image=NAME"),
    "column": (
        ["prepare", "{table}", "--out", "o", "--columns", "image=picture,text=text"],
        "'picture'",
    ),
    "column's use": (["prepare", "{table}", "--out", "o", "--columns", "imag=image"], "imag"),
    "validation": (["prepare", "{table}", "--out", "o", "--validation", "few"], "found 'few'"),
    "negative": (["prepare", "{table}", "--out", "o", "--validation=-1"], "--validation"),
    "one and a half": (["prepare", "{table}", "--out", "o", "--validation", "1.5"], "1.5"),
    "split by": (["prepare", "{table}", "--out", "o", "--split-by", "first"], "--split-by"),
    "no rows left": (["check", "none"], "none"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_usage(case, command, tiny_base, tiny_data, formula_table, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, said = WRONG[case]
    known = {"base": tiny_base, "data": tiny_data, "table": formula_table}
    done = command(*(argument.format(**known) for argument in arguments), "--json")
    assert done.status == 2, done.err
    assert said in done.message
    assert done.json["error"]["message"] == done.message
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["predict", "{base}", "--prompt", "x", "--max-pixels", "0"],
        ["eval", "{base}", "--data", "{data}", "--limit", "-1"],
        ["check", "{data}", "--max-pixels", "-5"],
        ["fly"],
        ["merge", "{base}"],
    ],
)
def test_what_the_parser_itself_refuses(arguments, command, tiny_base, tiny_data):
    done = command(*(argument.format(base=tiny_base, data=tiny_data) for argument in arguments))
    assert done.status == 2
    assert "Error" in done.err


def test_a_device_that_is_not_there(command, tiny_base):
    done = command("predict", tiny_base, "--prompt", "x", "--device", "moon")
    assert (done.status, done.message[:7]) == (2, "device:")


# Exit status 3 and 4: bad rows


@pytest.fixture
def bad_table(formula_table: Path, tmp_path: Path) -> Path:
    """Ten good rows and four bad ones."""
    folder = tmp_path / "source"
    images = copied(formula_table.parent / "images", folder / "images")
    whole = (images / "000010.png").read_bytes()
    (images / "half.png").write_bytes(whole[: len(whole) // 2])
    rows = [f"row-{number},images/{number:06d}.png,x ^ {number}" for number in range(10)]
    rows += [
        "a,images/none.png,x",
        "b,images/half.png,x",
        "c,images/000011.png,",
        "row-3,images/000012.png,x",
    ]
    (folder / "table.csv").write_text("\n".join(["id,image,text", *rows]) + "\n", encoding="utf-8")
    return folder / "table.csv"


BAD = {"image_missing": 1, "image_truncated": 1, "empty_answer": 1, "duplicate_id": 1}


def test_bad_rows_are_quarantined(command, bad_table, tmp_path):
    out = tmp_path / "data"
    done = command("prepare", bad_table, "--out", out, "--max-bad", "0.9", "--json")
    assert done.status == 3
    assert done.json["rows"] == {"in": 14, "kept": 10, "quarantined": 4}
    assert done.json["quarantine"] == BAD
    assert done.json["splits"] == {"train": 10, "validation": 0}
    records = lines(out / "quarantine.jsonl")
    assert [record["code"] for record in records] == list(BAD)
    assert [record["id"] for record in records] == ["a", "b", "c", "row-3"]
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert summary["in"] == summary["kept"] + summary["quarantined"] == 14
    assert summary["quarantine"] == BAD
    people = command("prepare", bad_table, "--out", tmp_path / "again", "--max-bad", "0.9")
    assert people.status == 3
    assert "4 quarantined: duplicate_id 1, empty_answer 1" in people.out


def test_too_many_bad_rows_leave_only_the_quarantine(command, bad_table, tmp_path):
    out = tmp_path / "data"
    done = command("prepare", bad_table, "--out", out, "--json")
    assert done.status == 4
    assert sorted(path.name for path in out.iterdir()) == ["quarantine.jsonl", "summary.json"]
    assert done.json["rows"] == {"in": 14, "kept": 10, "quarantined": 4}
    assert done.json["error"]["code"] == "too_many_bad_rows"
    assert "4 of 14 rows are bad" in done.message
    assert "--max-bad" in done.message
    assert len(lines(out / "quarantine.jsonl")) == 4
    # Four are as many as were allowed: not too many.
    assert command("prepare", bad_table, "--out", out, "--max-bad", "4").status == 3


# Exit status 4: the result could not be trusted


def test_a_folder_that_holds_a_run(command, train_arguments, lora_run):
    done = command(*train_arguments, "--run", lora_run, "--json")
    assert (done.status, done.json["error"]["code"]) == (4, "run_exists")
    assert "already holds a run; continue it with --resume" in done.message


def test_a_folder_that_holds_something_else(command, train_arguments, tmp_path):
    (tmp_path / "thesis.tex").touch()
    done = command(*train_arguments, "--run", tmp_path)
    assert (done.status, "thesis.tex" in done.message) == (4, True)


def test_a_run_that_is_at_work(command, train_arguments, tmp_path):
    with RunFolder(tmp_path / "run").lock():
        done = command(*train_arguments, "--run", tmp_path / "run", "--resume", "--json")
    assert done.status == 4
    assert f"is in use by process {os.getpid()} on {socket.gethostname()}" in done.message


@pytest.fixture
def stopped(command, train_arguments, tmp_path, monkeypatch) -> Path:
    """A run that SIGTERM stopped after its first step."""
    with monkeypatch.context() as patched:
        patched.setattr(Lines, "step", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        done = command(*train_arguments, "--run", tmp_path / "run", "--json")
    assert done.status == 143
    assert done.json["error"]["code"] == "stopped"
    assert "stopped by SIGTERM after step 1 of 2; the checkpoint is written" in done.message
    return tmp_path / "run"


def test_changed_options_and_data_at_resume(command, train_arguments, stopped, tiny_data, tmp_path):
    again = ("--run", stopped, "--resume", "--json")
    recipe = command(*train_arguments, "training.learning_rate=9e-4", *again)
    assert (recipe.status, recipe.json["error"]["code"]) == (4, "changed")
    assert "training.learning_rate: 0.0001 is now 0.0009" in recipe.message
    image = command(*train_arguments, "image.max_pixels=3136", *again)
    assert image.status == 4
    assert "--allow-change" in image.message

    write_rows(tmp_path / "t.csv", 12)
    other = tmp_path / "other"
    assert command("prepare", tmp_path / "t.csv", "--out", other, "--validation", 4).status == 0
    data = command(*train_arguments, f"data.path={other}", *again)
    assert data.status == 4
    assert "data: " in data.message
    assert "is now" in data.message

    moved = copied(tiny_data, tmp_path / "moved")  # the same data in another place is no change
    assert command(*train_arguments, f"data.path={moved}", *again).status == 0


def write_rows(table: Path, count: int) -> None:
    from PIL import Image

    with table.open("w", encoding="utf-8") as stream:
        stream.write("image,text\n")
        for number in range(count):
            Image.new("RGB", (60, 40), (number, 0, 0)).save(table.parent / f"{number}.png")
            stream.write(f"{number}.png,{number}\n")


def test_allow_change_goes_on_and_records_it(command, train_arguments, stopped):
    changed = ("training.learning_rate=9e-4", "--run", stopped, "--resume", "--allow-change")
    done = command(*train_arguments, *changed, "--json")
    assert (done.status, done.json["steps"]) == (0, 2)
    (record,) = [r for r in lines(stopped / "ledger.jsonl") if r["event"] == "changed"]
    assert record["changes"] == ["training.learning_rate: 0.0001 is now 0.0009"]


def test_a_base_with_other_weights(command, lora_run, tmp_path):
    size = TinySize(hidden=32, vision_width=16)
    other = tiny("qwen2_vl", tmp_path / "other", seed=9, size=size)
    done = command("predict", lora_run, "--base", other, "--prompt", "x", "--json")
    assert (done.status, done.json["error"]["code"]) == (4, "contract_mismatch")
    assert "hold other weights" in done.message


# Exit status 1


def test_a_picture_that_cannot_be_opened(command, lora_run, tmp_path):
    (tmp_path / "x.png").write_bytes(b"no picture")
    done = command("predict", lora_run, "--image", tmp_path / "x.png", "--json")
    assert done.status == 1
    assert done.json["error"]["code"].startswith("image_")
    missing = command("predict", lora_run, "--image", tmp_path / "none.png", "--json")
    assert (missing.status, missing.json["error"]["code"]) == (1, "image_missing")


def test_a_damaged_run(command, lora_run, tmp_path):
    run = copied(lora_run, tmp_path / "run")
    for manifest in run.glob("checkpoints/*/manifest.json"):
        manifest.unlink()
    done = command("predict", run, "--prompt", "x", "--json")
    assert (done.status, done.json["error"]["code"]) == (1, "checkpoint")


def test_a_full_disk_is_one_sentence(command, train_arguments, tmp_path, monkeypatch):
    from vlmtune.training import checkpoint

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "seal", full)
    done = command(*train_arguments, "evaluation.before=false", "--run", tmp_path / "run", "--json")
    assert (done.status, done.json["error"]["code"]) == (1, "checkpoint")
    assert "No space left on device" in done.message
    assert "--resume" in done.message


def test_what_is_our_own_defect_keeps_its_traceback(command, tiny_data, monkeypatch):
    """A mistake of ours must not look like one of the user's."""
    from vlmtune.verbs import check

    monkeypatch.setattr(check, "check_dataset", lambda *_, **__: [][1])
    with pytest.raises(IndexError):
        command("check", tiny_data)


def test_debug_shows_the_traceback(command, tmp_path):
    done = command("predict", tmp_path, "--prompt", "x", "--debug", debug=True)
    assert done.status == 2
    assert "Traceback" in done.err
    assert "UsageError" in done.err


@pytest.mark.parametrize("verb", ["download", pytest.param("train", marks=pytest.mark.slow)])
def test_without_a_network(verb, tiny_data, tmp_path):
    """A subprocess: the hub's library reads its end point when it is imported."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
    arguments = {
        "download": ["download", "owner/model", "--out", str(tmp_path / "model")],
        "train": ["train", "latex-ocr", f"data.path={tiny_data}", "--run", str(tmp_path / "run")],
    }[verb]
    done = subprocess.run(
        [Path(sys.executable).with_name("vlmtune"), *arguments, "--json"],
        env={**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    fault = json.loads(done.stdout.splitlines()[-1])["error"]
    assert fault["code"] == "hub"
    assert "could not be reached" in fault["message"]
    assert "local folder (model.base=DIR)" in fault["message"]
    assert fault["message"].count("\n") == 0
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "model").exists()
