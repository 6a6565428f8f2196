"""Faults of runs with several processes: kills, hanging processes, full disks."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from short_runs import metrics_of
from small_disk import Disk

from luthier.engine.checkpoints import Checkpoints
from luthier.engine.metrics import Reporter
from luthier.engine.processes import train_in_processes
from luthier.engine.runs import Result
from luthier.engine.train import train
from luthier.errors import Interrupted, LuthierError, RunConflict
from luthier.library.models import find
from luthier.recipe import Recipe

Recipes = Callable[..., Recipe]
# Steps take about 10 ms; progress is reported 10 times a second.
SETTINGS = {"training": {"max_steps": 80, "refit": False, "patience": 0}}
CHECKPOINT = 10
"""Step of the first checkpoint."""


class Faults(Reporter):
    """Calls each fault once, with the processes by rank: after step 12, 32, 52 and so on."""

    def __init__(self, *faults: Callable[[Mapping[int, psutil.Process]], None]) -> None:
        self.faults = {12 + 20 * number: fault for number, fault in enumerate(faults)}
        self.notes: list[str] = []
        self.steps: list[int] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def metrics(self, line: Mapping[str, Any], steps: int) -> None:
        if line["event"] != "train":
            return
        self.steps.append(line["step"])
        if line["step"] in self.faults:
            self.faults.pop(line["step"])(processes_by_rank())


def processes_by_rank() -> dict[int, psutil.Process]:
    found = {}
    for each in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # the process has ended
            if "luthier.engine.processes" in each.cmdline():
                rank = int(each.environ()["RANK"])
                fork = Path(each.cmdline()[-1], f"fork-{rank}")
                found[rank] = psutil.Process(int(fork.read_text())) if fork.exists() else each
    return found


def send(rank: int, number: signal.Signals) -> Callable[[Mapping[int, psutil.Process]], None]:
    return lambda processes: processes[rank].send_signal(number)


def weights_of(result: Result) -> str:
    files = find(result.model_id).manifest.files
    return files.get("adapter_model.safetensors") or files["model.safetensors"]


@pytest.mark.slow
@pytest.mark.usefixtures("forked_processes")
@pytest.mark.parametrize(
    "ranks", [pytest.param([0]), pytest.param([1, 0, 1], marks=pytest.mark.slow)]
)
def test_killed_process_resumes_to_equal_bits(
    luthier_home: Path, recipe: Recipes, ranks: list[int]
) -> None:
    settings = {"training": {**SETTINGS["training"], "max_steps": 20 * (len(ranks) + 1)}}
    whole = train_in_processes(recipe(**settings, name="whole"), 2)
    faults = Faults(*(send(rank, signal.SIGKILL) for rank in ranks))
    killed = train_in_processes(recipe(**settings, name="killed"), 2, reporter=faults)
    assert faults.steps.count(CHECKPOINT) == 1
    assert faults.steps.count(CHECKPOINT + 1) == 2  # a checkpoint exists at that step
    assert weights_of(killed) == weights_of(whole)
    assert sum("a process ended" in note for note in faults.notes) == len(ranks)


@pytest.mark.slow
def test_restarted_processes_ignore_earlier_runs(luthier_home: Path, recipe: Recipes) -> None:
    """An unnamed run is named after the data, and an earlier run may have the same request."""
    settings = {"training": {"max_steps": 2, "refit": False}, "name": None}
    earlier = train(recipe(**settings))

    def kill_one() -> None:  # before the process reads data
        while not (found := processes_by_rank()):
            time.sleep(0.05)
        found[0].kill()

    killer = threading.Thread(target=kill_one)
    killer.start()
    later = train_in_processes(recipe(**settings), 2)
    killer.join()
    assert later.model_id != earlier.model_id


@pytest.mark.slow
@pytest.mark.parametrize("name", ["x", pytest.param(None, marks=pytest.mark.slow)])
def test_launch_resumes_only_own_run(
    luthier_home: Path, recipe: Recipes, monkeypatch: pytest.MonkeyPatch, name: str | None
) -> None:
    """If a node joins or leaves, torchrun starts all processes again without counting a restart."""

    class Stopping(Faults):
        def metrics(self, line: Mapping[str, Any], steps: int) -> None:
            super().metrics(line, steps)
            if line["event"] == "train" and line["step"] == 3:
                os.kill(os.getpid(), signal.SIGTERM)

    asked = recipe(training={"max_steps": 6, "refit": False}, name=name)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    with pytest.raises(Interrupted):
        train(asked, reporter=Stopping())
    for other in ("two", "none") if name else ():
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", other)
        with pytest.raises(RunConflict) as refused:
            train(asked)
        assert refused.value.rule == "run.name_taken"
    if name is None:  # began meanwhile, and has the higher number
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "two")
        train(asked)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    resumed = Faults()
    done = train(asked, reporter=resumed)
    assert resumed.steps == [4, 5, 6]
    assert train(asked, reporter=resumed) == done  # a node can join after the last step
    assert resumed.steps == [4, 5, 6]


@pytest.mark.slow
def test_run_resumes_after_hanging_process(
    luthier_home: Path, recipe: Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The agent waits half a minute before killing hanging processes."""
    whole = train_in_processes(recipe(**SETTINGS, name="whole"), 2)
    monkeypatch.setenv("LUTHIER_COLLECTIVE_TIMEOUT", "20")
    for rank in (0, 1):
        faults = Faults(send(rank, signal.SIGSTOP))
        done = train_in_processes(recipe(**SETTINGS, name=f"hung-{rank}"), 2, reporter=faults)
        assert any("a process ended" in note for note in faults.notes), faults.notes
        assert faults.steps.count(CHECKPOINT + 1) == 2
        assert weights_of(done) == weights_of(whole)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_shards_survive_each_kind_of_end(luthier_home: Path, recipe: Recipes, rank: int) -> None:
    training = {**SETTINGS["training"], "fully_shard": True}
    settings: dict[str, Any] = {"training": training, "adaptation": {"method": "full"}}
    whole = train_in_processes(recipe(**settings, name="whole"), 2)
    faults = Faults(send(rank, signal.SIGKILL))
    killed = train_in_processes(recipe(**settings, name="killed"), 2, reporter=faults)
    assert faults.steps.count(CHECKPOINT + 1) == 2
    assert weights_of(killed) == weights_of(whole)


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    """Separate file system for the store of the test."""
    home = tmp_path / "small"
    home.mkdir()
    monkeypatch.setenv("LUTHIER_HOME", str(home))
    disk = Disk(home)
    if not disk.mount("size=32000000"):
        pytest.skip("this user may not mount a file system")
    yield disk
    disk.unmount()


