"""Runs an application on its ports until it is told to end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import uvicorn

from luthier.api.http.connections import Connections, LimitedSocket, raise_open_files
from luthier.errors import RefusedInput

LAST_SECONDS = 10.0
"""For requests that are cut to say so to their clients, when the server ends."""

_log = logging.getLogger("luthier.server")


@dataclass(frozen=True)
class Ports:
    """Where a server listens."""

    host: str = "127.0.0.1"
    """Loopback, unless told otherwise."""
    port: int = 8080
    """0 takes a free one."""
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    tls_port: int | None = None
    """A second port, for TLS; without it TLS takes the place of plain HTTP on ``port``."""

    def check(self) -> None:
        """Refuse half a certificate, or a port for TLS without one."""
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise RefusedInput("TLS needs both --tls-cert and --tls-key")
        if self.tls_port is not None and self.tls_certificate is None:
            raise RefusedInput("--tls-port needs --tls-cert and --tls-key")
        for path in (self.tls_certificate, self.tls_key):
            if path is not None and not path.is_file():
                raise RefusedInput(f"{path} is not a file")


class LimitedServer(uvicorn.Server):
    """Signals are handled once, for all ports; connections have limits."""

    def __init__(self, config: uvicorn.Config, connections: Connections) -> None:
        super().__init__(config)
        self._connections = connections

    async def on_tick(self, counter: int) -> bool:
        """Called every tenth of a second."""
        if counter % 10 == 0:
            self._connections.close_overdue()
        return await super().on_tick(counter)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave them alone."""
        yield


def run(
    application: Any, ports: Ports, connections: Connections, ready: Callable[[list[str]], None]
) -> None:
    """Serve until SIGINT or SIGTERM; ``ready`` hears the addresses once all ports are open.

    Requests in flight then have ``shutdown_seconds`` of its limits, or until the next signal; what is
    not done is cut, and tells its client so.

    Raises:
        RefusedInput: where a port is taken, or the certificate cannot be used.
    """
    ports.check()
    room = raise_open_files(connections.limits.connections)
    if room < connections.limits.connections:
        _log.warning("this process may open files for %d connections; raise `ulimit -n`", room)
        connections.limits = connections.limits.model_copy(update={"connections": room})
    asyncio.run(_run(application, ports, connections, ready))


async def _run(
    application: Any, ports: Ports, connections: Connections, ready: Callable[[list[str]], None]
) -> None:
    configs = _configs(application, ports, connections)
    servers = [LimitedServer(config, connections) for config in configs]
    for server in servers:
        try:
            server.config.load()
        except OSError as error:
            raise RefusedInput(f"the certificate cannot be used: {error}") from error
    loop = asyncio.get_running_loop()

    def end() -> None:
        if not servers[0].should_exit:
            seconds = connections.limits.shutdown_seconds
            _log.info("ends within %g s, or at once by a second signal", seconds)
        for server in servers:
            # The second signal does not wait for requests in flight.
            server.force_exit = server.should_exit
            server.should_exit = True

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, end)
    sockets: list[list[LimitedSocket]] = []
    for config in configs:
        try:
            sockets.append(connections.listen(ports.host, config.port, config.is_ssl))
        except OSError as error:
            for each in chain(*sockets):
                each.close()
            text = f"port {config.port} of {ports.host} cannot be opened: {error.strerror}"
            raise RefusedInput(text) from error
    tasks = [
        asyncio.ensure_future(server.serve([*several]))
        for server, several in zip(servers, sockets, strict=True)
    ]
    while not all(server.started for server in servers):
        if any(task.done() for task in tasks):
            end()
            await asyncio.gather(*tasks)
            raise RefusedInput(f"port {ports.port} of {ports.host} cannot be served")
        await asyncio.sleep(0.01)
    ready([_address(server) for server in servers])
    await asyncio.gather(*tasks)
    # Cut by the server, or left behind where the second signal came; the loop would cancel them again.
    left = [task for server in servers for task in server.server_state.tasks]
    for task in left:
        if not task.cancelling():
            task.cancel()
    if left:
        await asyncio.wait(left, timeout=LAST_SECONDS)


def _configs(application: Any, ports: Ports, connections: Connections) -> list[uvicorn.Config]:
    def config(port: int, tls: bool) -> uvicorn.Config:
        return uvicorn.Config(
            application,
            host=ports.host,
            port=port,
            http=connections.protocol,  # type: ignore[arg-type]  # it is only ever called
            timeout_keep_alive=round(connections.limits.idle_seconds),
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            # Who is logged is who is connected: nobody says of himself where he comes from.
            proxy_headers=False,
            # Whole seconds are declared, and any number is waited for.
            timeout_graceful_shutdown=connections.limits.shutdown_seconds,  # type: ignore[arg-type]
            ssl_certfile=ports.tls_certificate if tls else None,
            ssl_keyfile=ports.tls_key if tls else None,
        )

    if ports.tls_port is not None:
        return [config(ports.port, False), config(ports.tls_port, True)]
    return [config(ports.port, ports.tls_certificate is not None)]


def _address(server: uvicorn.Server) -> str:
    host, port = server.servers[0].sockets[0].getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    return f"http{'s' if server.config.is_ssl else ''}://{shown}:{port}"
