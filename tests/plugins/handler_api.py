"""An API with handlers chosen by the request head."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import request_response

from luthier.server.http import messages
from luthier.server.http.application import Api
from luthier.server.http.messages import Fault, RequestHead

Endpoint = Callable[[Request], Awaitable[Response]]


def handler_api(
    name: str,
    choose: Callable[[RequestHead], Endpoint],
    refusal: Callable[[Fault, str], messages.Response],
    serves: Callable[[RequestHead, str], bool] = lambda head, service: True,
    **options: Any,
) -> Api:
    """Return an API whose endpoint for a request is ``choose(head)``."""

    async def endpoint(request: Request) -> Response:
        return await choose(request.state.body.head)(request)

    return Api(name, request_response(endpoint), serves, refusal, **options)
