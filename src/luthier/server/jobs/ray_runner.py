"""Workers on the nodes of a Ray cluster: what room its nodes have, and who starts a worker there.

The server itself never connects to the cluster as a driver: Ray ends the process of a driver whose node
or whose head goes away, and the server has to go on answering. It asks the cluster's head what is free,
and starts a small driver (``luthier.server.jobs.ray_driver``) for each worker.

Resources are Ray's to give. A worker is started where one node has the job's cores and its estimated
memory free, and only one is on its way at a time, as what it takes is counted by Ray once it is there.
"""

from __future__ import annotations

import os
import socket
import subprocess
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from sqlalchemy.engine import make_url
from sqlalchemy.orm import Session

from luthier.child_python import python_command
from luthier.errors import LuthierError, RefusedInput
from luthier.files import luthier_home
from luthier.server.jobs.admission import Capacity
from luthier.server.jobs.kinds import WorkKind
from luthier.server.jobs.runners import FreeCapacity, Runner, claimed_rows
from luthier.server.tables.database import Database
from luthier.server.tables.queue import QueuedWork
from luthier.workflows.child_processes import Resources

CONNECT_SECONDS = 5.0
"""Until a head that does not answer is taken for unreachable; Ray itself tries for 40."""
ANSWER_SECONDS = 10.0
"""Until the scheduler goes on without an answer."""
PROBE_SECONDS = 120
"""Until a driver that is tried as the server starts has to have connected."""


@dataclass(frozen=True)
class RayNode:
    """A node of the cluster, as Ray counts it."""

    address: str
    cores: float
    free_cores: float
    memory: int
    free_memory: int

    @property
    def idle(self) -> bool:
        """Whether it has work to give room to, and all of it is free."""
        return self.free_cores == self.cores and self.free_memory == self.memory


