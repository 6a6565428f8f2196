"""Runs that report to MLflow, TensorBoard and Weights & Biases, read back from local stores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from bedrock_service import eventually
from command_line import Answer
from short_runs import metrics_of

from luthier.engine.metrics import Reporter
from luthier.engine.tracking import track
from luthier.engine.train import train
from luthier.errors import Interrupted, RecipeError
from luthier.recipe import Recipe
from luthier.trackers import TRACKERS, Status, TrackedRun, Tracker, TrackerEntry


class Notes(Reporter):
    """A reporter that stores notes and metrics."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.lines: list[Mapping[str, Any]] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def metrics(self, line: Mapping[str, Any], steps: int) -> None:
        self.lines.append(line)


class Recorded(Tracker):
    """A tracker with a failing method."""

    def __init__(self, fails: str) -> None:
        self.fails, self.steps, self.status = fails, list[int](), list[Status]()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if self.fails == "log":
            raise OSError("no route")
        self.steps.append(step)

    def end(self, status: Status) -> None:
        if self.fails == "end":
            raise OSError("no route")
        self.status.append(status)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Recorded]:
    def use(fails: str = "") -> Recorded:
        tracker = Recorded(fails)

        def open_(run: TrackedRun) -> Tracker:
            if fails == "open":
                raise OSError("no route")
            return tracker

        monkeypatch.setitem(TRACKERS.built_in, "recorded", TrackerEntry("recorded", open_))
        return tracker

    return use


def train_losses(lines: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in lines if line["event"] == "train"}


@pytest.mark.parametrize(
    "fails",
    [
        "",
        "open",
        pytest.param("log", marks=pytest.mark.slow),
        pytest.param("end", marks=pytest.mark.slow),
    ],
)
def test_failing_tracker_does_not_end_run(
    recipe: Callable[..., Recipe], recorded: Callable[[str], Recorded], fails: str
) -> None:
    tracker, heard = recorded(fails), Notes()
    result = train(recipe(training={"track": ["recorded"]}), reporter=heard)
    assert result.steps >= 4
    warnings = [note for note in heard.notes if "tracker recorded" in note]
    assert len(warnings) == (1 if fails else 0)
    assert len(heard.lines) == len(metrics_of(result))
    if not fails:
        assert tracker.steps == [line["step"] for line in heard.lines]
        assert tracker.status == ["finished"]


def test_tracker_records_end_status_of_run(
    recorded: Callable[[str], Recorded], tmp_path: Path
) -> None:
    for error, status in ((Interrupted("x"), "interrupted"), (ValueError("x"), "failed")):
        tracker = recorded("")
        with (
            pytest.raises(type(error)),
            track(Reporter(), ["recorded"], "m:x", tmp_path, {}),
        ):
            raise error
        assert tracker.status == [status]


def test_unknown_and_missing_trackers_are_rejected(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RecipeError) as refused:
        recipe(training={"track": ["mlflov"]})
    assert refused.value.setting == "training.track"
    entry = TrackerEntry("absent", lambda run: Recorded(""), "no_such_package")
    monkeypatch.setitem(TRACKERS.built_in, "absent", entry)
    with pytest.raises(RecipeError) as refused:
        train(recipe(training={"track": ["absent"]}))
    assert (refused.value.setting, refused.value.problem.value) == ("training.track", "absent")
    train(recipe())  # the name is free


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of MLflow's use of SQLAlchemy
@pytest.mark.parametrize("store", ["files", pytest.param("database", marks=pytest.mark.slow)])
def test_mlflow_records_losses_of_run(
    recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: str
) -> None:
    pytest.importorskip("mlflow", reason="mlflow-skinny is not installed")
    from mlflow.tracking import MlflowClient

    uri = f"file://{tmp_path}/mlruns" if store == "files" else f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    heard = Notes()
    result = train(recipe(training={"track": ["mlflow"]}), reporter=heard)
    assert not [note for note in heard.notes if "tracker" in note]
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("luthier")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == (result.model_id, "FINISHED")
    assert run.data.params["training.batch_size"] == "8"
    assert run.data.params["adaptation.rank"] == "4"
    points = client.get_metric_history(run.info.run_id, "train/loss")
    assert {point.step: point.value for point in points} == pytest.approx(
        train_losses(metrics_of(result))
    )
    assert client.get_metric_history(run.info.run_id, "validation/loss")


def test_mlflow_keeps_the_run_of_a_resumed_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow", reason="mlflow-skinny is not installed")
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    line = {"event": "train", "step": 1, "loss": 2.0, "measure": "loss"}

    def interrupted() -> None:
        with track(Reporter(), ["mlflow"], "m:x", tmp_path, {"a": {"b": 1}}) as reporter:
            reporter.metrics(line, 2)
            raise Interrupted("x")

    with pytest.raises(Interrupted):
        interrupted()
    client = MlflowClient()
    (experiment,) = [each for each in client.search_experiments() if each.name == "luthier"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "KILLED"
    with track(Reporter(), ["mlflow"], "m:x", tmp_path, {"a": {"b": 1}}) as reporter:
        reporter.metrics({**line, "step": 2}, 2)
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.status, run.data.params) == ("FINISHED", {"a.b": "1"})
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [point.step for point in history] == [1, 2]


def test_tensorboard_records_losses_of_run(recipe: Callable[..., Recipe]) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = train(recipe(training={"track": ["tensorboard"]}))
    events = EventAccumulator(str(Path(result.run_dir) / "tensorboard"))
    events.Reload()
    points = {point.step: point.value for point in events.Scalars("train/loss")}
    assert points == pytest.approx(train_losses(metrics_of(result)))
    assert "validation/loss" in events.Tags()["scalars"]
    assert "recipe/text_summary" in events.Tags()["tensors"]


@pytest.mark.slow
def test_wandb_offline_run_records_losses(
    recipe: Callable[..., Recipe],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    for name in ("WANDB_MODE", "WANDB_DIR", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    heard = Notes()
    result = train(recipe(training={"track": ["wandb"]}), reporter=heard)
    assert not [note for note in heard.notes if "tracker" in note]
    (folder,) = (Path(result.run_dir) / "wandb").glob("offline-run-*")
    (file,) = folder.glob("*.wandb")
    losses = [*train_losses(metrics_of(result)).values()]
    # The process of wandb writes the file, and on a busy machine it is behind.
    eventually(lambda: len(wandb_losses(file)) == len(losses))
    assert wandb_losses(file) == pytest.approx(losses)


def wandb_losses(file: Path) -> list[float]:
    """Return the training losses in the transaction log (LevelDB) of an offline run."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, found, at, part = file.read_bytes(), list[float](), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # a block ends
            at += 32768 - at % 32768
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        part += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record = Record.FromString(part)
            part = b""
            for item in record.history.item:
                if (item.key or "/".join(item.nested_key)) == "train/loss":
                    found.append(json.loads(item.value_json))
    return found


def test_tune_command_accepts_multiple_trackers(rows: Path, tiny_model_folder: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    Answer(
        "tune", str(rows), "--base", str(tiny_model_folder), "--name", "tracked",
        "--track", "tensorboard", "--set", "training.max_steps=2",
    ).good()  # fmt: skip
    (run,) = Path(os.environ["LUTHIER_HOME"]).glob("**/tracked/tensorboard")
    assert list(run.iterdir())
    refused = Answer("tune", str(rows), "--track", "tensorbord").refused()
    assert "training.track" in refused and "tensorboard" in refused


def test_trackers_are_imported_only_on_request() -> None:
    code = (
        "import luthier.recipe, luthier.trackers, sys; print({'mlflow', 'wandb'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
