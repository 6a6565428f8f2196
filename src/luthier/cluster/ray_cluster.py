"""A Ray cluster: free resources of the nodes, and the command that runs a process on a node.

Server and commands never connect to the cluster as drivers, because Ray kills a driver whose head
disappears. The free resources come from the head, and each process gets a small driver process
(:mod:`luthier.cluster.ray_driver`).
"""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from luthier.errors import LuthierError, RefusedInput
from luthier.files import luthier_home
from luthier.processes import python_command
from luthier.workflows.child_processes import Resources

CONNECT_SECONDS = 5.0
"""Time limit for a connection to the head, in seconds. Ray's own limit is 40."""
PROBE_SECONDS = 120
"""Time limit for the connection of a first driver, in seconds."""


@dataclass(frozen=True)
class RayNode:
    """The resources of a node, as Ray reports them."""

    address: str
    cores: float
    free_cores: float
    memory: int
    free_memory: int

    @property
    def idle(self) -> bool:
        """True if all resources of the node are free."""
        return self.free_cores == self.cores and self.free_memory == self.memory


class RayCluster:
    """A Ray cluster by the address of its head."""

    def __init__(self, address: str, gpus: float = 0) -> None:
        """Parse the address.

        Args:
            address: ``HOST:PORT`` of the head.
            gpus: GPUs that each process reserves.

        Raises:
            RefusedInput: for an invalid address or a negative number.
        """
        self.host, _, port = address.rpartition(":")
        if not self.host or not port.isdigit():
            raise RefusedInput(
                f'--ray-address must be HOST:PORT, as printed by `ray start`, not "{address}"'
            )
        if not gpus >= 0:
            raise RefusedInput(f"--ray-gpus {gpus}: must be at least 0")
        self.address, self.port, self.gpus = address, int(port), gpus

    def check(self) -> list[RayNode]:
        """Return the nodes, after a driver of this machine has connected.

        Raises:
            RefusedInput: if Ray is missing, the cluster cannot be reached or has no node with CPUs, or
                this machine is not a node of the cluster.
        """
        try:
            nodes = self.nodes()
        except LuthierError as error:
            raise RefusedInput(str(error)) from error
        if not nodes:
            raise RefusedInput(
                f"the Ray cluster at {self.address} has no node with CPUs. Add a node with "
                f"`ray start --address={self.address} --num-cpus=…`"
            )
        try:
            probe = subprocess.run(
                [*self._driver(), "--probe"],
                capture_output=True,
                text=True,
                timeout=PROBE_SECONDS,
                env=driver_environment(),
            )
        except subprocess.TimeoutExpired:
            failure = f"no connection within {PROBE_SECONDS} seconds"
        else:
            if probe.returncode == 0:
                return nodes
            failure = next(reversed(probe.stderr.strip().splitlines()), "no message")
        raise RefusedInput(
            f"the Ray cluster at {self.address} starts no process of this machine ({failure}). This "
            f"machine must be a node: run `ray start --address={self.address} --num-cpus=0`"
        )

    def nodes(self) -> list[RayNode]:
        """Return the living nodes with CPUs and the wanted GPUs, sorted by free cores, most first.

        A node without enough free GPUs has no free cores.

        Raises:
            RefusedInput: if Ray is not installed.
            LuthierError: if the head does not respond.
        """
        try:
            socket.create_connection((self.host, self.port), CONNECT_SECONDS).close()
        except OSError as error:
            raise LuthierError(
                f"the Ray cluster at {self.address} cannot be reached ({error}). Start it with "
                "`ray start --head`, or set `--ray-address`"
            ) from error
        try:
            from ray.autoscaler.v2.sdk import get_cluster_status
        except ModuleNotFoundError as error:
            raise RefusedInput("ray is not installed: pip install 'luthier[ray]'") from error
        from ray.exceptions import AuthenticationError, RayError

        try:
            status = get_cluster_status(self.address)
        except AuthenticationError as error:
            raise LuthierError(
                f"the Ray cluster at {self.address} requires its token. Set RAY_AUTH_MODE=token for "
                "this command, and RAY_AUTH_TOKEN if ~/.ray/auth_token is missing or of another cluster"
            ) from error
        except RayError as error:
            raise LuthierError(
                f"the Ray cluster at {self.address} does not respond: {error}"
            ) from error
        nodes = []
        for state in [*status.active_nodes, *status.idle_nodes]:
            if state.resource_usage is None:
                continue
            usage = {each.resource_name: each for each in state.resource_usage.usage}
            cpu, memory, gpu = (usage.get(name) for name in ("CPU", "memory", "GPU"))
            if cpu is None or not cpu.total or memory is None:
                continue  # a node without CPUs takes no work, such as the server's own
            gpus, used_gpus = (gpu.total, gpu.used) if gpu else (0.0, 0.0)
            if gpus < self.gpus:
                continue
            is_free = gpus - used_gpus >= self.gpus  # a node with busy GPUs takes work later
            node = RayNode(
                state.ip_address,
                cpu.total,
                cpu.total - cpu.used if is_free else 0.0,
                int(memory.total),
                int(memory.total - memory.used),
            )
            nodes.append(node)
        return sorted(nodes, key=lambda node: (node.free_cores, node.free_memory), reverse=True)

    def driver_command(
        self,
        process: Sequence[str],
        resources: Resources,
        nodes: Sequence[RayNode],
        *options: str,
    ) -> list[str]:
        """Return the command of a driver whose actor runs ``process``.

        A process that is larger than all ``nodes`` reserves the resources of the largest node.
        """
        memory = min([resources.memory, max((n.memory for n in nodes), default=resources.memory)])
        cores = min([resources.cores, max((n.cores for n in nodes), default=resources.cores)])
        return [
            *self._driver(),
            *("--cores", str(float(cores)), "--memory", str(memory), "--gpus", str(self.gpus)),
            *options,
            "--",
            *process,
        ]

    def _driver(self) -> list[str]:
        return python_command("luthier.cluster.ray_driver", "--address", self.address)


def driver_environment() -> dict[str, str]:
    """Return the environment of a driver, with an absolute home folder and without Ray's telemetry."""
    return {
        **os.environ,
        "RAY_USAGE_STATS_ENABLED": "0",
        "LUTHIER_HOME": str(luthier_home().absolute()),
    }
