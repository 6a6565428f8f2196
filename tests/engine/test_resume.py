"""A run that is killed and resumed gives the same bits as one that was never interrupted.

Runs are processes of their own and die by a real SIGKILL: sent from here when ``metrics.jsonl`` has
so many lines, or by the process to itself at a named point in the code. One pair of runs is
``python -m luthier``; the others are forked from a process that has imported everything and has
computed nothing with it, which saves the seconds of importing torch for each.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

STEPS = 32
VALIDATIONS = 9  # one before the first step, then every fourth step
LINES = STEPS + VALIDATIONS
TIMING = ("seconds", "tokens_per_second", "memory_bytes")
PICTURES = ("loss.svg", "loss.png")  # a drawing names its date
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

FORKER = """
import json, os, pathlib, sys, tempfile, traceback
import luthier.cli.tuning, luthier.engine.train, luthier.models.load, luthier.store.models
import matplotlib.pyplot, peft, transformers.models.llama.modeling_llama
from transformers import AutoModelForCausalLM, AutoTokenizer
from luthier.cli.app import main
from luthier.engine.metrics import draw_loss_curve
with tempfile.TemporaryDirectory() as folder:  # loads fonts
    draw_loss_curve([{"event": "train", "step": 1, "loss": 1.0}], pathlib.Path(folder), "x")
print("ready", flush=True)
for line in sys.stdin:
    job = json.loads(line)
    if "wait" in job:
        status = os.waitpid(job["wait"], 0)[1]
        print(os.waitstatus_to_exitcode(status), flush=True)
        continue
    pid = os.fork()
    if pid:
        print(pid, flush=True)
        continue
    code = 70
    try:
        for number, path in ((1, job["stdout"]), (2, job["stderr"])):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o644), number)
        os.environ["LUTHIER_HOME"] = job["home"]
        sys.argv = ["luthier", *job["arguments"]]
        exec(job["before"])
        main()
        code = 0
    except SystemExit as error:
        code = error.code or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)
"""
OFTEN = """
from luthier.engine import checkpoints, storing, train
from luthier.engine.metrics import MetricsFile
checkpoints.Checkpoints.due = lambda self, step: step % 5 == 0
"""
SLOWLY = """
import time
from luthier.engine.metrics import MetricsFile
append = MetricsFile.append
def slow_append(self, values):
    time.sleep(0.01)
    return append(self, values)
MetricsFile.append = slow_append
"""
STOP_AT_5 = """
import os, signal
from luthier.engine.loop import Loop
step = Loop._step
def stop(self):
    step(self)
    if self.progress.step == 5:
        os.kill(os.getpid(), signal.SIGINT)
Loop._step = stop
"""
DIE = """
import os, signal
def die(*arguments, **keywords):
    os.kill(os.getpid(), signal.SIGKILL)
"""
POINTS = {
    "in the middle of writing the first checkpoint": """
def half(tensors, path):
    path.write_bytes(b"half a file")
    die()
checkpoints.save_tensors = half
""",
    "in the middle of writing the third checkpoint": """
save_tensors = checkpoints.save_tensors
def half(tensors, path):
    save_tensors(tensors, path)
    if len(list(path.parent.parent.glob("step-*"))) == 2:
        path.write_bytes(path.read_bytes()[:1000])
        die()
checkpoints.save_tensors = half
""",
    "while an old checkpoint is removed": """
import shutil
shutil.rmtree = die
""",
    "before the curve is drawn": "storing.draw_curves = die",
    "in the middle of storing": """
save = storing.save_adapter
def half(*arguments):
    save(*arguments)
    die()
storing.save_adapter = half
""",
    "in the parity gate": "storing.Parity = die",
    "after storing, before the result is recorded": "train.Run.finish = die",
    "after the result is recorded": """
