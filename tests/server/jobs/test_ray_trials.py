"""Trials of a search on a real Ray cluster, of which workers and nodes are killed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray_cluster import Cluster

from luthier.engine.metrics import MetricsFile, Reporter
from luthier.errors import LuthierError, RefusedInput
from luthier.files import read_json
from luthier.recipe import Recipe
from luthier.server.jobs.ray_runner import RayNode, RayRunner
from luthier.server.jobs.ray_trials import RayTrialRunner
from luthier.workflows.search import SearchResult, search

SPACE = ["training.learning_rate=1e-6..3e-1", "adaptation.rank=2,4"]
TRIALS = 6

on_cluster = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
]


@pytest.fixture
def recipe(tmp_path: Path, tiny_model_folder: Path) -> Callable[..., Recipe]:
    rows = tmp_path / "rows.jsonl"
    lines = [
        {"prompt": f"say {word} {n}", "completion": f"{word.upper()} {n}"}
        for n in range(8)
        for word in ("fox", "dog", "card")
    ]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def build(name: str, **training: Any) -> Recipe:
        settings = {"max_steps": 8, "batch_size": 4, "precision": "float32", "threads": 1}
        return Recipe.parse(
            {
                "base": str(tiny_model_folder),
                "name": name,
                "data": {"train": str(rows), "validation_share": 0.2},
                "training": {**settings, **training},
            }
        )

    return build


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> RayTrialRunner:
    """One for a cluster of two nodes, with nobody to ask."""
    nodes = [RayNode("10.0.0.1", 4.0, 4.0, 8_000, 8_000), RayNode("10.0.0.2", 2.0, 0.0, 4_000, 0)]
    monkeypatch.setattr(RayRunner, "check_cluster", lambda self: nodes)
    return RayTrialRunner("10.0.0.1:6379")


@pytest.mark.parametrize(
    ("memory", "threads", "parallel", "shares"),
    [
        (1, None, None, (5, 1)),  # no more than the first random ones
        (3_000, None, None, (3, 2)),
        (3_000, 2, None, (3, 2)),
        (1, 4, None, (1, 4)),
        (1, None, 3, (3, 2)),
        (1, None, 1, (1, 4)),
        (1, None, 40, (40, 1)),
        (9_000, None, None, (1, 4)),  # what fits no node is tried on the largest
    ],
)
def test_a_round_is_what_the_nodes_have_room_for(
    runner: RayTrialRunner,
    recipe: Callable[..., Recipe],
    monkeypatch: pytest.MonkeyPatch,
    memory: int,
    threads: int | None,
    parallel: int | None,
    shares: tuple[int, int],
) -> None:
    monkeypatch.setattr("luthier.server.jobs.ray_trials.memory_of", lambda command, fields: memory)
    assert runner.shares(recipe("x", threads=threads), parallel) == shares


def test_a_trial_reserves_its_threads_and_memory_and_names_what_it_reads(
    runner: RayTrialRunner, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    mine = recipe("x", threads=3)
    command = runner.command(["python", "x"], runner.resources(mine), tmp_path / "errors.txt")
    options = command[: command.index("--")]
    assert options[options.index("--cores") + 1] == "3.0"
    assert int(options[options.index("--memory") + 1]) == 8_000
    needs = [options[i + 1] for i, part in enumerate(options) if part == "--needs"]
    assert needs == [mine.base, mine.data.train]
    assert command[command.index("--") + 1 :] == ["python", "x"]


class Notes(Reporter):
    """What a search said."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.steps: list[int] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def metrics(self, line: Any, steps: int) -> None:
        assert steps == 8
        self.steps.append(line["step"])


def measured(found: SearchResult) -> list[list[float]]:
    """Losses on the validation rows of each trial."""
    folders = sorted((Path(found.folder) / "trials").iterdir())
    lines = [MetricsFile(folder / "metrics.jsonl").read() for folder in folders]
    return [[x["loss"] for x in each if x["event"] == "validation"] for each in lines]


def weights(found: SearchResult) -> str:
    return str(read_json(Path(found.result.model_dir) / "luthier.json")["trained_weights_sha256"])


