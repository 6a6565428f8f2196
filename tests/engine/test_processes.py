"""Training in several processes: results, reports, rejections, kills and launchers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import psutil
import pytest
import torch
from short_runs import metrics_of, write_rows

from luthier.engine.metrics import Reporter
from luthier.engine.processes import train_in_processes, work
from luthier.engine.train import train
from luthier.errors import (
    CorruptFile,
    DataError,
    Interrupted,
    RecipeError,
    RefusedInput,
    RunConflict,
)
from luthier.files import read_json, write_json
from luthier.library.models import find
from luthier.recipe import Recipe

Recipes = Callable[..., Recipe]


class Lines(Reporter):
    """Reporter with all lines of a run. Kills one process of the run after step ``kill_at``."""

    def __init__(self, kill_at: int = 0) -> None:
        self.notes: list[str] = []
        self.steps: list[int] = []
        self.kill_at = kill_at

    def note(self, text: str) -> None:
        self.notes.append(text)

    def metrics(self, line: Mapping[str, Any], steps: int) -> None:
        if line["event"] != "train":
            return
        self.steps.append(line["step"])
        if line["step"] == self.kill_at:
            self.kill_at = 0
            children = psutil.Process().children(recursive=True)
            found = [p for p in children if "luthier.engine.processes" in p.cmdline()]
            found[-1].send_signal(signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.usefixtures("forked_processes")
def test_two_processes_match_single_process(luthier_home: Path, recipe: Recipes) -> None:
    settings = {"training": {"micro_batch_tokens": 64, "refit": True}}
    one = train(recipe(**settings, name="one"))
    lines, at_interrupt = Lines(), signal.getsignal(signal.SIGINT)
    two = train_in_processes(recipe(**settings, name="two"), 2, reporter=lines)
    assert signal.getsignal(signal.SIGINT) is at_interrupt
    assert two.model_id != one.model_id and find(two.model_id).manifest.files
    assert (two.steps, two.tokens, two.rows_seen) == (one.steps, one.tokens, one.rows_seen)
    mine, theirs = metrics_of(one), metrics_of(two)
    assert [line["event"] for line in theirs] == [line["event"] for line in mine]
    losses = [line["loss"] for line in mine if line["event"] != "refit"]
    assert [line["loss"] for line in theirs if "loss" in line] == pytest.approx(losses, rel=1e-5)
    assert lines.steps == [line["step"] for line in metrics_of(two) if line["event"] == "train"]
    assert any("2 processes share" in note for note in lines.notes)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_two_sharded_processes_match_single_process(
    luthier_home: Path, recipe: Recipes, method: str
) -> None:
    training: dict[str, Any] = {"micro_batch_tokens": 64, "batch_size": 3, "fully_shard": True}
    settings = {"training": training, "adaptation": {"method": method}}
    lines, alone = Lines(), Lines()
    one = train(recipe(**settings, name="one"), reporter=alone)
    two = train_in_processes(recipe(**settings, name="two"), 2, reporter=lines)
    assert (two.steps, two.tokens, two.rows_seen) == (one.steps, one.tokens, one.rows_seen)
    for mine, theirs in zip(metrics_of(one), metrics_of(two), strict=True):
        assert theirs["loss"] == pytest.approx(mine["loss"], rel=1e-5)
    assert find(two.model_id).manifest.files
    assert any("sharded over 2 processes" in note for note in lines.notes)
    assert any("no effect with one process" in note for note in alone.notes)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_layers_are_shared_by_graphics_cards(luthier_home: Path, recipe: Recipes) -> None:
    settings: dict[str, Any] = {"adaptation": {"method": "full"}}
    one = train_in_processes(recipe(**settings, name="one"), 2)
    training = {"fully_shard": True}
    two = train_in_processes(recipe(training=training, **settings, name="two"), 2)
    for mine, theirs in zip(metrics_of(one), metrics_of(two), strict=True):
        assert theirs["loss"] == pytest.approx(mine["loss"], rel=1e-4)


def test_unshardable_network_is_refused_before_loading(luthier_home: Path, recipe: Recipes) -> None:
    training = {"fully_shard": True}
    for changes in (
        {"adaptation": {"method": "qlora"}},
        {"adaptation": {"method": "prefix"}},
        {"objective": {"method": "sdft"}},
    ):
        with pytest.raises(RecipeError) as refused:
            train(recipe(training=training, **changes))
        assert refused.value.rule == "pair.impossible"


@pytest.mark.slow
def test_sharded_run_resumes_after_kill_with_different_process_count(
    luthier_home: Path, recipe: Recipes, tmp_path: Path
) -> None:
    training = {"max_steps": 24, "refit": False, "patience": 0, "fully_shard": True}
    settings: dict[str, Any] = {"training": training, "adaptation": {"method": "full"}}
    whole = train_in_processes(recipe(**settings, name="whole"), 2)
    lines = Lines(kill_at=16)
    killed = train_in_processes(recipe(**settings, name="killed"), 2, reporter=lines)
    assert lines.steps.count(11) == 2  # resumed from the checkpoint after step 10
    one, other = (find(result.model_id).manifest.files for result in (whole, killed))
    assert one["model.safetensors"] == other["model.safetensors"]

    def stop(line: Mapping[str, Any], steps: int) -> None:
        if line["event"] == "train" and line["step"] == 14:
            os.kill(os.getpid(), signal.SIGTERM)

    stopping = Reporter()
    stopping.metrics = stop  # type: ignore[method-assign]
    with pytest.raises(Interrupted):
        train_in_processes(recipe(**settings, name="other"), 2, reporter=stopping)
    resumed = Lines()
    done = train_in_processes(recipe(**settings, name="other"), 3, True, resumed)
    assert 10 < resumed.steps[0] < 24
    for mine, theirs in zip(metrics_of(whole), metrics_of(done), strict=True):
        assert theirs["loss"] == pytest.approx(mine["loss"], rel=1e-5)


@pytest.mark.slow
def test_fewer_rows_than_processes_is_reported(luthier_home: Path, recipe: Recipes) -> None:
    lines = Lines()
    settings = {"batch_size": 1, "max_steps": 1, "refit": False}
    before = {*Path(gettempdir()).glob("torchelastic_*")}
    train_in_processes(recipe(training=settings, name="few"), 2, reporter=lines)
    said = [note for note in lines.notes if "a step has 1 row for 2 processes" in note]
    assert len(said) == 1 and "`training.batch_size=2`" in said[0]
    assert {*Path(gettempdir()).glob("torchelastic_*")} <= before


@pytest.mark.slow
@pytest.mark.usefixtures("forked_processes")
def test_error_of_all_processes_is_reported_once(
    luthier_home: Path, recipe: Recipes, tmp_path: Path
) -> None:
    bad = write_rows(tmp_path / "bad.jsonl", [{"prompt": "x", "completion": {"a": 3}}])
    data = {"train": str(bad)}
    with pytest.raises(DataError) as alone:
        train(recipe(data=data))
    with pytest.raises(RefusedInput) as together:
        train_in_processes(recipe(data=data), 2)
    assert together.value.rule == "field.type"
    assert str(together.value) == str(alone.value)
    for number in (0, 100_000):
        with pytest.raises(RecipeError) as refused:
            train_in_processes(recipe(), number)
        assert refused.value.rule == "machine.processes"


@pytest.mark.slow
def test_killed_process_costs_steps_but_no_bit(luthier_home: Path, recipe: Recipes) -> None:
    settings = {"training": {"max_steps": 24, "refit": False, "patience": 0}}
    whole = train_in_processes(recipe(**settings, name="whole"), 2)
    lines = Lines(kill_at=16)
    killed = train_in_processes(recipe(**settings, name="killed"), 2, reporter=lines)
    assert any("a process ended" in note for note in lines.notes)
    assert lines.steps.count(11) == 2  # resumed from the checkpoint after step 10
    one, other = (find(result.model_id).manifest.files for result in (whole, killed))
    assert one["adapter_model.safetensors"] == other["adapter_model.safetensors"]
    with pytest.raises(RunConflict) as refused:
        train_in_processes(recipe(**settings, name="killed"), 2)
    assert refused.value.rule == "run.name_taken"


@pytest.mark.slow
def test_stopped_run_resumes_with_different_process_count(
    luthier_home: Path, recipe: Recipes, rows: Path, tiny_model_folder: Path
) -> None:
    command = [
        "tune",
        str(rows),
        "--base",
        str(tiny_model_folder),
        "--name",
        "x",
        "--batch-size",
        "4",
    ]
    command += ["--set", "training.max_steps=400", "--set", "training.patience=0"]
    start = [sys.executable, "-m", "luthier", *command]
    with subprocess.Popen([*start, "--processes", "2"], stderr=subprocess.PIPE) as process:
        metrics = luthier_home / "runs" / tiny_model_folder.name / "x" / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and (
            not metrics.is_file() or metrics.stat().st_size < 9000
        ):
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=120)
    assert process.returncode == 130, error.decode()
    assert b"--resume" in error and b"Traceback" not in error
    done = subprocess.run([*start, "--resume"], capture_output=True, timeout=300)
    assert done.returncode == 0 and b"resuming from step" in done.stderr, done.stderr.decode()


def test_error_of_single_process_ends_all_processes(
    tmp_path: Path, recipe: Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise CorruptFile("row 3 cannot be read any more")

    monkeypatch.setattr("luthier.engine.train.train", fail)
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    request = {"recipe": recipe().plain(), "resume": False, "lineage": {}}
    write_json(tmp_path / "request.json", {**request, "agent": os.getppid(), "keys": ""})
    with pytest.raises(SystemExit):
        work(tmp_path)
    message = "process 1 of 2: row 3 cannot be read any more"
    reported = read_json(tmp_path / "outcome-1.json")
    assert (reported["error"], reported["message"]) == ("CorruptFile", message)
    work(tmp_path)  # a restart resumes
    assert [path.name for path in tmp_path.glob("outcome*")] == ["outcome-1.json"]


@pytest.mark.slow
def test_processes_end_with_killed_agent(
    luthier_home: Path, rows: Path, tiny_model_folder: Path
) -> None:
    command = [sys.executable, "-m", "luthier", "tune", str(rows), "--base", str(tiny_model_folder)]
    command += ["--name", "x", "--processes", "2", "--set", "training.max_steps=100000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as agent:
        metrics = luthier_home / "runs" / tiny_model_folder.name / "x" / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not metrics.is_file():
            time.sleep(0.05)
        workers = psutil.Process(agent.pid).children(recursive=True)
        agent.kill()
        agent.communicate(timeout=60)
    assert len(workers) >= 2
    assert not psutil.wait_procs(workers, timeout=60)[1]


@pytest.mark.slow
def test_torchrun_starts_the_processes_as_well(
    luthier_home: Path, rows: Path, tiny_model_folder: Path
) -> None:
    command = ["--standalone", "--nproc-per-node", "2", "-m", "luthier", "tune", str(rows)]
    command += ["--base", str(tiny_model_folder), "--name", "x", "--set", "training.max_steps=4"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *command],
        capture_output=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.count(b"is stored and") == 1
    assert find(f"{tiny_model_folder.name}:x").manifest.files
