"""Two nodes of a run, each an agent of torchrun: one starts late, fails, and returns."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from luthier.engine.metrics import Reporter
from luthier.engine.train import train
from luthier.errors import Interrupted
from luthier.recipe import Recipe, to_toml

WAIT = 120
"""Seconds for whatever is waited for."""


class Node:
    """An agent of torchrun with one process, training the recipe in a file."""

    def __init__(self, port: int, recipe: Path, log: Path) -> None:
        agent = ["--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "9"]
        agent += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}"]
        agent += ["--rdzv-id", "job", "--local-addr", "127.0.0.1", "--rdzv-conf"]
        agent += ["last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=3"]
        settings = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        self.log = log
        with log.open("wb") as file:
            self.agent = subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", *agent]
                + ["-m", "luthier", "tune", str(recipe)],
                env=os.environ | settings,
                stdout=file,
                stderr=file,
            )

    def kill(self) -> list[psutil.Process]:
        """Kill the agent alone and return the remaining processes."""
        children = psutil.Process(self.agent.pid).children(recursive=True)
        self.agent.kill()
        self.agent.wait()
        return children

    def words(self) -> str:
        return self.log.read_text(errors="replace")


def wait_for(what: Callable[[], Any], *nodes: Node) -> None:
    deadline = time.monotonic() + WAIT
    while not what():
        assert time.monotonic() < deadline, "\n".join(node.words()[-3000:] for node in nodes)
        time.sleep(0.1)


def lines(metrics: Path) -> list[dict[str, Any]]:
    """Return the metrics of the steps so far."""
    whole = metrics.read_bytes().split(b"\n")[:-1] if metrics.is_file() else []
    found = [json.loads(line) for line in whole]
    return [line for line in found if line["event"] == "train"]


@pytest.mark.slow
def test_a_node_comes_late_is_lost_and_comes_back(
    luthier_home: Path, recipe: Callable[..., Recipe], tmp_path: Path, tiny_model_folder: Path
) -> None:
    training = {"max_steps": 100_000, "patience": 0, "learning_rate": 1e-4, "refit": False}
    training |= {"micro_batch_tokens": 64, "evaluate_every": 100_000}
    file = tmp_path / "recipe.toml"
    file.write_text(to_toml(recipe(training=training).plain()))
    metrics = luthier_home / "runs" / tiny_model_folder.name / "x" / "metrics.jsonl"

    def wait_for_steps() -> None:
        before = len(lines(metrics))
        wait_for(lambda: len(lines(metrics)) > before + 2, *nodes)

    def meetings() -> int:  # torchrun chooses the node that reports
        return sum(node.words().count("2 processes share") for node in nodes)

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    first = Node(port, file, tmp_path / "first.log")
    nodes = [first]
    try:
        wait_for(lambda: len(lines(metrics)) > 12, first)
        assert not meetings()
        for number in (1, 2):  # comes late, is lost, and comes back
            second = Node(port, file, tmp_path / f"second-{number}.log")
            nodes.append(second)
            wait_for(lambda: meetings() == number, *nodes)  # noqa: B023
            wait_for_steps()
            if number == 1:
                left = second.kill()
                assert not psutil.wait_procs(left, timeout=30)[1]  # no process keeps training
                wait_for_steps()
                assert first.agent.poll() is None
        for node in nodes:
            node.agent.send_signal(signal.SIGTERM)
        for node in nodes:
            node.agent.wait(timeout=WAIT)
    finally:
        for node in nodes:
            if node.agent.poll() is None:
                for child in node.kill():
                    child.kill()
    done = lines(metrics)
    assert [line["step"] for line in done] == [*range(1, len(done) + 1)]
    compared = done[:300]

    class Stopping(Reporter):
        def metrics(self, line: Any, steps: int) -> None:
            if line["event"] == "train" and line["step"] == len(compared):
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        train(recipe(training=training, name="whole"), reporter=Stopping())
    whole = lines(metrics.parents[1] / "whole" / "metrics.jsonl")
    for mine, theirs in zip(whole, compared, strict=True):
        assert theirs["loss"] == pytest.approx(mine["loss"], rel=1e-5)