def process_of(number: int | str, home: Path) -> psutil.Process | None:
    """The process on a node that carries out a trial."""
    own = f"{home}/searches"
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if "--" not in line and line[-4:-2] == ["-m", "luthier.workflows.trial_processes"]:
            folder, name = line[-2:]
            if folder.startswith(own) and name == str(number):
                return process
    return None


def when(condition: Callable[[], Any], seconds: float = 900) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


class TestOnCluster:
    """On nodes that are processes."""

    pytestmark = on_cluster

    def test_killed_workers_and_a_killed_node_change_no_trial(
        self, cluster: Cluster, recipe: Callable[..., Recipe], luthier_home: Path
    ) -> None:
        alone = search(recipe("alone"), TRIALS, SPACE, parallel=2)
        reporter = Notes()

        def kill() -> None:
            when(lambda: process_of(1, luthier_home)).kill()
            raylet = when(lambda: process_of(3, luthier_home)).parent().parent()
            assert "raylet" in raylet.name()
            raylet.kill()

        killer = threading.Thread(target=kill)
        killer.start()
        runner = RayTrialRunner(cluster.address)
        found = search(recipe("spread"), TRIALS, SPACE, reporter=reporter, runner=runner)
        killer.join()
        assert found.trials == alone.trials
        assert measured(found) == measured(alone)
        assert weights(found) == weights(alone)
        assert read_json(Path(found.folder) / "search.json")["parallel"] == 2
        again = [note for note in reporter.notes if "goes on after its last checkpoint" in note]
        assert any("002 ended by signal 9" in note for note in again)
        assert any("ended as its node or its actor did" in note for note in again)
        # The first trial and the best one have nobody beside them, and are shown as they go.
        assert reporter.steps.count(8) >= 2 * 2
        cluster.wait_for(1)
        cluster.add_until(2)

    def test_a_stopped_search_ends_all_of_its_trials_and_goes_on(
        self, cluster: Cluster, recipe: Callable[..., Recipe], luthier_home: Path
    ) -> None:
        script = (
            "import sys, json; from luthier.recipe import Recipe; "
            "from luthier.server.jobs.ray_trials import RayTrialRunner; "
            "from luthier.workflows.search import search; "
            "search(Recipe.parse(json.loads(sys.argv[1])), 3, sys.argv[3:], resume=True, "
            "runner=RayTrialRunner(sys.argv[2]))"
        )
        mine = recipe("stopped", max_steps=400)
        fields = mine.model_dump(mode="json", exclude_unset=True)
        command = [sys.executable, "-c", script, json.dumps(fields), cluster.address, SPACE[0]]
        folder = luthier_home / "searches" / "stopped" / "trials"
        second, third = (folder / each / "metrics.jsonl" for each in ("002", "003"))
        # Trials that were cut short are others to the study, with numbers of their own.
        for number, names in ((signal.SIGTERM, (1, 2)), (signal.SIGKILL, (3, 4))):
            with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
                try:
                    when(lambda: second.is_file() and third.is_file())
                    workers = [when(lambda n=n: process_of(n, luthier_home)) for n in names]
                    process.send_signal(number)
                    _, errors = process.communicate()
                finally:
                    process.kill()
            if number == signal.SIGTERM:
                assert "Interrupted: stopped; the same command with --resume goes on" in errors
                assert not any(each.is_running() for each in workers)
            psutil.wait_procs(workers, 60)
            cluster.wait_for_idle(2)
        found = search(mine, 3, SPACE[:1], resume=True, runner=RayTrialRunner(cluster.address))
        alone = search(recipe("alone", max_steps=400), 3, SPACE[:1], parallel=2)
        assert found.trials == alone.trials and weights(found) == weights(alone)

    def test_what_a_node_does_not_see_is_named(
        self, cluster: Cluster, recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(
            "luthier.server.jobs.ray_trials._local_paths", lambda recipe: ["/nowhere/rows.jsonl"]
        )
        with pytest.raises(LuthierError, match=r"does not see /nowhere/rows.jsonl: data, local"):
            search(recipe("unseen"), 2, SPACE, runner=RayTrialRunner(cluster.address))


def test_a_cluster_that_is_not_there_is_refused() -> None:
    with pytest.raises(RefusedInput, match=r"cannot be reached .* `ray start --head`"):
        RayTrialRunner("127.0.0.1:1")
