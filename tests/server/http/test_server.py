"""Settings of uvicorn: trusted proxies."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from luthier.errors import RefusedInput
from luthier.limits import ServerLimits
from luthier.server.http.messages import address_of, head_of
from luthier.server.http.server import Ports, listen, server_config

FORWARDED = [(b"x-forwarded-proto", b"https"), (b"x-forwarded-for", b"198.51.100.7")]


def received(ports: Ports, peer: str) -> tuple[bool, str]:
    """Return whether the application sees TLS, and the client's address."""
    seen = list[tuple[bool, str]]()

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append((head_of(scope).tls, address_of(scope)))

    config = server_config(application, ServerLimits(), ports)
    config.load()
    scope: dict[str, Any] = {
        "type": "http", "method": "PUT", "path": "/b/k", "query_string": b"", "scheme": "http",
        "headers": FORWARDED, "client": (peer, 1),
    }  # fmt: skip
    app: Any = config.loaded_app
    asyncio.run(app(scope, None, None))
    return seen[0]


@pytest.mark.parametrize("peer", ["127.0.0.1", "::1", "::ffff:127.0.0.1"])
def test_loopback_is_a_trusted_proxy(peer: str) -> None:
    assert received(Ports(), peer) == (True, "198.51.100.7")


@pytest.mark.parametrize("peer", ["10.1.2.3", "::ffff:10.1.2.3"])
def test_forwarded_headers_of_a_trusted_network(peer: str) -> None:
    assert received(Ports(trusted_proxies=("10.1.0.0/16",)), peer) == (True, "198.51.100.7")


@pytest.mark.parametrize(
    ("ports", "peer"),
    [
        (Ports(), "10.1.2.3"),
        (Ports(), "::ffff:10.1.2.3"),
        (Ports(trusted_proxies=("10.1.2.4",)), "10.1.2.3"),
        (Ports(trusted_proxies=("10.1.2.4",)), "127.0.0.1"),
    ],
)
def test_forwarded_headers_of_untrusted_peers_are_ignored(ports: Ports, peer: str) -> None:
    assert received(ports, peer) == (False, peer)


@pytest.mark.parametrize("text", ["*", "proxy.example.com", "10.1.2.3/8", ""])
def test_invalid_proxy_address(text: str) -> None:
    with pytest.raises(RefusedInput, match="--trusted-proxy"):
        Ports(trusted_proxies=(text,)).check()


def test_port_in_use_is_refused() -> None:
    with listen("127.0.0.1", 0) as listening, pytest.raises(RefusedInput):
        Ports(port=listening.getsockname()[1]).check()


def test_accepted_connections_send_without_delay() -> None:
    with listen("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname()):
        accepted, _ = listening.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
