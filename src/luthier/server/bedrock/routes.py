"""Routes of the Bedrock API, from botocore's service models, and errors in AWS's form."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any
from urllib.parse import unquote

from botocore.model import OperationModel
from starlette.convertors import Convertor, register_url_convertor
from starlette.routing import Route, Router

from luthier.limits import BODY_BYTES
from luthier.server.bedrock import custom_models, endpoints, foundation, jobs, logging, tags
from luthier.server.bedrock.control import Control, Operate, handler
from luthier.server.bedrock.hyperparameters import setting_name
from luthier.server.bedrock.shapes import error_statuses, operation_models
from luthier.server.http.application import Api
from luthier.server.http.messages import Fault, Request, Response
from luthier.server.http.routes import Handler, handler_endpoint

CONTROL: Mapping[str, Operate] = {
    **foundation.OPERATIONS,
    **jobs.OPERATIONS,
    **custom_models.OPERATIONS,
    **endpoints.OPERATIONS,
    **logging.OPERATIONS,
    **tags.OPERATIONS,
}
"""Operations of the control plane by name."""

CONTROL_BODY = 2_000_000
"""Maximum size of a request body to the control plane, in bytes."""
_STATUS = {
    "UnknownOperation": 404,
    "Serialization": 400,
    "RequestEntityTooLarge": 413,
    "MissingAuthenticationToken": 403,
    "IncompleteSignature": 403,
    "UnrecognizedClient": 403,
    "InvalidSignature": 403,
}
"""Status codes of errors that every AWS service returns and no service model names."""


class _Segment(Convertor[str]):
    """A segment of the raw path, decoded once. An ARN in a segment has encoded slashes.

    An empty segment matches too: the operation then reports an invalid identifier, like AWS.
    """

    regex = "[^/]*"

    def convert(self, value: str) -> str:
        """Return the decoded segment."""
        return unquote(value)

    def to_string(self, value: str) -> str:
        """Return ``value`` unchanged: routes never generate paths."""
        return value


register_url_convertor("segment", _Segment())


def bedrock_api(control: Control, runtime: Mapping[str, Handler]) -> Api:
    """Return the API for clients of ``bedrock`` and ``bedrock-runtime``.

    Args:
        control: the parts of the server behind the control plane.
        runtime: handlers of the runtime by operation name.

    Returns:
        The fallback API: the API serves all requests that no other API serves.
    """
    models = operation_models()
    handlers = {name: handler(control, models[name], act) for name, act in CONTROL.items()}
    handlers |= runtime
    if unknown := handlers.keys() - models.keys():
        raise ValueError(f"no operations of Bedrock: {', '.join(sorted(unknown))}")
    router = Router(routes_of(models.values(), handlers), redirect_slashes=False)
    return Api("bedrock", router, lambda head, service: True, render_fault, "x-amzn-RequestId")


def routes_of(models: Iterable[OperationModel], handlers: Mapping[str, Handler]) -> list[Route]:
    """Return the routes of the operations. Paths with a fixed segment precede paths with a
    parameter."""
    paths = {model.name: model.http["requestUri"].replace("}", ":segment}") for model in models}
    routes = []
    for model in sorted(
        models, key=lambda each: ["{" in part for part in paths[each.name].split("/")]
    ):
        runtime = model.service_model.service_name == "bedrock-runtime"
        action = f"bedrock:{model.name if model.name in handlers else 'Unsupported'}"
        endpoint = handler_endpoint(
            handlers.get(model.name) or partial(_reject, model.name),
            model.name,
            action,
            BODY_BYTES if runtime else CONTROL_BODY,
            uses_model=runtime,
        )
        routes.append(
            Route(paths[model.name], endpoint, methods=[model.http["method"]], name=action)
        )
    return routes


def _reject(name: str, request: Request) -> Response:
    raise Fault("Validation", f"{name} is not supported by this server.")


def render_fault(fault: Fault, request_id: str) -> Response:
    """Return ``fault`` as botocore expects: the code in a header, the message in the body."""
    fault = fault.with_setting_names(setting_name)
    status = error_statuses().get(fault.code) or _STATUS.get(fault.code, 400)
    body: dict[str, Any] = {"message": fault.message}
    headers = {"x-amzn-ErrorType": f"{fault.code}Exception"}
    if fault.code in ("Throttling", "ModelNotReady", "ServiceUnavailable"):
        headers["Retry-After"] = str(fault.details.get("retry_after", 1))
    if "resourceName" in fault.details:
        body["resourceName"] = fault.details["resourceName"]
    return Response.json(body, status, **headers)
