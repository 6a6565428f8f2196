"""Trials of a search on the nodes of a Ray cluster.

The rounds of a search, and so its result, are the same as on one machine: where the cluster has room
for fewer trials at once, the others wait.
"""

from __future__ import annotations

import logging

from luthier.recipe import Recipe, map_sources
from luthier.server.jobs.admission import memory_of
from luthier.server.jobs.ray_processes import RayProcessRunner
from luthier.workflows.child_processes import Resources
from luthier.workflows.search import RANDOM_TRIALS
from luthier.workflows.trial_processes import TrialRunner

_log = logging.getLogger(__name__)


class RayTrialRunner(RayProcessRunner, TrialRunner):
    """Runs the processes of a search on the cluster at an address."""

    def shares(self, recipe: Recipe, parallel: int | None) -> tuple[int, int]:
        """As many as all nodes have cores and memory for, with no more than the first random ones.

        A round that is larger tries more, and learns from less; ``parallel`` may ask for it. Threads
        are those of the recipe for each trial, else what the cores of the cluster leave each.
        """
        memory, asked = self._memory(recipe), recipe.training.threads
        if parallel is None:
            parallel = min(RANDOM_TRIALS, max(1, self.room(memory, asked or 1)))
        return parallel, asked or self.cores_of_each(parallel, memory)

    def resources(self, recipe: Recipe) -> Resources:
        """See :class:`TrialRunner`."""
        paths = tuple(_local_paths(recipe))
        return Resources(recipe.training.threads or 1, self._memory(recipe), paths)

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
