"""Changes before a resume: damaged checkpoints, less memory, another recipe.

Every test starts with a copy of one store, whose run was killed with two checkpoints.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from killed_runs import (
    OFTEN,
    SLOWLY,
    Forker,
    Outcome,
    checkpoints,
    leftovers,
    outcome,
    same,
    wait_for_lines,
)


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
    """Store of a run that was killed with two checkpoints; tests use copies."""
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


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        flip,
        pytest.param(lose, marks=pytest.mark.slow),
        pytest.param(garble, marks=pytest.mark.slow),
        other_fields,
    ],
)
def test_damaged_checkpoint_falls_back_to_previous_checkpoint(
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


def test_all_checkpoints_damaged_is_an_error(
    forker: Forker, command: Callable[..., list[str]], interrupted: Path
) -> None:
    """The run must not silently start from the beginning."""
    for path in checkpoints(interrupted):
        flip(path)
    job = forker.start(interrupted, command("lora", "--resume"))
    assert job.wait() == 1
    assert json.loads(job.stdout.read_text())["error"]["type"] == "CorruptFile"
    assert "none of the 2 checkpoints" in job.stderr.read_text()


@pytest.mark.slow
def test_less_memory_on_resume_does_not_change_the_result(
    forker: Forker,
    command: Callable[..., list[str]],
    unbroken: dict[str, Outcome],
    interrupted: Path,
) -> None:
    """Micro-batches are part of the arithmetic: a resumed run keeps the original size."""
    less = "from luthier.engine import defaults\ndefaults.token_budget = lambda *_: (120, 'less')"
    job = forker.start(interrupted, command("lora", "--resume"), less)
    job.result()
    same(outcome(interrupted), unbroken["lora"])


def test_a_resumed_run_must_be_the_same(
    forker: Forker,
    command: Callable[..., list[str]],
    interrupted: Path,
    uneven_rows: Path,
    tmp_path: Path,
) -> None:
    before = sorted(interrupted.rglob("*"))
    rate = ["--learning-rate", "0.004", "--resume"]
    message = forker.start(interrupted, command("lora", *rate)).refusal()
    assert "recipe.training.learning_rate changed from 0.003 to 0.004" in message
    assert "--name" in message
    message = forker.start(interrupted, command("lora")).refusal()
    assert "unfinished run tiny-llama:x" in message
    assert "`resume`" in message
    arguments = command("lora", "--resume")
    arguments[1] = str(tmp_path / "other.jsonl")
    Path(arguments[1]).write_bytes(uneven_rows.read_bytes())
    message = forker.start(interrupted, arguments).refusal()
    assert "recipe.data.train changed from" in message
    assert sorted(interrupted.rglob("*")) == before
