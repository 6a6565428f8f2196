"""The job runner ``ray``: the server's training jobs on the nodes of a Ray cluster.

Ray manages the resources. A worker starts when a node has the cores and the estimated memory of the
job free. Workers start one after the other, because Ray counts a worker only after the start.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from sqlalchemy.engine import make_url
from sqlalchemy.orm import Session

from luthier.cluster.ray_cluster import RayCluster, RayNode
from luthier.errors import RefusedInput
from luthier.server.jobs.admission import Capacity
from luthier.server.jobs.kinds import WorkKind
from luthier.server.jobs.runners import FreeCapacity, Runner, RunnerEntry, claimed_rows
from luthier.server.tables.database import Database
from luthier.server.tables.queue import QueuedWork
from luthier.workflows.child_processes import Resources


class RayRunner(Runner):
    """Workers below actors of Ray, each with the resources of its job."""

    def __init__(self, cluster: RayCluster) -> None:
        self.cluster = cluster
        self._nodes: list[RayNode] = []

    def check(self, database: Database) -> None:
        """See :class:`Runner`."""
        nodes = self.cluster.check()
        sqlite = make_url(database.engine.url).get_backend_name() == "sqlite"
        if sqlite and len({node.address for node in nodes}) > 1:
            raise RefusedInput(
                "the Ray cluster has several machines, and SQLite supports one. Use "
                "--database postgresql://…"
            )

    def refresh(self) -> None:
        """See :class:`Runner`."""
        self._nodes = []
        self._nodes = self.cluster.nodes()

    def free(self, session: Session, capacity: Capacity) -> Sequence[FreeCapacity]:
        """See :class:`Runner`."""
        rows = claimed_rows(session)
        if any((row.worker or {}).get("starting") for row in rows):
            return []  # Ray does not count this worker yet
        offers = []
        for node in self._nodes:
            if node.free_cores <= 0:
                continue
            # A job that fits no node starts on an idle node and fails there by itself.
            at_work = Counter[type[QueuedWork]]()
            if not node.idle:
                at_work.update(type(row) for row in rows)
                at_work[QueuedWork] += 1  # other users of the cluster may run work
            offers.append(FreeCapacity(node.free_memory, int(node.free_cores), at_work))
        return offers

    def command(self, worker: Sequence[str], kind: WorkKind, row: QueuedWork) -> list[str]:
        """See :class:`Runner`."""
        resources = Resources(max(row.cores, 1), row.needed_memory)
        work = ("--kind", kind.name, "--id", row.id, "--lease", str(row.lease))
        process = [*worker, "--until-stdin-closes"]
        return self.cluster.driver_command(process, resources, self._nodes, *work)


RAY = RunnerEntry("ray", lambda address, gpus: RayRunner(RayCluster(address, gpus)))
"""The entry of :data:`luthier.server.jobs.runners.RUNNERS`."""
