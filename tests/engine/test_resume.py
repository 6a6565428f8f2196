"""A killed and resumed run produces the same bits as an uninterrupted run.

Runs are separate processes and end with a real SIGKILL: from the test at a given number of lines in
``metrics.jsonl``, or from the process itself at a named point in the code. One pair of runs uses
``python -m luthier``; all other runs are forked (``forked_commands``).
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from killed_runs import (
    DIE,
    LINES,
    OFTEN,
    POINTS,
    SLOWLY,
    STEPS,
    STOP_AT_5,
    Forker,
    Outcome,
    checkpoints,
    leftovers,
    lines_of,
    outcome,
    same,
    wait_for_lines,
)


@pytest.mark.slow
def test_run_repeats_at_any_checkpoint_interval(
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


@pytest.mark.slow
def test_the_module_killed_and_resumed(
    real: Callable[..., subprocess.Popen[str]], unbroken: dict[str, Outcome], tmp_path: Path
) -> None:
    """``python -m luthier`` without changes: the first checkpoint is after step 10."""
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
    same(outcome(tmp_path), unbroken["lora"], forked=False)
    assert not leftovers(tmp_path)


@pytest.mark.parametrize(
    ("adaptation", "lines"),
    [
        ("lora", 5),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in (("full", 17), ("lora", 1), ("lora", 17), ("full", 5), ("bfloat16", 17))
        ),
    ],
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


@pytest.mark.slow
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
    """Return the number of metrics lines up to the newest checkpoint."""
    if not checkpoints(home):
        return 0
    state = json.loads((checkpoints(home)[-1] / "state.json").read_text())
    return int(state["progress"]["metrics_lines"])


def wait_for_cut(home: Path, lines: int) -> None:
    """Wait until the resumed run has truncated the file to ``lines`` or fewer lines."""
    end = time.monotonic() + 60
    while lines_of(home) >= lines and time.monotonic() < end:
        time.sleep(0.002)


@pytest.mark.slow
def test_the_best_weights_and_the_patience_survive_a_kill(
    forker: Forker, command: Callable[..., list[str]], tmp_path: Path
) -> None:
    """A run killed after the best measurement ends with the same weights as an uninterrupted run."""
    arguments = command(
        "full", "--set", "training.evaluate_every=1", "--set", "training.patience=7"
    )
    for letter in "AB":
        row = {"prompt": "say", "completion": f"{letter} " * 4}
        (tmp_path / f"{letter}.jsonl").write_text(f"{json.dumps(row)}\n" * 2)
    arguments[1] = str(tmp_path / "A.jsonl")
    arguments += ["--validation", str(tmp_path / "B.jsonl")]
    arguments[arguments.index("--learning-rate") + 1] = "0.05"
    arguments += ["--set", "training.schedule=constant", "--set", "training.warmup_ratio=0"]
    forker.start(tmp_path / "one", arguments).result()
    one = outcome(tmp_path / "one")
    best = one.metrics[-1]["best_step"]
    assert 0 < best < 25
    assert one.result["steps"] == best + 7
    home = tmp_path / "two"
    every_step = "from luthier.engine import checkpoints\n"
    every_step += "checkpoints.Checkpoints.due = lambda self, step, size: True\n"
    job = forker.start(home, arguments, every_step + SLOWLY.replace("0.01", "0.05"))
    wait_for_lines(home, 1 + 2 * (best + 4))
    job.send(signal.SIGKILL)
    assert best < int(checkpoints(home)[-1].name.removeprefix("step-")) < best + 7
    forker.start(home, [*arguments, "--resume"]).result()
    same(outcome(home), one)


ALWAYS = {"in the middle of writing the third checkpoint", "in the middle of storing"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "point",
    [pytest.param(each, marks=[] if each in ALWAYS else [pytest.mark.slow]) for each in POINTS],
)
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


@pytest.mark.parametrize(
    "number",
    [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)],
    ids=lambda s: s.name,
)
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
    assert error["message"].startswith(f"stopped after step {step} of {STEPS}")
    assert "--resume" in error["message"]
    assert [path.name for path in checkpoints(tmp_path)] == [f"step-{step:08d}"]
    resumed = forker.start(tmp_path, command("lora", "--resume"))
    resumed.result()
    same(outcome(tmp_path), unbroken["lora"])


@pytest.mark.slow
def test_a_run_without_a_name_is_found_again(
    forker: Forker,
    command: Callable[..., list[str]],
    unbroken: dict[str, Outcome],
    uneven_rows: Path,
    tmp_path: Path,
) -> None:
    """The same command with ``--resume`` resumes, as the message states."""
    arguments = command("lora")
    at = arguments.index("--name")
    del arguments[at : at + 2]
    arguments[1] = str(tmp_path / "My Rows.v2.jsonl")
    Path(arguments[1]).write_bytes(uneven_rows.read_bytes())
    home = tmp_path / "home"
    runs = home / "runs" / "tiny-llama"
    for taken in ("my-rows.v2-1", "my-rows.v2-2", "my-rows.v2-x", "my-rows-9"):
        (runs / taken).mkdir(parents=True)
    assert forker.start(home, arguments, SLOWLY + STOP_AT_5).wait() == 130
    (runs / "my-rows.v2-1").rmdir()  # a gap does not change the number
    job = forker.start(home, [*arguments, "--resume"])
    assert job.result()["model_id"] == "tiny-llama:my-rows.v2-3"
    manifest = home / "models" / "custom" / "tiny-llama" / "my-rows.v2-3" / "luthier.json"
    assert json.loads(manifest.read_text())["trained_weights_sha256"] == unbroken["lora"].weights


@pytest.mark.slow
def test_stopped_while_storing_leaves_no_half_model(
    forker: Forker,
    command: Callable[..., list[str]],
    unbroken: dict[str, Outcome],
    tmp_path: Path,
) -> None:
    point = POINTS["in the middle of storing"].replace("die()", "os.kill(os.getpid(), 2)")
    # Background shells ignore the interrupt, and children inherit that.
    heard = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    job = forker.start(tmp_path, command("lora"), OFTEN + DIE + heard + point)
    assert job.wait() == 130
    assert not (tmp_path / "models" / "custom" / "tiny-llama" / "x").exists()
    assert not [name for name in leftovers(tmp_path) if ".tmp-" in name]
    forker.start(tmp_path, command("lora", "--resume")).result()
    same(outcome(tmp_path), unbroken["lora"])


@pytest.mark.slow
def test_resume_of_finished_run_returns_result(
    forker: Forker, command: Callable[..., list[str]], tmp_path: Path
) -> None:
    """An existing name is rejected with a fitting message."""
    first = forker.start(tmp_path, command("full")).result()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert forker.start(tmp_path, command("full", "--resume")).result() == first
    message = forker.start(tmp_path, command("full")).refusal()
    assert "tiny-llama:x" in message
    assert "--resume" not in message
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before


@pytest.mark.slow
def test_changed_data_is_detected_at_resume(
    forker: Forker, command: Callable[..., list[str]], uneven_rows: Path, tmp_path: Path
) -> None:
    arguments = command("lora")
    arguments[1] = str(tmp_path / "rows.jsonl")
    Path(arguments[1]).write_bytes(uneven_rows.read_bytes())
    home = tmp_path / "home"
    job = forker.start(home, arguments, SLOWLY)
    wait_for_lines(home, 5)
    job.send(signal.SIGKILL)
    Path(arguments[1]).write_bytes(uneven_rows.read_bytes().replace(b"fox", b"cat", 1))
    message = forker.start(home, [*arguments, "--resume"]).refusal()
    assert arguments[1] in message


@pytest.mark.slow
def test_resume_without_run_starts(
    forker: Forker,
    command: Callable[..., list[str]],
    unbroken: dict[str, Outcome],
    tmp_path: Path,
) -> None:
    forker.start(tmp_path, command("lora", "--resume")).result()
    same(outcome(tmp_path), unbroken["lora"])


@pytest.mark.slow
def test_second_process_cannot_acquire_run(
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
