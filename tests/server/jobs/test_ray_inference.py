"""Batch inference on a real Ray cluster, of which workers and the command are killed."""

from __future__ import annotations

import json
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

from luthier.engine.metrics import Reporter
from luthier.errors import LuthierError
from luthier.inference.prediction import BLOCK_PROMPTS
from luthier.models.sampling import Sampling
from luthier.server.jobs.ray_inference import RayInferenceRunner
from luthier.server.jobs.ray_runner import RayNode, RayRunner
from luthier.workflows.batch_inference import answer_file, shards_folder
from luthier.workflows.child_processes import Resources
from luthier.workflows.inference_tasks import GenerateTask

SHARDS = 12

on_cluster = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> RayInferenceRunner:
    """One for a cluster of two nodes, with nobody to ask."""
    nodes = [RayNode("10.0.0.1", 4.0, 4.0, 8_000, 8_000), RayNode("10.0.0.2", 2.0, 0.0, 4_000, 0)]
    monkeypatch.setattr(RayRunner, "check_cluster", lambda self: nodes)
    return RayInferenceRunner("10.0.0.1:6379")


@pytest.mark.parametrize(
    ("memory", "processes", "shares"),
    [
        (1, None, (2, 2)),  # one for each node
        (1, 3, (3, 2)),
        (3_000, 3, (3, 2)),
        (5_000, 2, (1, 4)),  # for which only one node has memory
        (90_000, None, (1, 4)),  # more than any node has: it is tried on the largest
        (1, 40, (6, 1)),
    ],
)
def test_processes_have_the_cores_that_the_nodes_have_for_them(
    runner: RayInferenceRunner, memory: int, processes: int | None, shares: tuple[int, int]
) -> None:
    assert runner.plan_processes(processes, memory, 100) == shares


def test_a_process_reserves_what_it_takes_and_names_what_it_reads(
    runner: RayInferenceRunner, tmp_path: Path
) -> None:
    needs = Resources(3, 9_000, ("/models/x", "/rows.jsonl"))
    command = runner.command(["python", "x"], needs, tmp_path / "errors.txt")
    options = command[: command.index("--")]
    assert options[options.index("--cores") + 1] == "3.0"
    assert options[options.index("--memory") + 1] == "8000"  # what fits no node takes the largest
    assert [options[i + 1] for i, part in enumerate(options) if part == "--needs"] == [*needs.paths]
    assert command[command.index("--") + 1 :] == ["python", "x"]


@pytest.fixture
def task(tmp_path: Path, tiny_model_folder: Path) -> GenerateTask:
    prompts = ({"prompt": f"say fox {n}", "id": n} for n in range(SHARDS * BLOCK_PROMPTS))
    source = tmp_path / "prompts.jsonl"
    source.write_text("".join(json.dumps(each) + "\n" for each in prompts))
    sampling = Sampling(max_tokens=48, temperature=0.7)
    return GenerateTask(model=str(tiny_model_folder), source=str(source), sampling=sampling)


class Notes(Reporter):
    """What was said."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def process_of(output: Path, number: int) -> psutil.Process | None:
    """The process on a node that answers rows."""
    own = ["luthier.workflows.batch_inference", str(shards_folder(output)), f"process-{number}"]
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if "--" not in line and line[-3:] == own:  # and not the command that stands for it here
            return process
    return None


def answered(output: Path) -> int:
    return len([*shards_folder(output).glob("*.answers")])


def when(condition: Callable[[], Any], seconds: float = 300) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


class TestOnCluster:
    """On nodes that are processes."""

    pytestmark = on_cluster

    def test_killed_workers_leave_no_row_out(
        self, cluster: Cluster, task: GenerateTask, tmp_path: Path
    ) -> None:
        alone, spread, reporter = tmp_path / "alone.jsonl", tmp_path / "spread.jsonl", Notes()
        answer_file(task, alone, 1)

        def kill() -> None:
            when(lambda: answered(spread) >= 1)
            when(lambda: process_of(spread, 1)).kill()
            actor = when(lambda: process_of(spread, 2)).parent()
            actor.kill()

        killer = threading.Thread(target=kill, daemon=True)
        killer.start()
        runner = RayInferenceRunner(cluster.address)
        found = answer_file(task, spread, runner=runner, reporter=reporter)
        killer.join()
        assert spread.read_bytes() == alone.read_bytes()
        assert (found.rows, found.processes) == (SHARDS * BLOCK_PROMPTS, 2)
        notes = "\n".join(reporter.notes)
        assert "process-1 ended by signal 9 (Killed), and goes on with the rows" in notes
        assert "process-2 ended as its node or its actor did" in notes
        cluster.wait_for_idle(2)

    def test_a_killed_command_goes_on(
        self, cluster: Cluster, task: GenerateTask, tmp_path: Path
    ) -> None:
        alone, spread = tmp_path / "alone.jsonl", tmp_path / "spread.jsonl"
        command = [
            sys.executable, "-m", "luthier", "generate", task.model, "--input", task.source,
            "--output", str(spread), "--max-tokens", "48", "--temperature", "0.7",
            "--ray-address", cluster.address, "--json",
        ]  # fmt: skip
        with subprocess.Popen(command) as process:
            when(lambda: answered(spread) >= 2)
            workers = [each for n in (1, 2) if (each := process_of(spread, n))]
            process.kill()
        _, alive = psutil.wait_procs(workers, 60)
        assert not alive  # what they were answering is answered anew
        assert answered(spread) < SHARDS and not spread.exists()
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        report = json.loads(done.stdout)
        assert (
            report["resumed_rows"] >= 2 * BLOCK_PROMPTS and report["rows"] == SHARDS * BLOCK_PROMPTS
        )
        answer_file(task, alone, 1)
        assert spread.read_bytes() == alone.read_bytes()
        cluster.wait_for_idle(2)

    def test_what_a_node_does_not_see_is_named(
        self, cluster: Cluster, task: GenerateTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(
            "luthier.workflows.batch_inference._folders_of", lambda model: [Path("/nowhere/model")]
        )
        with pytest.raises(LuthierError, match=r"does not see /nowhere/model: data, local"):
            answer_file(task, tmp_path / "a.jsonl", runner=RayInferenceRunner(cluster.address))
