"""Processes of batch inference and of a study on the nodes of a Ray cluster.

Each process runs below a Ray actor, and a small local driver (:mod:`luthier.cluster.ray_driver`)
represents the process. If the cluster has room for fewer processes, the rest waits. Results equal
the results on one machine.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from luthier.cluster.ray_cluster import RayCluster, driver_environment
from luthier.files import luthier_home
from luthier.recipe import Recipe, map_sources
from luthier.server.jobs.admission import memory_of
from luthier.server.jobs.processes import NODE_LOST
from luthier.workflows.batch_inference import InferenceRunner
from luthier.workflows.child_processes import ProcessRunner, Resources
from luthier.workflows.study.cells import CellRunner
from luthier.workflows.study.search import RANDOM_TRIALS

_log = logging.getLogger(__name__)


class RayProcessRunner(ProcessRunner):
    """Runs the processes of a command on the cluster at an address."""

    name = "ray"

    def __init__(self, address: str, gpus: float = 0) -> None:
        """Connect; see :class:`RayCluster` for the arguments and errors."""
        self._cluster = RayCluster(address, gpus)
        self.nodes = self._cluster.check()
        self.environment = driver_environment()
        luthier_home().mkdir(parents=True, exist_ok=True)  # working directory of the processes

    def room(self, memory: int, cores: int) -> int:
        """Return how many processes of ``memory`` bytes and ``cores`` fit on the idle cluster."""
        return sum(min(node.memory // memory, int(node.cores) // cores) for node in self.nodes)

    def cores_of_each(self, processes: int, memory: int) -> int:
        """Return the most cores that each of ``processes`` can have at the same time; at least 1."""
        most = max(int(node.cores) for node in self.nodes)
        return next((n for n in range(most, 0, -1) if self.room(memory, n) >= processes), 1)

    def command(self, process: Sequence[str], resources: Resources, errors: Path) -> list[str]:
        """See :class:`ProcessRunner`."""
        needs = [part for path in resources.paths for part in ("--needs", path)]
        log = ("--log", str(errors.absolute()))
        return self._cluster.driver_command(process, resources, self.nodes, *log, *needs)

    def was_killed(self, code: int) -> bool:
        """See :class:`ProcessRunner`."""
        return code < 0 or code == NODE_LOST


class RayInferenceRunner(RayProcessRunner, InferenceRunner):
    """Runs the processes of batch inference."""

    def plan_processes(self, processes: int | None, memory: int, shards: int) -> tuple[int, int]:
        """Return the number of processes, by default one per node, and the cores of each."""
        memory = min([memory, max((node.memory for node in self.nodes), default=memory)])
        processes = min(processes or len(self.nodes), shards, max(1, self.room(memory, 1)))
        return processes, self.cores_of_each(processes, memory)


class RayCellRunner(RayProcessRunner, CellRunner):
    """Runs the trainings of a study."""

    def shares(self, recipe: Recipe, parallel: int | None) -> tuple[int, int]:
        """Return the trainings of a round and the threads of each.

        The default round is as large as the cluster allows, but at most the number of random
        trials: a larger round learns less from earlier trials.
        """
        memory, threads = self._memory(recipe), recipe.training.threads
        if parallel is None:
            parallel = min(RANDOM_TRIALS, max(1, self.room(memory, threads or 1)))
        return parallel, threads or self.cores_of_each(parallel, memory)

    def resources(self, recipe: Recipe) -> Resources:
        """See :class:`CellRunner`."""
        paths = tuple(_local_paths(recipe))
        return Resources(recipe.training.threads or 1, self._memory(recipe), paths)

    def _memory(self, recipe: Recipe) -> int:
        """Return the estimated peak memory of a training in bytes, at most the memory of the largest
        node."""
        largest = max(node.memory for node in self.nodes)
        try:
            # A training that fits no node starts on an idle node and fails there by itself.
            return min(memory_of("tune", recipe.plain()), largest)
        except Exception as error:
            _log.info("a training has no estimate: %s", error)
            return 1  # the training itself reports the error


def _local_paths(recipe: Recipe) -> list[str]:
    """Return the absolute paths that the recipe names."""
    named = [recipe.base]

    def add(source: str) -> str:
        named.append(source)
        return source

    map_sources(recipe.plain(), add)
    return [path for path in dict.fromkeys(named) if path.startswith("/")]