class RayRunner(Runner):
    """Workers are processes below an actor of Ray, each with the resources of its job."""

    def __init__(self, address: str, gpus: float = 0) -> None:
        """``address`` of the cluster's head, ``HOST:PORT``; ``gpus`` are reserved for each worker."""
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit():
            raise RefusedInput(
                f"--ray-address {address}: write HOST:PORT, as `ray start` prints it"
            )
        if not gpus >= 0:
            raise RefusedInput(f"--ray-gpus {gpus}: write a number from 0 on")
        self.address, self.gpus = address, gpus
        self.host, self.port = host, int(port)
        self._nodes: list[RayNode] = []
        self._looks: ThreadPoolExecutor | None = None
        self._look: Future[list[RayNode]] | None = None

    def check(self, database: Database) -> None:
        """Refuse what could run no job, before the service begins.

        Raises:
            RefusedInput: as :meth:`check_cluster`, or its nodes could not see the database.
        """
        nodes = self.check_cluster()
        url = make_url(database.engine.url)
        if url.get_backend_name() == "sqlite" and len({node.address for node in nodes}) > 1:
            raise RefusedInput(
                "SQLite serves one machine, and the Ray cluster has several: give --database "
                "postgresql://… for all of them"
            )

    def check_cluster(self) -> list[RayNode]:
        """The nodes that take work, where some do and this machine can start it there.

        Raises:
            RefusedInput: Ray is missing, the cluster cannot be reached, this machine is not a part of
                it.
        """
        try:
            nodes = self.nodes()
        except LuthierError as error:
            raise RefusedInput(str(error)) from error
        if not any(node.cores for node in nodes):
            raise RefusedInput(
                f"the Ray cluster at {self.address} has no node with CPUs: add one with "
                f"`ray start --address={self.address} --num-cpus=…`"
            )
        self._probe()
        return nodes

    def _probe(self) -> None:
        """Connect a driver as workers will have one, in a process of its own."""
        command = [*_driver(self.address), "--probe"]
        try:
            tried = subprocess.run(
                command, capture_output=True, timeout=PROBE_SECONDS, env=driver_environment()
            )
            failure = tried.stderr.decode(errors="replace").strip() if tried.returncode else None
        except subprocess.TimeoutExpired:
            failure = f"no connection within {PROBE_SECONDS} seconds"
        if failure is not None:
            last = failure.splitlines()[-1] if failure else "nothing was said"
            raise RefusedInput(
                f"no job can be started on the Ray cluster at {self.address} from here ({last}). "
                "This machine has to be a node of it: run "
                f"`ray start --address={self.address} --num-cpus=0` here"
            )

    def nodes(self) -> list[RayNode]:
        """The nodes that are alive, those with the most free cores first.

        Raises:
            RefusedInput: Ray is not installed.
            LuthierError: the cluster's head does not answer.
        """
        try:
            with socket.create_connection((self.host, self.port), CONNECT_SECONDS):
                pass
        except OSError as error:
            raise LuthierError(
                f"the Ray cluster at {self.address} cannot be reached ({error}). Start it with "
                "`ray start --head`, or give its address by --ray-address"
            ) from error
        try:
            from ray.autoscaler.v2.sdk import get_cluster_status
        except ModuleNotFoundError as error:
            raise RefusedInput("this needs ray: pip install 'luthier[ray]'") from error
        from ray.exceptions import RayError

        try:
            status = get_cluster_status(self.address)
        except RayError as error:
            raise LuthierError(
                f"the Ray cluster at {self.address} does not answer: {error}"
            ) from error
        nodes = []
        for state in [*status.active_nodes, *status.idle_nodes]:
            if state.resource_usage is None:
                continue
            usage = {each.resource_name: each for each in state.resource_usage.usage}
            cpu, memory = usage.get("CPU"), usage.get("memory")
            if cpu is None or not cpu.total or memory is None:
                continue  # it takes no work, as the server's own may
            if self.gpus:
                gpu = usage.get("GPU")
                if gpu is None or gpu.total - gpu.used < self.gpus:
                    continue
            nodes.append(
                RayNode(
                    state.ip_address,
                    cpu.total,
                    cpu.total - cpu.used,
                    int(memory.total),
                    int(memory.total - memory.used),
                )
            )
        return sorted(nodes, key=lambda node: (node.free_cores, node.free_memory), reverse=True)

    def refresh(self) -> None:
        """See :class:`luthier.server.jobs.runners.Runner`."""
        self._nodes = []
        # A head that hangs holds the call for minutes; the scheduler has other things to see to.
        if self._looks is None:
            self._looks = ThreadPoolExecutor(1, thread_name_prefix="ray-nodes")
        if self._look is None:
            self._look = self._looks.submit(self.nodes)
        try:
            self._nodes = self._look.result(ANSWER_SECONDS)
        except TimeoutError as error:
            if not self._look.done():
                raise LuthierError(
                    f"the Ray cluster at {self.address} has not answered within {ANSWER_SECONDS:g} s"
                ) from error
            raise
        finally:
            if self._look.done():
                self._look = None

    def free(self, session: Session, capacity: Capacity) -> Sequence[FreeCapacity]:
        """See :class:`luthier.server.jobs.runners.Runner`."""
        rows = claimed_rows(session)
        if any((row.worker or {}).get("starting") for row in rows):
            return []  # Ray does not count yet what this one takes
        offers = []
        for node in self._nodes:
            if node.free_cores <= 0:
                continue
            # What fits no node is started on an idle one, and finds out by itself.
            at_work = Counter[type[QueuedWork]]()
            if not node.idle:
                at_work.update(type(row) for row in rows)
                at_work[QueuedWork] += 1  # maybe of others who share the cluster
            offers.append(FreeCapacity(node.free_memory, int(node.free_cores), at_work))
        return offers

    def command(self, worker: Sequence[str], kind: WorkKind, row: QueuedWork) -> list[str]:
        """See :class:`luthier.server.jobs.runners.Runner`."""
        resources = Resources(max(row.cores, 1), row.needed_memory)
        work = ("--kind", kind.name, "--id", row.id, "--lease", str(row.lease))
        return self.driver([*worker, "--until-stdin-closes"], resources, self._nodes, *work)

    def driver(
        self,
        worker: Sequence[str],
        resources: Resources,
        nodes: Sequence[RayNode],
        *options: str,
    ) -> list[str]:
        """The command of a driver whose actor runs ``worker``; what fits none of ``nodes`` asks for all
        that the largest has.
        """
        memory = min([resources.memory, max((n.memory for n in nodes), default=resources.memory)])
        cores = min([resources.cores, max((n.cores for n in nodes), default=resources.cores)])
        return [
            *_driver(self.address),
            *("--cores", str(float(cores)), "--memory", str(memory), "--gpus", str(self.gpus)),
            *options,
            "--",
            *worker,
        ]


def _driver(address: str) -> list[str]:
    return python_command("luthier.server.jobs.ray_driver", "--address", address)


def driver_environment() -> dict[str, str]:
    """Variables of a driver: those of this process, Ray's telemetry off, the store by its full path."""
    return {
        **os.environ,
        "RAY_USAGE_STATS_ENABLED": "0",
        "LUTHIER_HOME": str(luthier_home().absolute()),
    }
