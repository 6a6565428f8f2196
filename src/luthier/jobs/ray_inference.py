"""Batch inference on the nodes of a Ray cluster."""

from __future__ import annotations

from luthier.jobs.ray_processes import RayProcessRunner
from luthier.workflows.batch_inference import InferenceRunner


class RayInferenceRunner(RayProcessRunner, InferenceRunner):
    """Runs the processes of a batch on the cluster at an address."""

    def shares(self, processes: int | None, memory: int) -> tuple[int, int]:
        """One process for each node where their number is not given; each has the same cores.

        More than the cluster has room for wait, and find the rows answered when there is some.
        """
        processes = processes or len(self.nodes)
        return processes, self.cores_of_each(processes, memory)
