"""A whole run with trackers: they are shown what ran, and the training does not feel them."""

from __future__ import annotations

import io
import json
import math
import shutil

import pytest
from PIL import Image

from tiny_world import copied, fingerprint, lines
from vlmtune.data.dataset import PreparedDataset
from vlmtune.data.media import ImagePolicy, open_image
from vlmtune.evaluation.run import Evaluation
from vlmtune.files import write_lines
from vlmtune.training.tracking.service import SERVICES, Service
from vlmtune.verbs import train as verb
from vlmtune.verbs.train import train

events = pytest.importorskip(
    "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed"
)
EVALUATION = {
    "probe": 4,
    "generate_every": 3,
    "limit": 4,
    "max_new_tokens": 4,
    "metrics": ["exact_match", "edit_similarity"],
}
TRACKING = {"to": ["tensorboard", "swanlab", "wandb", "trackio"], "project": "formulas"}
METRICS = [f"{name}{end}" for name in EVALUATION["metrics"] for end in ("", "_low", "_high")]


@pytest.fixture(scope="module")
def recipe(make_recipe):
    return make_recipe(
        evaluation=EVALUATION,
        tracking=TRACKING,
        training__log_steps=2,
        tuning__learning_rates={"language": 1e-2},  # the common one, said again
    )


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory):
    """A run shown in TensorBoard, and to trackers that die, fail, and are not there."""
    folder = tmp_path_factory.mktemp("tracked") / "run"
    with pytest.MonkeyPatch.context() as patch:
        absent = Service(package="not_installed_anywhere", tracker="", modes=("offline",))
        patch.setitem(SERVICES, "trackio", absent)
        for name, kind in (("swanlab", "Dies_log"), ("wandb", "Fails_open")):
            fake = Service(package="json", tracker=f"fake_trackers:{kind}", modes=("offline",))
            patch.setitem(SERVICES, name, fake)
        train(recipe, run_dir=folder)
    return folder


@pytest.fixture(scope="module")
def shown(run):
    return events.EventAccumulator(
        str(run / "tracking" / "tensorboard"), size_guidance={"images": 0, "tensors": 0}
    ).Reload()


def text(shown, tag, step):
    (event,) = (event for event in shown.Tensors(f"{tag}/text") if event.step == step)
    return event.tensor_proto.string_val[0].decode("utf-8")


def scalars(shown, tag):
    return [(event.step, event.value) for event in shown.Scalars(tag)]


