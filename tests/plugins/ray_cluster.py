"""A real Ray cluster of local processes, started by `ray start`."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from luthier.cluster.ray_cluster import RayCluster
from luthier.errors import LuthierError

RAY = Path(sys.executable).with_name("ray")
MEMORY = 2_000_000_000
# Ray reads the token once in a process, so all tests of a process have the same.
os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
STARTS = 6
"""Maximum number of starts per node: a node ends if its agents need more than 15 s."""


class NodeEnded(Exception):
    """A failed start of a node, with the output."""


class Cluster:
    """Local nodes with one CPU each; the head node runs no work."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.port = folder, port
        self.nodes: list[subprocess.Popen[bytes]] = []
        self.address = f"127.0.0.1:{port}"
        head = ("--head", f"--port={port}", "--num-cpus=0", f"--temp-dir={folder}")
        self._start(lambda: self.start(*head), 0)

    def start(self, *options: str) -> subprocess.Popen[bytes]:
        """Start a node as a process that ends with its raylet."""
        command = [str(RAY), "start", *options, "--block", "--disable-usage-stats"]
        command += ["--include-dashboard=false"] if "--head" in options else []
        command += [f"--memory={MEMORY}", "--object-store-memory=80000000"]
        path = self.folder / f"node-{len(self.nodes)}.log"
        with path.open("wb") as log:
            node = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        self.nodes.append(node)
        return node

    def add_until(self, count: int) -> None:
        """Start a worker node and wait for ``count`` worker nodes."""
        self._start(lambda: self.start(f"--address={self.address}", "--num-cpus=1"), count)

    def _start(self, start: Callable[[], subprocess.Popen[bytes]], count: int) -> None:
        """Start a node and wait for ``count`` worker nodes."""
        for left in reversed(range(STARTS)):
            node = start()
            try:
                self.wait_for(count, node=node)
                return
            except NodeEnded:
                if not left:
                    raise

    def wait_for(
        self, count: int, seconds: float = 300, node: subprocess.Popen[bytes] | None = None
    ) -> None:
        """Wait for ``count`` worker nodes; ``node`` must stay alive."""
        deadline = time.monotonic() + seconds
        while True:
            if node is not None:
                said = (self.folder / f"node-{len(self.nodes) - 1}.log").read_text()
                if node.poll() is not None:
                    raise NodeEnded(said)
                if "Ray runtime started" not in said:
                    assert time.monotonic() < deadline, said
                    time.sleep(0.5)
                    continue
            try:
                found = RayCluster(self.address).nodes()
            except LuthierError:  # the node is starting
                found = None
            if found is not None and len(found) == count:
                return
            assert time.monotonic() < deadline, f"{found} instead of {count} nodes"
            time.sleep(0.5)

    def wait_for_idle(self, count: int, seconds: float = 60) -> None:
        """Wait until ``count`` nodes have all resources free."""
        deadline = time.monotonic() + seconds
        while sum(n.idle for n in RayCluster(self.address).nodes()) != count:
            assert time.monotonic() < deadline
            time.sleep(0.5)

    def close(self) -> None:
        """End all nodes."""
        for node in reversed(self.nodes):
            if node.poll() is None:
                node.terminate()
        for node in self.nodes:
            try:
                node.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(node.pid, 9)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Yield a head node and two nodes with one job slot each."""
    # Its sockets lie below, and their names may have 107 characters: pytest's folders are too long.
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    # Ray's workers listen from 10002 to 19999, and connections go out from 32768 on.
    made = Cluster(folder, 21000 + os.getpid() % 10000)
    try:
        # Two clusters that start at the same time can conflict over a port.
        made.add_until(1)
        made.add_until(2)
        yield made
    finally:
        made.close()
        shutil.rmtree(folder, ignore_errors=True)
