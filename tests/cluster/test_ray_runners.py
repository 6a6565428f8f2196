"""Capacity and commands of the runners of a Ray cluster, without a cluster."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from luthier.cluster.ray_cluster import RayCluster, RayNode
from luthier.cluster.ray_commands import RayCellRunner, RayInferenceRunner
from luthier.cluster.ray_jobs import RayRunner
from luthier.errors import RefusedInput
from luthier.recipe import Recipe
from luthier.server.jobs import runners
from luthier.server.jobs.kinds import TRAINING
from luthier.server.jobs.runners import Runner, RunnerEntry, open_runner
from luthier.server.tables import queue as leased_work
from luthier.server.tables.foundation import foundation_model
from luthier.server.tables.jobs import Job
from luthier.workflows.child_processes import Resources

sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
IDLE = RayNode("10.0.0.1", 4.0, 4.0, 8_000, 8_000)
BUSY = RayNode("10.0.0.2", 4.0, 1.0, 8_000, 2_000)
SMALL = RayNode("10.0.0.2", 2.0, 0.0, 4_000, 0)


def job_runner(monkeypatch: pytest.MonkeyPatch, *nodes: RayNode) -> RayRunner:
    monkeypatch.setattr(RayCluster, "nodes", lambda self: list(nodes))
    made = RayRunner(RayCluster("127.0.0.1:1"))
    made.refresh()
    return made


@pytest.fixture
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RayCluster, "check", lambda self: [IDLE, SMALL])


@sqlite
def test_ray_workers_start_sequentially(queue: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    queue.submit()
    runner = job_runner(monkeypatch, IDLE, BUSY)
    with queue.database.write() as session:
        offers = runner.free(session, SimpleNamespace())
        assert [(o.memory, o.cores, o.idle) for o in offers] == [
            (8_000, 4, True),
            (2_000, 1, False),
        ]
        session.query(Job).update({"memory": 1})
        here = {"host": "server", "pid": 1, "born": 1.0}
        job = leased_work.claim(session, Job, {**here, "starting": True}, 10**12, 9)
        assert job is not None and runner.free(session, SimpleNamespace()) == []
        job.worker = here
        session.flush()
        assert len(runner.free(session, SimpleNamespace())) == 2


def test_ray_job_reserves_at_most_node_resources(monkeypatch: pytest.MonkeyPatch) -> None:
    row = SimpleNamespace(cores=9, needed_memory=9_000, id="job", lease="token")
    command = job_runner(monkeypatch, IDLE).command(["luthier"], TRAINING, row)  # type: ignore[arg-type]
    named = dict(itertools.pairwise(command))
    assert (named["--cores"], named["--memory"], named["--"]) == ("4.0", "8000", "luthier")


@sqlite
def test_encoder_job_reserves_memory(queue: Any) -> None:
    base = foundation_model("sentence-transformers.all-minilm-l6-v2")
    job_id = queue.submit("labels", base=base, settings={})
    TRAINING.prepare(queue.database)
    job = queue.job(job_id)
    assert job.memory > 0.5e9
    command = RayRunner(RayCluster("127.0.0.1:1")).command(["worker"], TRAINING, job)
    assert int(command[command.index("--memory") + 1]) == job.memory


@pytest.mark.parametrize("address", ["", "head", "head:", "ray://head:x"])
def test_invalid_ray_address_is_rejected(address: str) -> None:
    with pytest.raises(RefusedInput):
        RayCluster(address)


def test_unreachable_ray_cluster_is_rejected(database: Any) -> None:
    with pytest.raises(RefusedInput):
        RayCellRunner("127.0.0.1:1")
    with pytest.raises(RefusedInput):
        open_runner("ray", "127.0.0.1:1", 0.0).check(database)


def test_runner_rejects_options_of_different_runner() -> None:
    for name, address, gpus in (
        ("local", "127.0.0.1:1", 0.0), ("local", None, 1.0), ("ray", None, 0.0), ("nomad", None, 0.0)
    ):  # fmt: skip
        with pytest.raises(RefusedInput):
            open_runner(name, address, gpus)


def test_runner_of_plugin_opens_without_ray_address(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = Runner()
    entry = RunnerEntry("slurm", lambda address, gpus: runner)
    monkeypatch.setattr(runners, "RUNNERS", {"slurm": entry})
    assert open_runner("slurm", None, 0.0) is runner


@pytest.fixture
def recipe(tmp_path: Path, tiny_model_folder: Path) -> Recipe:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "say fox", "completion": "FOX"}) + "\n")
    return Recipe.parse({"base": str(tiny_model_folder), "data": {"train": str(rows)}})


def with_threads(recipe: Recipe, threads: int | None) -> Recipe:
    training = recipe.training.model_copy(update={"threads": threads})
    return recipe.model_copy(update={"training": training})


@pytest.mark.parametrize(
    ("memory", "threads", "parallel", "shares"),
    [
        (1, None, None, (5, 1)),  # at most the first random trials
        (3_000, None, None, (3, 2)),
        (3_000, 2, None, (3, 2)),
        (1, 4, None, (1, 4)),
        (1, None, 3, (3, 2)),
        (1, None, 1, (1, 4)),
        (1, None, 40, (40, 1)),
        (9_000, None, None, (1, 4)),  # a trial that fits no node runs on the largest
    ],
)
def test_trial_round_fits_free_resources_of_nodes(
    two_nodes: None,
    recipe: Recipe,
    monkeypatch: pytest.MonkeyPatch,
    memory: int,
    threads: int | None,
    parallel: int | None,
    shares: tuple[int, int],
) -> None:
    monkeypatch.setattr("luthier.cluster.ray_commands.memory_of", lambda command, fields: memory)
    runner = RayCellRunner("10.0.0.1:6379")
    assert runner.shares(with_threads(recipe, threads), parallel) == shares


@pytest.mark.parametrize(
    ("memory", "processes", "shares"),
    [
        (1, None, (2, 2)),  # one trial per node
        (1, 3, (3, 2)),
        (3_000, 3, (3, 2)),
        (5_000, 2, (1, 4)),  # only one node has this memory
        (90_000, None, (1, 4)),  # more memory than any node: the largest node runs the trial
        (1, 40, (6, 1)),
    ],
)
def test_processes_of_inference_share_the_cores(
    two_nodes: None, memory: int, processes: int | None, shares: tuple[int, int]
) -> None:
    runner = RayInferenceRunner("10.0.0.1:6379")
    assert runner.plan_processes(processes, memory, 100) == shares


def test_ray_process_reserves_resources_and_lists_files(
    two_nodes: None, recipe: Recipe, tmp_path: Path
) -> None:
    runner = RayCellRunner("10.0.0.1:6379")
    needs = runner.resources(with_threads(recipe, 3))
    assert (needs.cores, needs.paths) == (3, (recipe.base, recipe.data.train))
    for resources, memory in ((needs, "8000"), (Resources(3, 9, needs.paths), "9")):
        command = runner.command(["python", "x"], resources, tmp_path / "errors.txt")
        options = command[: command.index("--")]
        named = dict(itertools.pairwise(options))
        assert (named["--cores"], named["--memory"]) == ("3.0", memory)
        assert [b for a, b in itertools.pairwise(options) if a == "--needs"] == [*needs.paths]
        assert command[command.index("--") + 1 :] == ["python", "x"]
