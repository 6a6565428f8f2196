"""Studies and batch inference on a real Ray cluster, with killed workers and nodes."""

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

from luthier.cluster.ray_commands import RayCellRunner
from luthier.engine.metrics import Reporter
from luthier.inference.prediction import BLOCK_PROMPTS
from luthier.models.decoding.sampling import Sampling
from luthier.recipe import Recipe
from luthier.workflows.batch_inference import answer_file, shards_folder
from luthier.workflows.inference_tasks import GenerateTask
from luthier.workflows.study.grid import grid_of, parse_dimensions
from luthier.workflows.study.study import study

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
SPACE = ["training.learning_rate=1e-6..3e-1", "adaptation.rank=2,4"]
TRIALS = 6
SHARDS = 12


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


class Notes(Reporter):
    """Notes and steps of a command."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.steps: list[int] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def metrics(self, line: Any, steps: int) -> None:
        self.steps.append(line["step"])


def processes(home: Path) -> list[psutil.Process]:
    """Return the training processes of a study on the nodes."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        is_cell = line[-4:-2] == ["-m", "luthier.workflows.study.cells"] and line[-1] == "train"
        if is_cell and "--" not in line and line[-2].startswith(str(home)):
            found.append(process)
    return found


def started(process: psutil.Process) -> bool:
    return Path(process.cmdline()[-2], "metrics.jsonl").is_file()


def when(condition: Callable[[], Any], seconds: float = 900) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def run(recipe: Recipe, **options: Any) -> list[Any]:
    space = parse_dimensions(SPACE)
    found = study(recipe, grid_of(space, TRIALS), space, trials=TRIALS, **options)
    return [(row.name, row.reason or row.value) for row in found.rows]


def test_killed_workers_and_a_killed_node_change_no_trial(
    cluster: Cluster,
    recipe: Callable[..., Recipe],
    luthier_home: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    reporter = Notes()

    def kill() -> None:
        when(lambda: processes(luthier_home))[0].kill()
        # Before the first step, the worker may not be placed yet: a failure, not a lost node.
        pair = when(
            lambda: len(found := processes(luthier_home)) == 2 and started(found[1]) and found
        )
        raylet = pair[1].parent().parent()
        assert "raylet" in raylet.name()
        raylet.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    runner = RayCellRunner(cluster.address)
    found = run(recipe("spread"), reporter=reporter, runner=runner)
    killer.join()
    again = [note for note in reporter.notes if "resumes after its last checkpoint" in note]
    assert len(again) >= 2
    monkeypatch.setenv("LUTHIER_HOME", str(tmp_path / "alone"))
    assert run(recipe("alone"), parallel=2) == found
    cluster.wait_for(1)
    cluster.add_until(2)


def test_file_missing_on_node_is_reported(
    cluster: Cluster, recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "luthier.cluster.ray_commands._local_paths", lambda recipe: ["/nowhere/rows.jsonl"]
    )
    for _, reason in run(recipe("unseen"), runner=RayCellRunner(cluster.address)):
        assert "/nowhere/rows.jsonl" in reason


@pytest.fixture
def task(tmp_path: Path, tiny_model_folder: Path) -> GenerateTask:
    prompts = ({"prompt": f"say fox {n}", "id": n} for n in range(SHARDS * BLOCK_PROMPTS))
    source = tmp_path / "prompts.jsonl"
    source.write_text("".join(json.dumps(each) + "\n" for each in prompts))
    sampling = Sampling(max_tokens=48, temperature=0.7)
    return GenerateTask(model=str(tiny_model_folder), source=str(source), sampling=sampling)


def inference_process(output: Path, number: int) -> psutil.Process | None:
    """Return the process of batch inference on a node."""
    own = ["luthier.workflows.batch_inference", str(shards_folder(output)), f"process-{number}"]
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if "--" not in line and line[-3:] == own:  # and not the command that stands for it here
            return process
    return None


def answered(output: Path) -> int:
    return len([*shards_folder(output).glob("*.answers")])


def test_killed_ray_inference_resumes(cluster: Cluster, task: GenerateTask, tmp_path: Path) -> None:
    alone, spread = tmp_path / "alone.jsonl", tmp_path / "spread.jsonl"
    command = [
        sys.executable, "-m", "luthier", "generate", task.model, "--input", task.source,
        "--output", str(spread), "--max-tokens", "48", "--temperature", "0.7",
        "--ray-address", cluster.address, "--json",
    ]  # fmt: skip
    with subprocess.Popen(command) as process:
        when(lambda: answered(spread) >= 2)
        workers = [each for n in (1, 2) if (each := inference_process(spread, n))]
        process.kill()
    _, alive = psutil.wait_procs(workers, 60)
    assert not alive  # the next run repeats their unfinished prompts
    assert answered(spread) < SHARDS and not spread.exists()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    assert report["resumed_rows"] >= 2 * BLOCK_PROMPTS and report["rows"] == SHARDS * BLOCK_PROMPTS
    answer_file(task, alone, 1)
    assert spread.read_bytes() == alone.read_bytes()
    cluster.wait_for_idle(2)
