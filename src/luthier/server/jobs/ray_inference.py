"""Batch inference on the nodes of a Ray cluster."""

from __future__ import annotations

from luthier.server.jobs.ray_processes import RayProcessRunner
from luthier.workflows.batch_inference import InferenceRunner


class RayInferenceRunner(RayProcessRunner, InferenceRunner):
    """Runs the processes of a batch on the cluster at an address."""

    def plan_processes(self, processes: int | None, memory: int, shards: int) -> tuple[int, int]:
        """One process for each node where their number is not given; each has the same cores.

        There are no more than the cluster has room for at once, and one at least.
        """
        memory = min([memory, max((node.memory for node in self.nodes), default=memory)])
        processes = min(processes or len(self.nodes), shards, max(1, self.room(memory, 1)))
        return processes, self.cores_of_each(processes, memory)
