"""Checkpoints: atomic, verified when read, with one spare."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from luthier import files
from luthier.engine import checkpoints
from luthier.engine.checkpoints import (
    Checkpoints,
    TrainingProgress,
    fingerprint,
)
from luthier.errors import CorruptFile

Damage = Callable[[Path], object]


def tensors_of(step: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(step)
    return {
        "master.w": torch.randn(4, 3),
        "best.w": torch.randn(4, 3).bfloat16(),
        "step.w": torch.tensor(float(step)),
        "turned": torch.randn(3, 5).t(),
    }


def write(kept: Checkpoints, *steps: int) -> Path:
    path = kept.folder
    for step in steps:
        path = kept.write(TrainingProgress(step=step, tokens=7 * step), tensors_of(step))
    return path


def newest(folder: Path) -> int | None:
    """Return the step of the newest valid checkpoint, after comparing the tensors bit by bit."""
    found = Checkpoints(folder).latest()
    if found is None:
        return None
    progress, tensors = found
    expected = tensors_of(progress.step)
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name
    return progress.step


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_checkpoint_round_trip(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path)
    progress = TrainingProgress(
        step=3,
        tokens=120,
        rows=9,
        seconds=1.5,
        first_loss=2.5,
        last_loss=0.1 + 0.2,
        best_loss=1e-17,
        best_step=2,
        worse=1,
        validation_loss=1 / 3,
        metrics_lines=5,
    )
    kept.write(progress, tensors_of(3))
    found = Checkpoints(tmp_path).latest()
    assert found is not None and found[0] == progress
    assert newest(tmp_path) == 3


def test_empty_and_missing_folders_have_no_checkpoint(tmp_path: Path) -> None:
    assert newest(tmp_path) is None
    assert newest(tmp_path / "not" / "there") is None


def test_two_newest_checkpoints_remain(tmp_path: Path) -> None:
    write(Checkpoints(tmp_path), 10, 20, 30, 1000)
    assert names(tmp_path) == ["step-00000030", "step-00001000"]
    assert newest(tmp_path) == 1000


class PowerCut(BaseException):
    """Stands for the end of the process."""


def fails(*_: Any, **__: Any) -> None:
    raise PowerCut


@pytest.mark.parametrize(
    ("module", "function"),
    [
        (checkpoints, "save_tensors"),
        (checkpoints, "sha256_of"),
        (checkpoints, "write_json"),
        (files, "_sync_folder"),
    ],
)
@pytest.mark.parametrize("cleaned", [True, False])
def test_crash_while_writing_leaves_no_checkpoint(
    module: Any, function: str, cleaned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Checkpoints(tmp_path)
    write(kept, 10)
    with monkeypatch.context() as patch:
        patch.setattr(module, function, fails)
        if not cleaned:
            patch.setattr(files.shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(PowerCut):
            write(kept, 20)
    left = [name for name in names(tmp_path) if name != "step-00000010"]
    assert len(left) == (0 if cleaned else 1) and all(name.startswith(".tmp-") for name in left)
    assert newest(tmp_path) == 10
    assert names(tmp_path) == ["step-00000010"]
    write(Checkpoints(tmp_path), 20)
    assert newest(tmp_path) == 20


def flip_a_bit(path: Path) -> None:
    file = path / "tensors.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


DAMAGES: dict[str, Damage] = {
    "one bit is flipped": flip_a_bit,
    "the tensors are cut short": lambda p: (p / "tensors.safetensors").write_bytes(b"\x08\0\0"),
    "the tensors are gone": lambda p: (p / "tensors.safetensors").unlink(),
    "the state is gone": lambda p: (p / "state.json").unlink(),
    "the state is cut short": lambda p: (p / "state.json").write_text('{"progress": {'),
    "the state is a list": lambda p: (p / "state.json").write_text("[]"),
    "the state is of another program": lambda p: (p / "state.json").write_text(
        json.dumps({"progress": {"epoch": 1}, "sha256": {}})
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(Checkpoints(tmp_path), 10, 20)
    DAMAGES[damage](path)
    with caplog.at_level(logging.WARNING):
        assert newest(tmp_path) == 10
    assert "step-00000020 is damaged and was skipped" in caplog.text


@pytest.mark.parametrize("damage", DAMAGES)
def test_only_damaged_checkpoints_is_an_error(damage: str, tmp_path: Path) -> None:
    write(Checkpoints(tmp_path), 10, 20)
    for path in tmp_path.iterdir():
        DAMAGES[damage](path)
    with pytest.raises(CorruptFile) as refused:
        Checkpoints(tmp_path).latest()
    assert refused.value.rule == "checkpoint.none_readable"


def test_damaged_checkpoint_does_not_replace_good_checkpoint(tmp_path: Path) -> None:
    flip_a_bit(write(Checkpoints(tmp_path), 10, 20))
    resumed = Checkpoints(tmp_path)
    write(resumed, 12, 14)
    assert names(tmp_path) == ["step-00000012", "step-00000014"]
    flip_a_bit(tmp_path / "step-00000014")
    assert newest(tmp_path) == 12


def test_the_first_is_read_back_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = iter(["as written", "as read"])
    monkeypatch.setattr(checkpoints, "sha256_of", lambda path: next(hashes))
    with pytest.raises(CorruptFile) as refused:
        write(Checkpoints(tmp_path), 10)
    assert refused.value.rule == "checkpoint.differs"


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(checkpoints, "time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


def test_first_checkpoint_after_10_steps_or_45_seconds(tmp_path: Path, clock: Clock) -> None:
    kept = Checkpoints(tmp_path)
    assert [step for step in range(1, 13) if kept.due(step, 0)] == [10, 11, 12]
    clock.now += 44
    assert not kept.due(1, 0)
    clock.now += 1
    assert kept.due(1, 0)


def test_large_first_checkpoint_waits_for_tenth_of_time(tmp_path: Path, clock: Clock) -> None:
    kept, seconds = Checkpoints(tmp_path), 3
    size = int(seconds * checkpoints.FIRST_BYTES_PER_SECOND)
    clock.now += 29
    assert not kept.due(10, size)
    clock.now += 2
    assert kept.due(10, size) and not kept.due(9, size)
    clock.now += 14
    assert kept.due(9, size)
    clock.now += 1  # what takes longer than all of it waits no longer
    assert kept.due(10, 1000 * size)


@pytest.mark.parametrize(("cost", "wait"), [(0.01, 10), (0.2, 10), (1.0, 50), (3.0, 150)])
def test_later_checkpoints_take_at_most_a_fiftieth_of_time(
    cost: float, wait: float, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_json = checkpoints.write_json

    def slow(path: Path, value: Any) -> None:
        clock.now += cost
        write_json(path, value)

    monkeypatch.setattr(checkpoints, "write_json", slow)
    kept = Checkpoints(tmp_path)
    write(kept, 10)
    clock.now += wait - 0.5
    assert not kept.due(11, 0) and not kept.due(10_000, 0)
    clock.now += 1
    assert kept.due(11, 0)


def test_a_fingerprint_is_of_names_and_bits() -> None:
    one = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0]).bfloat16()}
    assert fingerprint(one) == fingerprint(dict(reversed(one.items())))
    others = [
        {"a": one["a"], "c": one["b"]},
        {"a": torch.tensor([1.0, 2.0000002]), "b": one["b"]},
        {"a": torch.tensor([-1.0, 2.0]), "b": one["b"]},
        {"a": one["a"]},
    ]
    assert len({fingerprint(tensors) for tensors in [one, *others]}) == 5
    negative_zero = {"a": torch.tensor([-0.0])}
    assert fingerprint(negative_zero) != fingerprint({"a": torch.tensor([0.0])})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fingerprint_covers_all_bits(dtype: torch.dtype) -> None:
    weights = {
        "gamma": torch.ones((), dtype=dtype),
        "w": torch.arange(6, dtype=dtype).view(2, 3).t(),
    }
    same = {
        name: weight.clone(memory_format=torch.contiguous_format)
        for name, weight in weights.items()
    }
    assert fingerprint(weights) == fingerprint(same)
    same["gamma"] += 2**-7
    assert fingerprint(weights) != fingerprint(same)
