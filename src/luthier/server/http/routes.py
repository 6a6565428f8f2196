"""Routes of the APIs: permissions, bodies with limits, slots for models, and errors as faults."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Annotated, Any, ClassVar
from urllib.parse import parse_qs, unquote

from fastapi import Depends, FastAPI, Path, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.params import Form
from fastapi.routing import APIRoute
from pydantic import AfterValidator
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import BaseRoute, Match

from luthier.limits import BODY_BYTES
from luthier.server.http import messages
from luthier.server.http.messages import Fault, fault_of, parse_json
from luthier.server.http.streams import DISCONNECTED, to_starlette
from luthier.server.roles import authorize
from luthier.server.tables.database import now

Handler = Callable[[messages.Request], messages.Response]
"""An operation of an API of AWS."""
MOST_FIELDS, MOST_FIELD_BYTES = 64, 1 << 16
"""Limits of a form: number of fields, and size of a field in bytes."""


class _ParsedRequest(Request):
    """A request whose body is parsed into ``state.json``."""

    async def body(self) -> bytes:
        """Return any text: FastAPI asks for JSON if there is text."""
        return b"{}"

    async def json(self) -> Any:
        """Return the parsed body."""
        return self.state.json


class ApiRoute(APIRoute):
    """A route of FastAPI for callers whose role allows the action of the route.

    The role is checked before the body is read, and JSON is parsed with the limits of the server.
    """

    operation: str
    """Name of the route in the request log and metrics."""
    action: str
    """Action that the role of the caller must allow."""
    body_limit: ClassVar[int] = BODY_BYTES

    def invalid(self, error: RequestValidationError) -> Fault:
        """Return the fault for a request that does not match the parameters of the function."""
        raise NotImplementedError

    def not_json(self, error: ValueError) -> Fault:
        """Return the fault for a body that is not JSON."""
        return Fault("Serialization", f"The body is no JSON: {error}.")

    async def parse(self, request: Request) -> Any:
        """Return the JSON of the body; an empty body is an empty object."""
        body = await request.body()
        try:
            return await run_in_threadpool(parse_json, body) if body.strip() else {}
        except ValueError as error:
            raise self.not_json(error) from error

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Wrap FastAPI's handler, so that it raises only faults."""
        handle = super().get_route_handler()

        async def respond(request: Request) -> Response:
            state = request.state
            state.record.operation = self.operation
            state.body.limit = self.body_limit
            try:
                authorize(state.caller, self.action, request.scope["path"])
                if self.body_field is None:
                    return await handle(request)
                if isinstance(self.body_field.field_info, Form):
                    # FastAPI finds the form that was read here, with these limits.
                    await request.form(
                        max_files=1, max_fields=MOST_FIELDS, max_part_size=MOST_FIELD_BYTES
                    )
                    return await handle(request)
                state.json = await self.parse(request)
                MutableHeaders(scope=request.scope)["content-type"] = "application/json"
                return await handle(_ParsedRequest(request.scope))
            except RequestValidationError as error:
                raise self.invalid(error) from None
            except (Fault, ClientDisconnect, HTTPException):
                raise
            except Exception as error:
                # FastAPI would respond to other errors itself.
                raise fault_of(error, state.record.request_id) from error

        return respond


async def refuse(request: Request, error: Exception) -> Response:
    """Respond to an exception of a route or of the router."""
    state = request.state
    if isinstance(error, ClientDisconnect):
        state.record.error = DISCONNECTED
        return Response(status_code=499)
    if isinstance(error, HTTPException) and error.status_code in (404, 405):
        error = _unknown(request, error.status_code)
    refused: Response = state.api.refuse(error, state.record)
    return refused


def _unknown(request: Request, status: int) -> Fault:
    """Return the fault for a path or method without a route."""
    path = request.scope["path"]
    if status == 404:
        return Fault("UnknownOperation", f"There is no {request.method} {path}.")
    # Starlette names the methods of only one route.
    routes = request.app.routes
    found = [each for each in routes if each.matches(request.scope)[0] is not Match.NONE]
    allow = ", ".join(sorted(set().union(*(each.methods for each in found))))
    return Fault("MethodNotAllowed", f"{path} takes {allow}.", allow=allow)


def api_application(routes: Sequence[BaseRoute], context: Any, **options: Any) -> FastAPI:
    """Return an application of FastAPI whose routes are of :class:`ApiRoute`.

    ``context`` is in ``app.state`` for the routes.
    """
    app = FastAPI(
        routes=list(routes),
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        exception_handlers=dict.fromkeys((Fault, HTTPException, ClientDisconnect), refuse),
        telemetry={"tracing": False, "metrics": False, "logs": False},
        **options,
    )
    app.state.context = context
    return app


async def _model_turn(request: Request) -> AsyncIterator[None]:
    async with request.state.model_turn():
        yield


async def _grading_turn(request: Request) -> AsyncIterator[None]:
    async with request.state.grading_turn():
        yield


async def _stream_turn(request: Request) -> AsyncIterator[None]:
    async with request.state.stream_turn():
        yield


MODEL_TURN = Depends(_model_turn, scope="function")
"""Waits for a slot for requests that use a model."""
GRADING_TURN = Depends(_grading_turn, scope="function")
"""Waits for a slot for requests that run a grader."""
STREAM_TURN = Depends(_stream_turn)
"""Occupies a slot for streamed responses until the response is sent."""


Name = Annotated[str, Path(min_length=1), AfterValidator(unquote)]
"""Segment of the raw path: an ARN has encoded slashes."""


def read_head(request: Request, body: bytes = b"") -> messages.Request:
    """Return the request for a handler of an API of AWS."""
    state, head = request.state, request.state.body.head
    return messages.Request(
        state.record.request_id,
        state.caller,
        head.method,
        head.path,
        parse_qs(head.query, keep_blank_values=True),
        dict(head.headers),
        body,
        now(),
        request.path_params,
        state.record.address,
        state.signed,
        head.tls,
    )


def handler_endpoint(
    handler: Handler, name: str, action: str, body_limit: int, uses_model: bool = False
) -> Callable[[Request], Awaitable[Response]]:
    """Return Starlette's endpoint for an operation of an API of AWS.

    Args:
        handler: Responds to the request with its whole body, in a thread.
        name: Name of the operation in the request log and metrics.
        action: Action that the role of the caller must allow.
        body_limit: Maximum size of the body in bytes.
        uses_model: Whether the request waits for a slot for requests that use a model.
    """

    async def endpoint(request: Request) -> Response:
        state = request.state
        state.record.operation = name
        state.body.limit = body_limit
        authorize(state.caller, action, request.scope["path"])
        call = read_head(request, await request.body())
        if not uses_model:
            return to_starlette(await run_in_threadpool(handler, call))
        async with state.model_turn():
            answer = await run_in_threadpool(handler, call)
        return to_starlette(answer)

    return endpoint
