"""Trials of a search on the nodes of a Ray cluster.

Each process of the search is a worker below an actor of Ray, as a job of the service is, and a small
driver (``luthier.jobs.ray_driver``) stands here for it. The rounds of a search, and so its result, are
the same as on one machine: where the cluster has room for fewer trials at once, the others wait.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from luthier.jobs.admission import memory_of
from luthier.jobs.processes import NODE_LOST
from luthier.jobs.ray_runner import RayNode, RayRunner, driver, driver_environment
from luthier.recipe import Recipe, map_sources
from luthier.workflows.search import RANDOM_TRIALS
from luthier.workflows.trial_processes import TrialRunner

_log = logging.getLogger(__name__)


class RayTrialRunner(TrialRunner):
    """Runs the processes of a search on the cluster at an address."""

    name = "ray"

    def __init__(self, address: str, gpus: float = 0) -> None:
        """``address`` of the cluster's head, ``HOST:PORT``; ``gpus`` are reserved for each trial.

        Raises:
            RefusedInput: as :meth:`RayRunner.check_cluster`.
        """
        cluster = RayRunner(address, gpus)
        self.address, self.gpus = address, gpus
        self.nodes: list[RayNode] = cluster.check_cluster()
        self.environment = driver_environment()

    def shares(self, recipe: Recipe, parallel: int | None) -> tuple[int, int]:
        """As many as all nodes have cores and memory for, with no more than the first random ones.

        A round that is larger tries more, and learns from less; ``parallel`` may ask for it. Threads
        are those of the recipe for each trial, else what the cores of the cluster leave each.
        """
        memory, asked = self._memory(recipe), recipe.training.threads
        most = max(int(node.cores) for node in self.nodes)
        if parallel is None:
            parallel = min(RANDOM_TRIALS, max(1, self._room(memory, asked or 1)))
        if asked is not None:
            return parallel, asked
        shares = (cores for cores in range(most, 0, -1) if self._room(memory, cores) >= parallel)
        return parallel, next(shares, 1)

    def _room(self, memory: int, cores: int) -> int:
        """How many trials of so many bytes and cores the cluster takes when nothing else runs."""
        return sum(min(node.memory // memory, int(node.cores) // cores) for node in self.nodes)

    def command(self, process: Sequence[str], recipe: Recipe, errors: Path) -> list[str]:
        """See :class:`TrialRunner`."""
        cores = min(float(recipe.training.threads or 1), max(node.cores for node in self.nodes))
        return [
            *driver(self.address),
            *("--cores", str(cores), "--memory", str(self._memory(recipe))),
            *("--gpus", str(self.gpus)),
            *("--log", str(errors.absolute())),
            *(part for path in _local_paths(recipe) for part in ("--needs", path)),
            "--",
            *process,
        ]

    def was_killed(self, code: int) -> bool:
        """See :class:`TrialRunner`."""
        return code < 0 or code == NODE_LOST

    def _memory(self, recipe: Recipe) -> int:
        """Estimated peak of a trial in bytes; of one that fits no node the memory of the largest."""
        largest = max(node.memory for node in self.nodes)
        try:
            # What fits no node is started on an idle one, and finds out by itself.
            return min(memory_of("tune", recipe.plain()), largest)
        except Exception as error:
            _log.info("a trial has no estimate: %s", error)
            return 1  # it finds the same, and says it


def _local_paths(recipe: Recipe) -> list[str]:
    """Files and folders that the recipe names, whole paths all of them."""
    named = [recipe.base]

    def note(source: str) -> str:
        named.append(source)
        return source

    map_sources(recipe.plain(), note)
    return [path for path in dict.fromkeys(named) if path.startswith("/")]
