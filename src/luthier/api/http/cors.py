"""Pages of other origins that may call the service from a browser (CORS), by an allow-list.

Source: the Fetch standard, https://fetch.spec.whatwg.org/#http-cors-protocol.
"""

from __future__ import annotations

import re
from collections.abc import MutableMapping, Sequence
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from luthier.errors import RefusedInput

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
PREFLIGHT_SECONDS = 600
"""How long a browser may go by the answer to a preflight."""
_ORIGIN = re.compile(r"(https?)://(?:[a-z0-9._-]+|\[[0-9a-f:.]+\])(?::([0-9]{1,5}))?")
_DEFAULT_PORTS = {"http": "80", "https": "443"}


def check_origins(origins: Sequence[str]) -> tuple[str, ...]:
    """``origins`` if browsers could send each of them.

    Raises:
        RefusedInput: for ``*``, ``null``, and what no browser would write so: it would match nothing.
    """
    for origin in origins:
        found = _ORIGIN.fullmatch(origin)
        if found is None or found[2] == _DEFAULT_PORTS[found[1]]:
            raise RefusedInput(
                f"--cors-origin {origin!r}: write one origin as browsers send it, such as "
                "https://app.example or http://localhost:3000: lower case, no path, no default port, "
                "no wildcard"
            )
    return tuple(origins)


class AllowedOrigins:
    """An ASGI application that pages of some origins may call; all others get it without CORS headers.

    Preflights of allowed origins are answered here, before authentication, as they carry no key.
    Credentials are not allowed in the sense of CORS, which are cookies: keys and signatures stand in
    headers that a page sets itself.
    """

    def __init__(self, application: ASGIApp, origins: Sequence[str]) -> None:
        """``origins`` as :func:`check_origins` lets them pass."""
        self._application, self._origins = application, frozenset(origins)
        self._allowed = CORSMiddleware(
            application,
            allow_origins=self._origins,
            allow_methods=METHODS,
            # Clients send headers of their own (x-stainless-*), and S3's metadata have any name.
            allow_headers=("*",),
            expose_headers=("*",),
            max_age=PREFLIGHT_SECONDS,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._application(scope, receive, send)
            return
        given = [value for name, value in scope["headers"] if name == b"origin"]
        # Starlette's middleware would answer the preflights of other origins, too.
        if len(given) == 1 and given[0].decode("latin-1") in self._origins:
            await self._allowed(scope, receive, send)
            return

        async def send_with_vary(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                # A cache must not give this answer, which allows nobody, to an origin that is allowed.
                MutableHeaders(scope=message).add_vary_header("Origin")
            await send(message)

        await self._application(scope, receive, send_with_vary)
