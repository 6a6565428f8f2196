"""The Bedrock face: routes by botocore's service models, and faults as AWS writes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from luthier.api.bedrock import custom_models, endpoints, foundation, jobs, tags
from luthier.api.bedrock.control import Control, Operate, handler
from luthier.api.bedrock.hyperparameters import setting_name
from luthier.api.bedrock.operations import Operations, operations
from luthier.api.wire import Answer, Call, Fault, Handler, Route
from luthier.limits import BODY_BYTES

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
_REQUEST_ID = "x-amzn-RequestId"
_STATUS = {
    "UnknownOperation": 404,
    "Serialization": 400,
    "RequestEntityTooLarge": 413,
    "RequestTimeout": 408,
    "MissingAuthenticationToken": 403,
    "IncompleteSignature": 403,
    "UnrecognizedClient": 403,
    "InvalidSignature": 403,
    "ExpiredToken": 403,
}
"""Of what every service of AWS answers, and no service model names."""


class BedrockFace:
    """Fulfils ``luthier.api.wire.Face``."""

    def __init__(self, control: Control, handlers: Mapping[str, Handler]) -> None:
        """``handlers`` answer to the operations of the runtime, by their names."""
        self._operations: Operations = operations()
        self._handlers: dict[str, Handler] = {
            name: handler(control, self._operations.by_name[name], operate)
            for name, operate in CONTROL.items()
        }
        self._handlers.update(handlers)
        unknown = self._handlers.keys() - self._operations.by_name.keys()
        if unknown:
            raise ValueError(f"no operations of Bedrock: {', '.join(sorted(unknown))}")

    def route(self, method: str, path: str) -> Route:
        """What answers to ``method`` on the raw ``path``.

        Raises:
            Fault: UnknownOperation where the service models have nothing there.
        """
        found = self._operations.find(method, path)
        if found is None:
            raise Fault("UnknownOperation", "There is no operation at this path.")
        operation, params = found
        runtime = operation.service == "bedrock-runtime"
        answer = _identified(self._handlers.get(operation.name) or _refusing(operation.name))
        limit = BODY_BYTES if runtime else CONTROL_BODY
        return Route(operation.name, answer, params, limit, long=runtime)

    def refusal(self, fault: Fault, request_id: str) -> Answer:
        """``fault`` as botocore reads it: its code in a header, its message in the body."""
        fault = fault.named(setting_name)
        status = self._operations.error_status.get(fault.code) or _STATUS.get(fault.code, 400)
        body: dict[str, Any] = {"message": fault.message}
        headers = {"x-amzn-ErrorType": f"{fault.code}Exception", _REQUEST_ID: request_id}
        if fault.code in ("Throttling", "ModelNotReady", "ServiceUnavailable"):
            headers["Retry-After"] = str(fault.details.get("retry_after", 1))
        for name in ("resourceName", "originalStatusCode", "originalMessage"):
            if name in fault.details:
                body[name] = fault.details[name]
        return Answer.of(body, status, **headers)


def _identified(handle: Handler) -> Callable[[Call], Answer]:
    """Every answer names its request."""

    def answer(call: Call) -> Answer:
        given = handle(call)
        return Answer(given.status, given.body, {_REQUEST_ID: call.request_id, **given.headers})

    return answer


def _refusing(name: str) -> Handler:
    def refuse(call: Call) -> Answer:
        raise Fault("Validation", f"{name} is not supported by this server.")

    return refuse