def check_resumed(settings: dict[str, Any], recipe: Recipes, folder: Path) -> None:
    """Check that the files in ``folder`` are intact and that any number of processes can resume."""
    present = [path.name for path in (folder / "checkpoints").iterdir()]
    assert present == [f"step-{CHECKPOINT:08d}"]
    found = Checkpoints(folder / "checkpoints").latest()
    assert found is not None and found[0].step == CHECKPOINT
    resumed = Faults()
    done = train(recipe(**settings, name="x"), True, resumed)
    assert resumed.steps[0] == CHECKPOINT + 1
    whole = train(recipe(**settings, name="whole"))
    for mine, theirs in zip(metrics_of(whole), metrics_of(done), strict=True):
        assert theirs["loss"] == pytest.approx(mine["loss"], rel=1e-5)


@pytest.mark.slow
def test_full_disk_of_first_process_ends_run_resumably(
    disk: Disk, recipe: Recipes, tiny_model_folder: Path
) -> None:
    faults = Faults(lambda _: disk.fill())
    with pytest.raises(LuthierError) as failed:
        train_in_processes(recipe(**SETTINGS, name="x"), 2, reporter=faults)
    assert failed.value.rule == "disk.full"
    assert faults.steps.count(12) == 1  # a restart would not help
    assert not processes_by_rank()
    disk.free()
    check_resumed(SETTINGS, recipe, disk.folder / "runs" / tiny_model_folder.name / "x")


@pytest.mark.slow
@pytest.mark.usefixtures("forked_processes")
def test_full_disk_of_second_process_ends_run_resumably(
    luthier_home: Path, recipe: Recipes, tiny_model_folder: Path
) -> None:
    """The file size limit of one process acts as a quota or a full disk."""

    def limit(processes: Mapping[int, psutil.Process]) -> None:
        size = 2000  # its metrics have more by now
        psutil.Process(processes[1].pid).rlimit(psutil.RLIMIT_FSIZE, (size, size))

    faults = Faults(limit)
    with pytest.raises(LuthierError) as refused:
        train_in_processes(recipe(**SETTINGS, name="x"), 2, reporter=faults)
    assert refused.value.rule == "file.unwritable"
    assert faults.steps.count(12) == 1
    assert not processes_by_rank()
    check_resumed(SETTINGS, recipe, luthier_home / "runs" / tiny_model_folder.name / "x")
