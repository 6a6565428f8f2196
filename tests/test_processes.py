"""Tests of several processes against one: objectives, kills, errors, launchers."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from forked_commands import Command
from shared_training import train_each

from luthier.adaptations import ADAPTATIONS
from luthier.models.process_group import ALONE
from luthier.objectives import OBJECTIVES
from test_pairs import FAMILIES, IMAGES, refused

SCRIPT = Path(__file__).parent / "plugins" / "shared_training.py"


def run_group(size: int, command: list[str], folder: Path, timeout: float = 300) -> None:
    """Run the script with ``command`` in each process of a group; fail if any process fails."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"}
    logs = [(folder / f"{size}-{rank}.log").open("wb") for rank in range(size)]
    script = f"import runpy\nrunpy.run_path({str(SCRIPT)!r}, run_name='__main__')\nraise SystemExit"
    processes = [
        Command(
            *command,
            before=script,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=log,
            stderr=log,
        )
        for rank, log in enumerate(logs)
    ]
    try:
        statuses = [process.wait(timeout) for process in processes]
        words = "\n".join(Path(log.name).read_text()[-1500:] for log in logs)
        assert not any(statuses), words
    finally:
        for process, log in zip(processes, logs, strict=True):
            process.kill()
            process.wait()
            log.close()


def family_of(method: str, name: str) -> str:
    """Return a network that can learn the objective with the adaptation; empty if none can."""
    if method in IMAGES:
        return IMAGES[method] if method != "contrastive" else "bert"
    return next((f for f in FAMILIES if not refused(method, name, f)), "")


def losses_of(
    size: int,
    family_folder: Callable[[str], Path],
    folder: Path,
    names: tuple[str, ...],
    chosen: Sequence[str] | None = None,
    sharded: bool = False,
) -> dict[str, Any]:
    wanted = [
        (method, {"method": name}, str(family_folder(family_of(method, name))))
        for name in names
        for method in (OBJECTIVES if chosen is None else chosen)
        if family_of(method, name) and (name == "full" or method not in IMAGES)
    ]
    return train_all(size, wanted, folder, sharded)


def train_all(
    size: int, wanted: list[tuple[str, dict[str, Any], str]], folder: Path, sharded: bool = False
) -> dict[str, Any]:
    """Return the measurements of ``size`` processes for each objective, adaptation and network.

    A single process is this process, which has already imported all modules.
    """
    named = [
        (
            f"{method} {' '.join(f'{key}={value}' for key, value in how.items())}",
            method,
            how,
            family,
        )
        for method, how, family in wanted
    ]
    if size == 1:
        return train_each(named, ALONE)
    (folder / "request.json").write_text(json.dumps(named))
    output = folder / f"{size}.json"
    command = [str(folder / "request.json"), str(output), *["sharded"] * sharded]
    run_group(size, command, folder)
    found: dict[str, Any] = json.loads(output.read_text())
    assert len(found) == len(wanted)
    return found


def compare(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Compare all measurements and trained weights, line by line."""
    wrong = {}
    for pair, lines in one.items():
        assert len(lines) == len(other[pair]), pair
        for mine, theirs in zip(lines, other[pair], strict=True):
            for key, value in mine.items():
                if isinstance(value, float) and theirs[key] != pytest.approx(
                    value, rel=1e-5, abs=1e-6
                ):
                    wrong[pair, mine["event"], mine["step"], key] = (value, theirs[key])
    assert not wrong, wrong


SHARED = (
    "sft", "masked_lm", "classification", "semi_supervised", "contrastive", "kto", "grpo", "ppo",
    "gan", "logit_distillation",
)  # fmt: skip
"""Objectives whose loss, state or random numbers depend on other rows, and one of each kind."""


@pytest.mark.parametrize(
    "chosen",
    [SHARED, pytest.param(sorted(OBJECTIVES.keys() - {*SHARED}), marks=pytest.mark.slow)],
    ids=["shared", "others"],
)
def test_losses_match_single_process_for_every_objective(
    family_folder: Callable[[str], Path], tmp_path: Path, chosen: Sequence[str]
) -> None:
    one, two = (losses_of(size, family_folder, tmp_path, ("full",), chosen) for size in (1, 2))
    compare(one, two)


HOW: tuple[dict[str, Any], ...] = (
    {"method": "full"},
    *({"method": "freeze", "frozen": part} for part in ("bottom", "top", "alternate", "interval")),
    {"method": "feature_extraction"},
    {"method": "lora", "rank": 4},
    {"method": "lora", "rank": 4, "rslora": True},
    {"method": "lora", "rank": 4, "dora": True},
    *({"method": "qlora", "quantization": number} for number in ("nf4", "fp4", "int8")),
    {"method": "bitfit"},
    *({"method": "adapters", "placement": place} for place in ("houlsby", "pfeiffer")),
    {"method": "prompt"},
    {"method": "prefix"},
    *({"method": "sparse", "mask": mask} for mask in ("magnitude", "fisher")),
)
"""Every adaptation, with distinct settings."""


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_losses_match_single_process_for_every_adaptation(
    family_folder: Callable[[str], Path], tmp_path: Path, size: int
) -> None:
    """For generated text and for labels with a new head; with four processes, some have no row."""
    assert {how["method"] for how in HOW} == {*ADAPTATIONS}
    plain = {how["method"]: how for how in HOW}.values()
    wanted = [
        (method, how, str(family_folder(family_of(method, how["method"]))))
        for method, hows in (("sft", HOW), ("classification", plain))
        for how in hows
    ]
    one, several = (train_all(n, wanted, tmp_path) for n in (1, size))
    compare(one, several)
    for name, lines in several.items():
        trained = [line["loss"] for line in lines if line["event"] == "train"]
        assert len({*trained}) == len(trained) == 3, name


@pytest.mark.slow
def test_spectral_norms_match_in_process_without_rows(
    family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """Two rows in a step for three processes."""
    one, three = (losses_of(n, family_folder, tmp_path, ("full",), ["gan"]) for n in (1, 3))
    compare(one, three)


SHARDABLE = (
    "sft",
    "causal_lm",
    "classification",
    "regression",
    "token_classification",
    "orpo",
    "reward_model",
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "names"),
    [
        (2, ("full", "lora")),
        pytest.param(4, ("freeze", "bitfit", "adapters", "prompt"), marks=pytest.mark.slow),
    ],
)
def test_losses_match_single_process_with_sharded_layers(
    family_folder: Callable[[str], Path], tmp_path: Path, size: int, names: tuple[str, ...]
) -> None:
    one = losses_of(1, family_folder, tmp_path, names, SHARDABLE)
    shared = losses_of(size, family_folder, tmp_path, names, SHARDABLE, sharded=True)
    compare(one, shared)


@pytest.mark.slow
def test_losses_match_single_process_with_idle_processes(
    family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """A step has fewer rows than processes, so some processes are idle."""
    names = ("lora", "bitfit", "prompt")
    one, four = (losses_of(size, family_folder, tmp_path, names) for size in (1, 4))
    compare(one, four)
