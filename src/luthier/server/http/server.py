"""The uvicorn server: runs an application until SIGINT or SIGTERM."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import signal
import socket
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import h11
import uvicorn
from anyio import to_thread
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from luthier.errors import RefusedInput
from luthier.limits import ServerLimits
from luthier.server.http.messages import HEAD_BYTES

LAST_SECONDS = 10.0
"""Time limit for cancelled requests to send an error at shutdown, in seconds."""
LOOPBACK = ("127.0.0.0/8", "::1")
"""Addresses of proxies on this machine."""
_log = logging.getLogger("luthier.server")


@dataclass(frozen=True)
class Ports:
    """Address, port and TLS certificate of a server."""

    host: str = "127.0.0.1"
    port: int = 8080
    """Port number; 0 for a free port."""
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    trusted_proxies: Sequence[str] = LOOPBACK
    """Addresses and networks whose ``X-Forwarded-Proto`` and ``X-Forwarded-For`` are believed."""

    def check(self) -> None:
        """Check the certificate files, the addresses of proxies and the port.

        Raises:
            RefusedInput: If the certificate or the key is missing, an address is invalid, or the
                port is in use.
        """
        self.proxy_networks()
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise RefusedInput("`--tls-cert` and `--tls-key` are required together")
        for path in (self.tls_certificate, self.tls_key):
            if path is not None and not path.is_file():
                raise RefusedInput(f"{path} is not a file")
        self.open().close()

    def open(self) -> socket.socket:
        """Return a listening socket.

        Raises:
            RefusedInput: If the port is in use, or the machine does not have the address.
        """
        try:
            return listen(self.host, self.port)
        except OSError as error:
            text = f"port {self.port} of {self.host} cannot be opened: {error.strerror}"
            raise RefusedInput(text) from error

    def proxy_networks(self) -> list[str]:
        """Return the networks of the trusted proxies."""
        networks = list[str]()
        for text in self.trusted_proxies:
            try:
                network = ipaddress.ip_network(text)
            except ValueError as error:
                raise RefusedInput(
                    f"--trusted-proxy {text!r} is neither an IP address nor a network such as "
                    f"10.1.0.0/16: {error}"
                ) from error
            networks.append(str(network))
            if network.version == 4:
                # A socket for IPv4 and IPv6 reports clients of IPv4 as ::ffff:127.0.0.1.
                networks.append(f"::ffff:{network.network_address}/{96 + network.prefixlen}")
        return networks


class HttpProtocol(H11Protocol):
    """HTTP/1.1 with a request id and a log line for malformed requests."""

    def send_400_response(self, msg: str) -> None:
        """Respond to a request that is not HTTP: the application cannot know its API."""
        request_id = str(uuid.uuid4())
        fields = {"status": 400, "address": self.client[0] if self.client else ""}
        _log.warning("malformed HTTP", extra={"request_id": request_id, "fields": fields})
        error = {"message": msg, "type": "invalid_request_error", "param": None, "code": None}
        headers = [
            ("Content-Type", "application/json"),
            ("X-Request-Id", request_id),
            ("Connection", "close"),
        ]
        for event in (
            h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
            h11.Data(data=json.dumps({"error": error}).encode()),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event))
        self.transport.close()


def run(
    application: ASGIApp, ports: Ports, limits: ServerLimits, ready: Callable[[str], None]
) -> None:
    """Serve until SIGINT or SIGTERM; call ``ready`` with the address as soon as the port is open.

    After the signal, running requests have ``shutdown_seconds``, or until a second SIGINT. Slower
    requests are cancelled, and the clients receive an error.

    Raises:
        RefusedInput: If the port is in use, or the certificate is invalid.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        # uvicorn raises the signal again after its shutdown, and would end the process before cleanup.
        signal.signal(number, lambda number, frame: None)
    asyncio.run(_run(application, ports, limits, ready))


async def _run(
    application: ASGIApp, ports: Ports, limits: ServerLimits, ready: Callable[[str], None]
) -> None:
    server = uvicorn.Server(server_config(application, limits, ports))
    # FastAPI runs operations in these threads; requests waiting for models must not use all threads.
    waiting = limits.model_requests + limits.grading_requests
    to_thread.current_default_thread_limiter().total_tokens += waiting
    try:
        server.config.load()
    except OSError as error:
        raise RefusedInput(f"the certificate is invalid: {error}") from error
    # uvicorn would log an error of the port and call sys.exit.
    listening = ports.open()
    serving = asyncio.ensure_future(server.serve([listening]))
    # uvicorn sets a flag at the start and offers no event.
    while not server.started and not serving.done():
        await asyncio.sleep(0.01)
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    ready(f"http{'s' if server.config.is_ssl else ''}://{shown}:{port}")
    await serving
    # asyncio.run would cancel requests a second time, while they send the error.
    left = server.server_state.tasks
    for task in left:
        if not task.cancelling():
            task.cancel()
    if left:
        await asyncio.wait(left, timeout=LAST_SECONDS)


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; ``::`` listens on all IPv4 and IPv6 addresses.

    Raises:
        OSError: If the port is in use, or the machine does not have the address.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.create_server(
        (host, port), family=family, backlog=2048, dualstack_ipv6=host == "::"
    )
    # asyncio sets this option only on sockets it opens itself. Without it a body waits 40 ms for the
    # client's acknowledgement of the head.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def server_config(application: ASGIApp, limits: ServerLimits, ports: Ports) -> uvicorn.Config:
    """Return uvicorn's settings."""
    return uvicorn.Config(
        application,
        # h11 limits the size of a head; httptools does not.
        http=HttpProtocol,
        h11_max_incomplete_event_size=HEAD_BYTES,
        limit_concurrency=limits.connections,
        timeout_keep_alive=round(limits.idle_seconds),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=True,
        forwarded_allow_ips=ports.proxy_networks(),
        # uvicorn declares int, but accepts float.
        timeout_graceful_shutdown=limits.shutdown_seconds,  # type: ignore[arg-type]
        ssl_certfile=ports.tls_certificate,
        ssl_keyfile=ports.tls_key,
    )
