"""Runs an application with uvicorn until SIGINT or SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from anyio import to_thread

from luthier.errors import RefusedInput
from luthier.limits import ServerLimits

LAST_SECONDS = 10.0
"""Time limit for requests that are cut at shutdown to send their last error, in seconds."""

_log = logging.getLogger("luthier.server")


@dataclass(frozen=True)
class Ports:
    """Address, port and certificate of a server."""

    host: str = "127.0.0.1"
    port: int = 8080
    """0 for a free port."""
    tls_certificate: Path | None = None
    tls_key: Path | None = None

    def check(self) -> None:
        """Raise :class:`RefusedInput` for half a certificate or a missing file."""
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise RefusedInput("TLS needs both --tls-cert and --tls-key")
        for path in (self.tls_certificate, self.tls_key):
            if path is not None and not path.is_file():
                raise RefusedInput(f"{path} is not a file")


class Server(uvicorn.Server):
    """uvicorn's server without its signal handlers, which end the process before it has cleaned up."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to :func:`run`."""
        yield


def run(application: Any, ports: Ports, limits: ServerLimits, ready: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM; call ``ready`` with the address once the port is open.

    Requests in flight then have ``shutdown_seconds``, or until the next signal. Requests that are not
    done are cut, and their clients get an error.

    Raises:
        RefusedInput: if the port is taken, or the certificate cannot be used.
    """
    ports.check()
    asyncio.run(_run(application, ports, limits, ready))


async def _run(
    application: Any, ports: Ports, limits: ServerLimits, ready: Callable[[str], None]
) -> None:
    server = Server(server_config(application, limits, ports))
    # FastAPI calls what blocks in these threads: requests that wait for models leave some free.
    to_thread.current_default_thread_limiter().total_tokens += limits.model_requests
    try:
        server.config.load()
    except OSError as error:
        raise RefusedInput(f"the certificate cannot be used: {error}") from error

    def end() -> None:
        if not server.should_exit:
            seconds = limits.shutdown_seconds
            _log.info("ends within %g s, or at once by a second signal", seconds)
        # The second signal does not wait for requests in flight.
        server.force_exit = server.should_exit
        server.should_exit = True

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, end)
    try:
        sockets = listen(ports.host, ports.port)
    except OSError as error:
        text = f"port {ports.port} of {ports.host} cannot be opened: {error.strerror}"
        raise RefusedInput(text) from error
    serving = asyncio.ensure_future(server.serve(sockets))
    while not server.started and not serving.done():
        await asyncio.sleep(0.01)
    host, port = sockets[0].getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    ready(f"http{'s' if server.config.is_ssl else ''}://{shown}:{port}")
    await serving
    # asyncio.run would cancel these a second time, while they write their last error.
    left = server.server_state.tasks
    for task in left:
        if not task.cancelling():
            task.cancel()
    if left:
        await asyncio.wait(left, timeout=LAST_SECONDS)


def listen(host: str, port: int) -> list[socket.socket]:
    """Return a listening socket for each address of ``host`` that this machine has.

    Raises:
        OSError: if the port is taken, or the machine has none of the addresses.
    """
    found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    made: list[socket.socket] = []
    missing: OSError | None = None
    for family, _, _, _, address in dict.fromkeys(found):
        try:
            made.append(socket.create_server(address, family=family, backlog=2048))
        except OSError as error:
            # localhost has ::1, also on a machine without IPv6.
            if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                raise
            missing = error
    if not made and missing is not None:
        raise missing
    return made


def server_config(application: Any, limits: ServerLimits, ports: Ports) -> uvicorn.Config:
    """Return the settings of uvicorn for a server."""
    return uvicorn.Config(
        application,
        http="httptools",
        limit_concurrency=limits.connections,
        timeout_keep_alive=round(limits.idle_seconds),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        # The log names the address that is connected: clients can write any X-Forwarded-For.
        proxy_headers=False,
        # Declared as whole seconds, and waited for as any number.
        timeout_graceful_shutdown=limits.shutdown_seconds,  # type: ignore[arg-type]
        ssl_certfile=ports.tls_certificate,
        ssl_keyfile=ports.tls_key,
    )
