"""Routes of the APIs: permissions, body limits, slots for models, and errors as faults."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Generic, Self, TypeVar
from urllib.parse import parse_qs, unquote

from fastapi import APIRouter, Depends, FastAPI, Path, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.params import Form
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
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
"""An operation of an AWS API."""
NOT_CAPTURED = frozenset({"CountTokens", "openai.vector_stores.search"})
"""Operations with a model and without output of the model."""
MOST_FIELDS, MOST_FIELD_BYTES = 64, 1 << 16
"""Limits of a form: number of fields, and size of a field in bytes."""


class _ParsedRequest(Request):
    """A request with the parsed body in ``state.json``."""

    async def body(self) -> bytes:
        """Return any text, so that FastAPI calls :meth:`json`."""
        return b"{}"

    async def json(self) -> Any:
        """Return the parsed body."""
        return self.state.json


class ApiRoute(APIRoute):
    """FastAPI route for callers with the permission of the route's action.

    The role is checked before the body is read. JSON is parsed with the limits of the server.
    """

    operation: str
    """Name of the route in the request log and metrics."""
    action: str
    """Action that the caller's role must allow."""
    body_limit: ClassVar[int] = BODY_BYTES

    def invalid(self, error: RequestValidationError) -> Fault:
        """Return the fault for a request that does not match the function's parameters."""
        raise NotImplementedError

    def not_json(self, error: ValueError) -> Fault:
        """Return the fault for a body that is not JSON."""
        return Fault("Serialization", f"The body is not valid JSON: {error}.")

    async def parse(self, request: Request) -> Any:
        """Return the JSON of the body; an empty body is an empty object."""
        body = await request.body()
        try:
            # Parsing 500,000 values in the event loop would delay all other requests.
            return await run_in_threadpool(parse_json, body) if body.strip() else {}
        except ValueError as error:
            raise self.not_json(error) from error

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return FastAPI's handler, wrapped to raise only faults."""
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
                    # FastAPI reuses the parsed form, and would parse without these limits.
                    await request.form(
                        max_files=1, max_fields=MOST_FIELDS, max_part_size=MOST_FIELD_BYTES
                    )
                    return await handle(request)
                state.json = await self.parse(request)
                # FastAPI parses JSON only under this content type, which clients may omit.
                MutableHeaders(scope=request.scope)["content-type"] = "application/json"
                return await handle(_ParsedRequest(request.scope))
            except RequestValidationError as error:
                raise self.invalid(error) from None
            except (Fault, ClientDisconnect, HTTPException):
                raise
            except Exception as error:
                # FastAPI would return its own response for other errors.
                raise fault_of(error, state.record.request_id) from error

        return respond


ContextT = TypeVar("ContextT")


@dataclass(frozen=True)
class ApiCall(Generic[ContextT]):
    """A call of an operation by an authenticated caller."""

    context: ContextT
    """Services for the operations."""
    caller: messages.Caller
    action: str
    """Action of the operation in the audit log."""

    @classmethod
    async def of(cls, request: Request) -> Self:
        """Return the call for a request; a dependency of operations."""
        action = request.scope["route"].action
        return cls(request.app.state.context, request.state.caller, action)

    @property
    def account(self) -> str:
        """Account of the caller."""
        return self.caller.account


def api_router(prefix: str, route_class: type[ApiRoute], **options: Any) -> APIRouter:
    """Return an empty router for operations below ``prefix``."""
    # The security scheme is for the OpenAPI document: the application has verified the key.
    key = Security(HTTPBearer(auto_error=False))
    return APIRouter(prefix=prefix, route_class=route_class, dependencies=[key], **options)


async def refuse(request: Request, error: Exception) -> Response:
    """Respond to an exception of a route or of the router."""
    state = request.state
    if isinstance(error, ClientDisconnect):
        state.record.error = DISCONNECTED
        # Starlette requires a response, which no client reads.
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
    # Starlette reports the methods of the first route only.
    routes = request.app.routes
    matching = [each for each in routes if each.matches(request.scope)[0] is not Match.NONE]
    allow = ", ".join(sorted(set().union(*(each.methods for each in matching))))
    return Fault("MethodNotAllowed", f"{path} supports {allow}.", allow=allow)


def api_application(routes: Sequence[BaseRoute], context: Any, **options: Any) -> FastAPI:
    """Return a FastAPI application for routes of the class :class:`ApiRoute`.

    Routes find ``context`` in ``app.state``.
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


async def _model_slot(request: Request) -> AsyncIterator[None]:
    state = request.state
    body = getattr(state, "json", None)
    captured = state.record.operation not in NOT_CAPTURED
    if state.observed and body is not None and captured:
        state.observed.begin(state.caller, body, unquote(request.path_params.get("model", "")))
    async with state.model_slot():
        yield


async def _grading_slot(request: Request) -> AsyncIterator[None]:
    async with request.state.grading_slot():
        yield


async def _report_slot(request: Request) -> AsyncIterator[None]:
    async with request.state.report_slot():
        yield


async def _stream_slot(request: Request) -> AsyncIterator[None]:
    async with request.state.stream_slot():
        yield


# The scope `function` frees the slot before the response is sent, possibly to a slow client.
MODEL_SLOT = Depends(_model_slot, scope="function")
"""Dependency for a slot of requests to models."""
GRADING_SLOT = Depends(_grading_slot, scope="function")
"""Dependency for a slot of requests with a grader."""
REPORT_SLOT = Depends(_report_slot, scope="function")
"""Dependency for a slot of data reports and estimates."""
STREAM_SLOT = Depends(_stream_slot)
"""Dependency that occupies a slot for a stream until the response is sent."""


Name = Annotated[str, Path(min_length=1), AfterValidator(unquote)]
"""Decoded segment of the raw path. An ARN in a path has encoded slashes."""


def read_head(request: Request, body: bytes = b"") -> messages.Request:
    """Return the request for a handler of an AWS API."""
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
    """Return a Starlette endpoint for an operation of an AWS API.

    Args:
        handler: Responds to the complete request, in a thread.
        name: Name of the operation in the request log and metrics.
        action: Action that the caller's role must allow.
        body_limit: Maximum size of the body in bytes.
        uses_model: True if the request needs a slot for requests to models.
    """

    async def endpoint(request: Request) -> Response:
        state = request.state
        state.record.operation = name
        state.body.limit = body_limit
        authorize(state.caller, action, request.scope["path"])
        call = read_head(request, await request.body())
        if not uses_model:
            return to_starlette(await run_in_threadpool(handler, call))
        if state.observed and name not in NOT_CAPTURED:
            metadata = call.headers.get("x-amzn-bedrock-request-metadata", "")
            state.observed.begin(call.caller, call.body, call.params.get("modelId", ""), metadata)
        async with state.model_slot():
            answer = await run_in_threadpool(handler, call)
        return to_starlette(answer)

    return endpoint
