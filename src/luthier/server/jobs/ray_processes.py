"""Processes of a command on the nodes of a Ray cluster.

Each is a worker below an actor of Ray, as a job of the service is, and a small driver
(``luthier.server.jobs.ray_driver``) stands here for it. Where the cluster has room for fewer
processes at once, the others wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from luthier.files import luthier_home
from luthier.server.jobs.processes import NODE_LOST
from luthier.server.jobs.ray_runner import RayNode, RayRunner, driver_environment
from luthier.workflows.child_processes import ProcessRunner, Resources


class RayProcessRunner(ProcessRunner):
    """Runs the processes of a command on the cluster at an address."""

    name = "ray"

    def __init__(self, address: str, gpus: float = 0) -> None:
        """``address`` of the cluster's head, ``HOST:PORT``; ``gpus`` are reserved for each process.

        Raises:
            RefusedInput: as :meth:`RayRunner.check_cluster`.
        """
        self._cluster = RayRunner(address, gpus)
        self.nodes: list[RayNode] = self._cluster.check_cluster()
        self.environment = driver_environment()
        luthier_home().mkdir(parents=True, exist_ok=True)  # where its workers run

    def room(self, memory: int, cores: int) -> int:
        """How many processes of so many bytes and cores the cluster takes when nothing else runs."""
        return sum(min(node.memory // memory, int(node.cores) // cores) for node in self.nodes)

    def cores_of_each(self, processes: int, memory: int) -> int:
        """The most cores that each of so many processes can have when they run at once; at least 1."""
        most = max(int(node.cores) for node in self.nodes)
        return next((n for n in range(most, 0, -1) if self.room(memory, n) >= processes), 1)

    def command(self, process: Sequence[str], resources: Resources, errors: Path) -> list[str]:
        """See :class:`ProcessRunner`."""
        needs = [part for path in resources.paths for part in ("--needs", path)]
        log = ("--log", str(errors.absolute()))
        return self._cluster.driver(process, resources, self.nodes, *log, *needs)

    def was_killed(self, code: int) -> bool:
        """See :class:`ProcessRunner`."""
        return code < 0 or code == NODE_LOST