def test_training_is_the_same_to_the_bit(run, lora_run):
    assert fingerprint(run) == fingerprint(lora_run)
    assert [line["step"] for line in lines(run / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_a_changed_bit_is_seen(lora_run, tmp_path):
    """The comparison above can fail."""
    changed = copied(lora_run, tmp_path / "run")
    records = lines(changed / "metrics.jsonl")
    records[2]["loss"] = math.nextafter(records[2]["loss"], 1)
    write_lines(changed / "metrics.jsonl", records)
    assert fingerprint(changed) != fingerprint(lora_run)


def test_figures_are_those_of_the_run(run, shown):
    steps = {line["step"]: line for line in lines(run / "metrics.jsonl")}
    logged = [1, 2, 4, 6]  # the first, every second, the last
    for tag, name in (
        ("train/loss", "loss"),
        ("train/gradient_norm", "gradient_norm"),
        ("train/learning_rate", "learning_rate"),
        ("train/learning_rate_language", "learning_rate"),
    ):
        expected = [(step, pytest.approx(steps[step][name], rel=1e-6)) for step in logged]
        assert scalars(shown, tag) == expected
    rates = [steps[step]["tokens"] / steps[step]["seconds"] for step in logged]
    assert [v for _, v in scalars(shown, "train/tokens_per_second")] == pytest.approx(rates, 1e-6)
    rates = [steps[step]["samples"] / steps[step]["seconds"] for step in logged]
    assert [v for _, v in scalars(shown, "train/samples_per_second")] == pytest.approx(rates, 1e-6)
    memory = [steps[step]["peak_memory_bytes"] / 2**30 for step in logged]
    assert [v for _, v in scalars(shown, "train/peak_memory_gib")] == pytest.approx(memory, 1e-6)
    probed = [
        (s, pytest.approx(line["probe_loss"], rel=1e-6))
        for s, line in steps.items()
        if "probe_loss" in line
    ]
    assert scalars(shown, "probe/loss") == probed != []


def test_metrics_before_and_after_with_their_intervals(run, shown):
    evaluations = [Evaluation.read(run / "evaluation" / when) for when in ("before", "after")]
    for metric in EVALUATION["metrics"]:
        estimates = [evaluation.metrics[metric] for evaluation in evaluations]
        for end, name in (("", "value"), ("_low", "low"), ("_high", "high")):
            values = [pytest.approx(getattr(estimate, name), rel=1e-6) for estimate in estimates]
            expected = list(zip((0, 6), values, strict=True))
            assert scalars(shown, f"evaluation/{metric}{end}") == expected
            assert [step for step, _ in scalars(shown, f"probe/{metric}{end}")] == [3, 6]


def test_predictions_with_picture_truth_and_answer(run, shown, recipe):
    rows = PreparedDataset.open(recipe.data.path).split("validation")[:4]
    for number, row in enumerate(rows):
        for step, when in ((0, "before"), (3, "step-000003"), (6, "after")):
            prediction = Evaluation.read(run / "evaluation" / when).predictions[number]
            assert prediction.id == row.id
            told = text(shown, f"Prediction/{number:02d}", step)
            for part in (row.id, row.answer, prediction.question, prediction.prediction):
                for line in part.splitlines():
                    assert f"    {line}" in told
        pictures = shown.Images(f"Prediction/{number:02d}")
        assert [picture.step for picture in pictures] == [0, 3, 6]
        expected = open_image(row.images[0].data, ImagePolicy()).convert("RGB")
        for picture in pictures:
            image = Image.open(io.BytesIO(picture.encoded_image_string))
            assert (image.size, image.tobytes()) == (expected.size, expected.tobytes())
    assert len(shown.Tags()["images"]) == len(rows)


def test_hyperparameters_are_those_that_ran(run, shown):
    told = text(shown, "hyperparameters", 0)
    values = json.loads("".join(line.removeprefix("    ") for line in told.splitlines()))
    assert values["training"]["learning_rate"] == 1e-2
    assert values["tuning"]["dropout"] == 0.1
    assert values["tuning"]["learning_rates"] == {
        "vision": None,
        "projector": None,
        "language": 1e-2,
    }
    assert values["image"]["max_pixels"] == 6272
    assert (values["rows"], values["steps"]) == (24, 6)
    for name, file in (
        ("contract", "contract"),
        ("dataset", "data"),
        ("environment", "environment"),
    ):
        assert values[name] == json.loads((run / f"{file}.json").read_text(encoding="utf-8"))
    assert len(values["dataset"]["fingerprint"]) == 64


def test_a_resumed_run_goes_on_in_the_same_place(run, recipe, tmp_path):
    folder = copied(run, tmp_path / "run")
    shutil.rmtree(folder / "checkpoints" / "step-000006")
    shutil.rmtree(folder / "evaluation" / "after")
    (folder / "result.json").unlink()
    only = recipe.model_copy(
        update={"tracking": recipe.tracking.model_copy(update={"to": ("tensorboard",)})}
    )
    train(only, run_dir=folder, resume=True)
    files = list((folder / "tracking" / "tensorboard").iterdir())
    assert len(files) == 2
    shown = events.EventAccumulator(str(folder / "tracking" / "tensorboard")).Reload()
    assert [step for step, _ in scalars(shown, "train/loss")] == [1, 2, 4, 6]
    assert [picture.step for picture in shown.Images("Prediction/00")] == [0, 3, 6]
    assert text(shown, "hyperparameters", 0)


@pytest.mark.parametrize("kept", [6, 4])
def test_what_was_told_before_the_checkpoint_stands(run, recipe, tmp_path, kept):
    """Killed while it was measured after training, it says nothing of the training again."""
    folder = copied(run, tmp_path / "run")
    shutil.rmtree(folder / "evaluation" / "after")
    (folder / "result.json").unlink()
    if kept == 4:
        shutil.rmtree(folder / "checkpoints" / "step-000006")
    only = recipe.model_copy(
        update={"tracking": recipe.tracking.model_copy(update={"to": ("tensorboard",)})}
    )
    train(only, run_dir=folder, resume=True)
    shown = events.EventAccumulator(str(folder / "tracking" / "tensorboard")).Reload()
    steps = {line["step"]: line["loss"] for line in lines(folder / "metrics.jsonl")}
    expected = [(step, pytest.approx(steps[step], rel=1e-6)) for step in (1, 2, 4, 6)]
    assert scalars(shown, "train/loss") == expected
    assert scalars(shown, "evaluation/exact_match")[-1][0] == 6


def test_a_missing_tracker_is_said_before_anything_long(make_recipe, tmp_path, monkeypatch, caplog):
    class EnoughError(Exception):
        pass

    def load(*_, **__):
        raise EnoughError

    absent = Service(package="not_installed_anywhere", tracker="", modes=("offline",))
    monkeypatch.setitem(SERVICES, "swanlab", absent)
    monkeypatch.setattr(verb, "load_start", load)
    with pytest.raises(EnoughError):
        train(make_recipe(tracking__to=["swanlab"]), run_dir=tmp_path / "run")
    (warning,) = (r.getMessage() for r in caplog.records if "not_installed_anywhere" in r.message)
    assert "pip install" in warning