from luthier.engine import runs
runs.shutil.rmtree = die
checkpoints._remove = lambda path: None
""",
}


@dataclass
class Job:
    """One process that tunes."""

    forker: Forker
    pid: int
    home: Path
    stdout: Path
    stderr: Path

    def wait(self) -> int:
        return int(self.forker.ask({"wait": self.pid}))

    def send(self, number: signal.Signals) -> int:
        """Signal the process and return how it ended."""
        os.kill(self.pid, number)
        return self.wait()

    def result(self) -> dict[str, Any]:
        code = self.wait()
        assert code == 0, self.stderr.read_text()
        return dict(json.loads(self.stdout.read_text()))

    def refusal(self) -> str:
        assert self.wait() == 2, self.stderr.read_text()
        error = json.loads(self.stdout.read_text())["error"]
        return str(error["message"])


class Forker:
    """The process that all runs are forked from."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.jobs = 0
        self.process = subprocess.Popen(
            [sys.executable, "-c", FORKER],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, **ENVIRONMENT}, start_new_session=True,
        )  # fmt: skip
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()

    def ask(self, job: dict[str, Any]) -> str:
        assert self.process.stdin
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return self._line()

    def start(self, home: Path, arguments: list[str], before: str = "") -> Job:
        self.jobs += 1
        stdout, stderr = (self.folder / f"{self.jobs}.{name}" for name in ("out", "err"))
        job = {"home": str(home), "arguments": arguments, "before": before}
        pid = int(self.ask({**job, "stdout": str(stdout), "stderr": str(stderr)}))
        return Job(self, pid, home, stdout, stderr)

    def close(self) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(10)


