"""The Bedrock face: routes by botocore's service models, and faults as AWS writes them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from botocore.model import OperationModel

from luthier.limits import BODY_BYTES
from luthier.server.bedrock import custom_models, endpoints, foundation, jobs, tags
from luthier.server.bedrock.control import Control, Operate, handler
from luthier.server.bedrock.hyperparameters import setting_name
from luthier.server.bedrock.shapes import error_statuses, operation_models
from luthier.server.http.messages import Fault, Request, RequestHead, Response
from luthier.server.http.routing import Handler, Operation, Route, Router

CONTROL: Mapping[str, Operate] = {
    **foundation.OPERATIONS,
    **jobs.OPERATIONS,
    **custom_models.OPERATIONS,
    **endpoints.OPERATIONS,
    **tags.OPERATIONS,
}
"""The operations of the control plane by their names."""

CONTROL_BODY = 2_000_000
"""Bytes of a request to the control plane at most."""
_STATUS = {
    "UnknownOperation": 404,
    "Serialization": 400,
    "RequestEntityTooLarge": 413,
    "MissingAuthenticationToken": 403,
    "IncompleteSignature": 403,
    "UnrecognizedClient": 403,
    "InvalidSignature": 403,
}
"""Of what every service of AWS answers, and no service model names."""


class BedrockFace:
    """What clients of ``bedrock`` and ``bedrock-runtime`` talk to."""

    name, request_id_header = "bedrock", "x-amzn-RequestId"

    def __init__(self, control: Control, runtime: Mapping[str, Handler]) -> None:
        """``runtime`` answers to the operations of the runtime, by their names."""
        models = operation_models()
        handlers = {name: handler(control, models[name], act) for name, act in CONTROL.items()}
        handlers |= runtime
        if unknown := handlers.keys() - models.keys():
            raise ValueError(f"no operations of Bedrock: {', '.join(sorted(unknown))}")
        self._router = Router(map(partial(_operation, handlers), models.values()), empty=True)

    def serves(self, head: RequestHead, service: str) -> bool:
        """Whatever is for no other face."""
        return True

    def route(self, head: RequestHead) -> Route:
        """What answers to a request.

        Raises:
            Fault: UnknownOperation where the service models have nothing there.
        """
        route = self._router.route(head.method, head.path)
        if route is None:
            raise Fault("UnknownOperation", "There is no operation at this path.")
        return route

    def refusal(self, fault: Fault, request_id: str) -> Response:
        """``fault`` as botocore reads it: its code in a header, its message in the body."""
        fault = fault.with_setting_names(setting_name)
        status = error_statuses().get(fault.code) or _STATUS.get(fault.code, 400)
        body: dict[str, Any] = {"message": fault.message}
        headers = {"x-amzn-ErrorType": f"{fault.code}Exception"}
        if fault.code in ("Throttling", "ModelNotReady", "ServiceUnavailable"):
            headers["Retry-After"] = str(fault.details.get("retry_after", 1))
        for name in ("resourceName", "originalStatusCode", "originalMessage"):
            if name in fault.details:
                body[name] = fault.details[name]
        return Response.json(body, status, **headers)


def _operation(handlers: Mapping[str, Handler], model: OperationModel) -> Operation:
    """The operation of a service model; what has no handler refuses what it is sent."""

    def refuse(request: Request) -> Response:
        raise Fault("Validation", f"{model.name} is not supported by this server.")

    runtime = model.service_model.service_name == "bedrock-runtime"
    return Operation(
        model.name,
        model.http["method"],
        model.http["requestUri"],
        handlers.get(model.name, refuse),
        BODY_BYTES if runtime else CONTROL_BODY,
        long=runtime,
        action=f"bedrock:{model.name if model.name in handlers else 'Unsupported'}",
    )