@pytest.fixture(scope="module")
def forker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forker]:
    made = Forker(tmp_path_factory.mktemp("forker"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of very different lengths, so that order and batches matter."""
    words = [
        "the",
        "quick",
        "brown",
        "fox",
        "jumps",
        "over",
        "a",
        "lazy",
        "dog",
        "and",
        "my",
        "new",
        "card",
    ]
    lines = []
    for index in range(40):
        said = " ".join(words[(index * 7 + k) % len(words)] for k in range(1 + index % 9))
        lines.append(json.dumps({"prompt": f"say {said}", "completion": said.upper()}))
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def command(rows: Path, tiny_model_folder: Path) -> Callable[..., list[str]]:
    """``command("lora")`` is the command line of a run, with dropout where there is any.

    ``bfloat16`` is full tuning in that type, where weights and their masters are two things.
    """

    def build(adaptation: str, *more: str) -> list[str]:
        settings = {
            "training.max_steps": STEPS,
            "training.evaluate_every": 4,
            "training.patience": 0,
            "training.precision": "float32",
            "training.weight_decay": 0.1,
        }
        if adaptation == "bfloat16":
            settings["training.precision"], adaptation = "bfloat16", "full"
        if adaptation == "lora":
            settings |= {"adaptation.rank": 4, "adaptation.dropout": 0.2}
        arguments = ["tune", str(rows), "--base", str(tiny_model_folder), "--name", "x", "--json"]
        arguments += ["--adaptation", adaptation, "--batch-size", "6", "--learning-rate", "0.003"]
        for name, value in settings.items():
            arguments += ["--set", f"{name}={value}"]
        return [*arguments, *more]

    return build


@dataclass(frozen=True)
class Outcome:
    """All that a run leaves, but for time and memory."""

    manifest: dict[str, Any]
    weights: str
    files: dict[str, str]
    metrics: list[dict[str, Any]]
    result: dict[str, Any]


def outcome(home: Path) -> Outcome:
    run, model = home / "runs" / "tiny-llama" / "x", home / "models" / "custom" / "tiny-llama" / "x"
    manifest = json.loads((model / "luthier.json").read_text())
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((run / "result.json").read_text())
    return Outcome(
        manifest,
        manifest["trained_weights_sha256"],
        {name: value for name, value in manifest["files"].items() if name not in PICTURES},
        [{key: v for key, v in line.items() if key not in TIMING} for line in metrics],
        {
            key: value
            for key, value in result.items()
            if key not in (*TIMING, "peak_memory_bytes", "run_dir", "model_dir")
        },
    )


def same(one: Outcome, other: Outcome) -> None:
    assert one.metrics == other.metrics
    assert one.weights == other.weights
    assert one.files == other.files
    assert one.result == other.result
    assert one.manifest["parity"] == other.manifest["parity"]


def leftovers(home: Path) -> list[str]:
    """Remains of writing that nothing reads, and checkpoints of a run that is done."""
    names = [path.relative_to(home).as_posix() for path in home.rglob("*")]
    return [name for name in names if ".tmp-" in name or "checkpoints" in name]


def lines_of(home: Path) -> int:
    path = home / "runs" / "tiny-llama" / "x" / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for_lines(home: Path, count: int, alive: Callable[[], bool] = lambda: True) -> None:
    end = time.monotonic() + 60
    while lines_of(home) < count:
        assert time.monotonic() < end, f"only {lines_of(home)} lines after a minute"
        assert alive()
        time.sleep(0.002)


def checkpoints(home: Path) -> list[Path]:
    return sorted((home / "runs" / "tiny-llama" / "x" / "checkpoints").glob("step-*"))


@pytest.fixture(scope="module")
def real(
    command: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., subprocess.Popen[str]]:
    """Start ``python -m luthier``."""

    def start(home: Path, *more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "luthier", *command("lora", *more)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, **ENVIRONMENT, "LUTHIER_HOME": str(home)},
        )  # fmt: skip

    return start


@pytest.fixture(scope="module")
def unbroken(
    real: Callable[..., subprocess.Popen[str]],
    forker: Forker,
    command: Callable[..., list[str]],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Outcome]:
    """What runs leave that are not interrupted."""
    homes = {name: tmp_path_factory.mktemp(name) for name in ("lora", "full", "bfloat16")}
    process = real(homes["lora"])
    for name in ("full", "bfloat16"):
        forker.start(homes[name], command(name)).result()
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert json.loads(out)["steps"] == STEPS
    made = {name: outcome(home) for name, home in homes.items()}
    for name, home in homes.items():
        assert not leftovers(home)
        assert len(made[name].metrics) == LINES
    assert len({one.weights for one in made.values()}) == 3
    return made


def test_a_run_repeats_itself_whatever_the_checkpoints(
    forker: Forker,
    command: Callable[..., list[str]],
    unbroken: dict[str, Outcome],
    tmp_path: Path,
) -> None:
    """Without this, equality after a kill would prove nothing. Dropout must matter, too."""
    job = forker.start(tmp_path / "often", command("lora"), OFTEN)
    job.result()
    same(outcome(job.home), unbroken["lora"])
    plain = forker.start(tmp_path / "plain", command("lora", "--set", "adaptation.dropout=0"))
    plain.result()
    assert outcome(plain.home).weights != unbroken["lora"].weights


def test_the_module_killed_and_resumed(
    real: Callable[..., subprocess.Popen[str]], unbroken: dict[str, Outcome], tmp_path: Path
) -> None:
    """``python -m luthier``, nothing changed in it: the first checkpoint is after step 10."""
    process = real(tmp_path)
    wait_for_lines(tmp_path, 16, lambda: process.poll() is None)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000010"]
    assert not (tmp_path / "models").exists()
    process = real(tmp_path, "--resume")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert json.loads(out)["model_id"] == "tiny-llama:x"
    same(outcome(tmp_path), unbroken["lora"])
    assert not leftovers(tmp_path)


@pytest.mark.parametrize(
    ("adaptation", "lines"),
    [("lora", 1), ("lora", 5), ("lora", 17), ("full", 5), ("full", 17), ("bfloat16", 17)],
)
def test_killed_from_outside(
    forker: Forker,
    command: Callable[..., list[str]],
    unbroken: dict[str, Outcome],
    tmp_path: Path,
    adaptation: str,
    lines: int,
) -> None:
    """Before the first step, before the first checkpoint, and between checkpoints."""
    job = forker.start(tmp_path, command(adaptation), OFTEN + SLOWLY)
    wait_for_lines(tmp_path, lines)
    assert job.send(signal.SIGKILL) == -signal.SIGKILL
    assert lines_of(tmp_path) < LINES
    assert bool(checkpoints(tmp_path)) == (lines > 5)
    forker.start(tmp_path, command(adaptation, "--resume"), OFTEN).result()
    same(outcome(tmp_path), unbroken[adaptation])
    assert not leftovers(tmp_path)


@pytest.mark.parametrize("adaptation", ["lora", "full"])
def test_killed_again_and_again(
    forker: Forker,
    command: Callable[..., list[str]],
    unbroken: dict[str, Outcome],
    tmp_path: Path,
    adaptation: str,
) -> None:
    for more in (4, 9, 11, 2):  # the last kill comes before the next checkpoint
        lines = recorded(tmp_path) + more
        job = forker.start(tmp_path, command(adaptation, "--resume"), OFTEN + SLOWLY)
        wait_for_cut(tmp_path, lines)
        wait_for_lines(tmp_path, lines)
        assert job.send(signal.SIGKILL) == -signal.SIGKILL
    assert recorded(tmp_path) > 9
    forker.start(tmp_path, command(adaptation, "--resume")).result()
    same(outcome(tmp_path), unbroken[adaptation])
    assert not leftovers(tmp_path)


def recorded(home: Path) -> int:
    """Lines that belong to the newest checkpoint."""
    if not checkpoints(home):
        return 0
    state = json.loads((checkpoints(home)[-1] / "state.json").read_text())
    return int(state["progress"]["metrics_lines"])


def wait_for_cut(home: Path, lines: int) -> None:
    """Wait until the resumed run has cut the file, which may be longer than ``lines`` before."""
    end = time.monotonic() + 60
    while lines_of(home) >= lines and time.monotonic() < end:
        time.sleep(0.002)


def test_the_best_weights_and_the_patience_survive_a_kill(
    forker: Forker, command: Callable[..., list[str]], tmp_path: Path
) -> None:
    """Killed after the best measurement, the run still ends where it would have, with those weights."""
    arguments = command(
        "full", "--set", "training.evaluate_every=1", "--set", "training.patience=7"
    )
    for letter in "AB":
        row = {"prompt": "say", "completion": f"{letter} " * 4}
        (tmp_path / f"{letter}.jsonl").write_text(f"{json.dumps(row)}\n" * 2)
    arguments[1] = str(tmp_path / "A.jsonl")
    arguments += ["--validation", str(tmp_path / "B.jsonl")]
    arguments[arguments.index("--learning-rate") + 1] = "0.05"
    arguments += ["--set", "training.schedule=constant", "--set", "training.warmup_share=0"]
    forker.start(tmp_path / "one", arguments).result()
    one = outcome(tmp_path / "one")
    best = one.metrics[-1]["best_step"]
    assert 0 < best < 25
    assert one.result["steps"] == best + 7
    home = tmp_path / "two"
    every_step = "from luthier.engine import checkpoints\n"
    every_step += "checkpoints.Checkpoints.due = lambda self, step: True\n"
    job = forker.start(home, arguments, every_step + SLOWLY.replace("0.01", "0.05"))
    wait_for_lines(home, 1 + 2 * (best + 4))
    job.send(signal.SIGKILL)
    assert best < int(checkpoints(home)[-1].name.removeprefix("step-")) < best + 7
    forker.start(home, [*arguments, "--resume"]).result()
    same(outcome(home), one)


@pytest.mark.parametrize("point", POINTS)
def test_killed_at(
    forker: Forker,
    command: Callable[..., list[str]],
    unbroken: dict[str, Outcome],
    tmp_path: Path,
    point: str,
) -> None:
    job = forker.start(tmp_path, command("lora"), OFTEN + DIE + POINTS[point])
    assert job.wait() == -signal.SIGKILL, job.stderr.read_text()
    stored = tmp_path / "models" / "custom" / "tiny-llama" / "x"
    assert stored.exists() == point.startswith("after")
    forker.start(tmp_path, command("lora", "--resume"), OFTEN).result()
    same(outcome(tmp_path), unbroken["lora"])
    assert not [name for name in leftovers(tmp_path) if "checkpoints" not in name]
    if point != "after the result is recorded":
        assert not leftovers(tmp_path)


def truncate(path: Path) -> None:
    file = path / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def flip(path: Path) -> None:
    file = path / "tensors.safetensors"
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)


def lose(path: Path) -> None:
    (path / "tensors.safetensors").unlink()


def garble(path: Path) -> None:
    (path / "state.json").write_text('{"progress": {"step": 1')


def other_fields(path: Path) -> None:
    (path / "state.json").write_text('{"progress": {"stepp": 1}, "sha256": {}}')


@pytest.fixture(scope="module")
def killed(
    forker: Forker, command: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The store of a run that was killed when it had two checkpoints. To be copied."""
    home = tmp_path_factory.mktemp("killed")
    job = forker.start(home, command("lora"), OFTEN + SLOWLY)
    wait_for_lines(home, 22)
    job.send(signal.SIGKILL)
    assert len(checkpoints(home)) == 2
    return home


@pytest.fixture
def interrupted(killed: Path, tmp_path: Path) -> Path:
    import shutil

    return shutil.copytree(killed, tmp_path / "interrupted")


@pytest.mark.parametrize("damage", [truncate, flip, lose, garble, other_fields])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    forker: Forker,
    command: Callable[..., list[str]],
    unbroken: dict[str, Outcome],
    interrupted: Path,
    damage: Callable[[Path], None],
) -> None:
    newest = checkpoints(interrupted)[-1]
    damage(newest)
    job = forker.start(interrupted, command("lora", "--resume"), OFTEN)
    job.result()
    assert f"checkpoint {newest.name} is damaged" in job.stderr.read_text()
    same(outcome(interrupted), unbroken["lora"])
    assert not leftovers(interrupted)


def test_checkpoints_that_are_all_damaged_are_an_error(
    forker: Forker, command: Callable[..., list[str]], interrupted: Path
) -> None:
    """Not a silent start from the beginning."""
    for path in checkpoints(interrupted):
        flip(path)
    job = forker.start(interrupted, command("lora", "--resume"))
    assert job.wait() == 1
    assert json.loads(job.stdout.read_text())["error"]["type"] == "CorruptFile"
    assert "none of the 2 checkpoints" in job.stderr.read_text()


def test_less_memory_on_resume_does_not_change_the_result(
    forker: Forker,
    command: Callable[..., list[str]],
    unbroken: dict[str, Outcome],
    interrupted: Path,
) -> None:
    """Micro-batches are part of the arithmetic: a resumed run keeps those it began with."""
    less = "from luthier.engine import defaults\ndefaults.token_budget = lambda *_: (120, 'less')"
    job = forker.start(interrupted, command("lora", "--resume"), less)
    job.result()
    same(outcome(interrupted), unbroken["lora"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_stopped_by_the_user(
    forker: Forker,
    command: Callable[..., list[str]],
    unbroken: dict[str, Outcome],
    tmp_path: Path,
    number: signal.Signals,
) -> None:
    job = forker.start(tmp_path, command("lora"), SLOWLY)
    wait_for_lines(tmp_path, 7)
    assert job.send(number) == 130
    error = json.loads(job.stdout.read_text())["error"]
    assert error["type"] == "Interrupted"
    step = int(error["message"].split()[3])
    assert error["message"].startswith(f"stopped after step {step} of {STEPS};")
    assert "--resume" in error["message"]
    assert [path.name for path in checkpoints(tmp_path)] == [f"step-{step:08d}"]
    resumed = forker.start(tmp_path, command("lora", "--resume"))
    resumed.result()
    same(outcome(tmp_path), unbroken["lora"])


def test_a_run_without_a_name_is_found_again(
    forker: Forker,
    command: Callable[..., list[str]],
    unbroken: dict[str, Outcome],
    rows: Path,
    tmp_path: Path,
) -> None:
    """The same command with ``--resume`` goes on, as the message says."""
    arguments = command("lora")
    at = arguments.index("--name")
    del arguments[at : at + 2]
    arguments[1] = str(tmp_path / "My Rows.v2.jsonl")
    Path(arguments[1]).write_bytes(rows.read_bytes())
    home = tmp_path / "home"
    runs = home / "runs" / "tiny-llama"
    for taken in ("my-rows.v2-1", "my-rows.v2-2", "my-rows.v2-x", "my-rows-9"):
        (runs / taken).mkdir(parents=True)
    assert forker.start(home, arguments, SLOWLY + STOP_AT_5).wait() == 130
    (runs / "my-rows.v2-1").rmdir()  # a gap is no reason to start anew
    job = forker.start(home, [*arguments, "--resume"])
    assert job.result()["model_id"] == "tiny-llama:my-rows.v2-3"
    manifest = home / "models" / "custom" / "tiny-llama" / "my-rows.v2-3" / "luthier.json"
    assert json.loads(manifest.read_text())["trained_weights_sha256"] == unbroken["lora"].weights


def test_stopped_while_storing_leaves_no_half_model(
    forker: Forker,
    command: Callable[..., list[str]],
    unbroken: dict[str, Outcome],
    tmp_path: Path,
) -> None:
    point = POINTS["in the middle of storing"].replace("die()", "os.kill(os.getpid(), 2)")
    # Whoever runs the tests in the background has the interrupt ignored, and children inherit that.
    heard = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    job = forker.start(tmp_path, command("lora"), OFTEN + DIE + heard + point)
    assert job.wait() == 130
    assert not (tmp_path / "models" / "custom" / "tiny-llama" / "x").exists()
    assert not [name for name in leftovers(tmp_path) if ".tmp-" in name]
    forker.start(tmp_path, command("lora", "--resume")).result()
    same(outcome(tmp_path), unbroken["lora"])


def test_resuming_a_finished_run_returns_its_result(
    forker: Forker, command: Callable[..., list[str]], tmp_path: Path
) -> None:
    """And a name that is taken is refused, in words that fit."""
    first = forker.start(tmp_path, command("full")).result()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert forker.start(tmp_path, command("full", "--resume")).result() == first
    message = forker.start(tmp_path, command("full")).refusal()
    assert "there is a finished run tiny-llama:x already" in message
    assert "--resume" not in message
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before


def test_a_resumed_run_must_be_the_same(
    forker: Forker, command: Callable[..., list[str]], interrupted: Path, rows: Path, tmp_path: Path
) -> None:
    before = sorted(interrupted.rglob("*"))
    rate = ["--learning-rate", "0.004", "--resume"]
    message = forker.start(interrupted, command("lora", *rate)).refusal()
    assert "recipe.training.learning_rate was 0.003, is 0.004" in message
    assert "choose another --name" in message
    message = forker.start(interrupted, command("lora")).refusal()
    assert "unfinished run tiny-llama:x" in message
    assert "--resume goes on with it" in message
    arguments = command("lora", "--resume")
    arguments[1] = str(tmp_path / "other.jsonl")
    Path(arguments[1]).write_bytes(rows.read_bytes())
    message = forker.start(interrupted, arguments).refusal()
    assert "recipe.data.train was" in message
    assert sorted(interrupted.rglob("*")) == before


def test_data_that_changed_under_the_run_is_noticed(
    forker: Forker, command: Callable[..., list[str]], rows: Path, tmp_path: Path
) -> None:
    arguments = command("lora")
    arguments[1] = str(tmp_path / "rows.jsonl")
    Path(arguments[1]).write_bytes(rows.read_bytes())
    home = tmp_path / "home"
    job = forker.start(home, arguments, SLOWLY)
    wait_for_lines(home, 5)
    job.send(signal.SIGKILL)
    Path(arguments[1]).write_bytes(rows.read_bytes().replace(b"fox", b"cat", 1))
    message = forker.start(home, [*arguments, "--resume"]).refusal()
    assert "cannot be resumed" in message
    assert "rows.jsonl was" in message


def test_resume_of_nothing_starts(
    forker: Forker,
    command: Callable[..., list[str]],
    unbroken: dict[str, Outcome],
    tmp_path: Path,
) -> None:
    forker.start(tmp_path, command("lora", "--resume")).result()
    same(outcome(tmp_path), unbroken["lora"])


def test_two_processes_do_not_work_on_one_run(
    forker: Forker, command: Callable[..., list[str]], tmp_path: Path
) -> None:
    job = forker.start(tmp_path, command("lora"), SLOWLY.replace("0.01", "0.2"))
    wait_for_lines(tmp_path, 2)
    for arguments in (
        command("lora"),
        command("lora", "--resume"),
        ["models", "remove", "tiny-llama:x", "--json"],
    ):
        message = forker.start(tmp_path, arguments).refusal()
        assert message == "another process is working on tiny-llama:x now"
    with contextlib.suppress(ProcessLookupError):
        assert job.send(signal.SIGKILL) == -signal.SIGKILL
    removed = forker.start(tmp_path, ["models", "remove", "tiny-llama:x", "--json"]).result()
    assert removed == {"id": "tiny-llama:x", "removed": True}
    assert not (tmp_path / "runs" / "tiny-llama" / "x").exists()
