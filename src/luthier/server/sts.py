"""The STS API: ``GetCallerIdentity``, in AWS's query protocol.

A request is a form, in the body of a POST or the query of a GET; the response is XML.
Source: AWS Security Token Service API reference, version 2011-06-15.
"""

from __future__ import annotations

from urllib.parse import parse_qsl

from starlette.routing import request_response

from luthier.server.actions import record_action
from luthier.server.http.application import Api
from luthier.server.http.messages import Fault, Request, Response
from luthier.server.http.routes import handler_endpoint
from luthier.server.s3.documents import Element, document

NAMESPACE = "https://sts.amazonaws.com/doc/2011-06-15/"
ACTION = "sts:GetCallerIdentity"
BODY_LIMIT = 65_536
"""Maximum size of a form in bytes."""
_ERRORS = {
    "AccessDenied": ("AccessDenied", 403),
    "IncompleteSignature": ("IncompleteSignature", 400),
    "InternalServer": ("InternalFailure", 500),
    "InvalidSignature": ("SignatureDoesNotMatch", 403),
    "MissingAuthenticationToken": ("MissingAuthenticationToken", 403),
    "RequestEntityTooLarge": ("RequestEntityTooLarge", 413),
    "Serialization": ("ValidationError", 400),
    "ServiceUnavailable": ("ServiceUnavailable", 503),
    "Throttling": ("Throttling", 400),
    "UnknownOperation": ("InvalidAction", 400),
    "UnrecognizedClient": ("InvalidClientTokenId", 403),
    "Validation": ("ValidationError", 400),
}
"""STS's code and status by error code of the server."""


def sts_api() -> Api:
    """Return the API of ``aws sts get-caller-identity``, for all requests signed for STS."""
    app = request_response(handler_endpoint(_respond, "sts", ACTION, BODY_LIMIT))
    return Api("sts", app, lambda head, service: service == "sts", render_fault, "x-amzn-RequestId")


def render_fault(fault: Fault, request_id: str) -> Response:
    """Return ``fault`` in the form that botocore expects of STS."""
    code, status = _ERRORS.get(fault.code, (fault.code, 400))
    error: list[Element | None] = [
        ("Type", "Sender" if status < 500 else "Receiver"),
        ("Code", code),
        ("Message", fault.message),
    ]
    body = document("ErrorResponse", [("Error", error), ("RequestId", request_id)], NAMESPACE)
    return Response(status, body, {"Content-Type": "text/xml"})


def _respond(request: Request) -> Response:
    if request.method not in ("GET", "POST"):
        raise Fault("UnknownOperation", "STS accepts GET and POST.")
    if request.signed is None or not request.signed.service:
        raise Fault("IncompleteSignature", "STS accepts signatures only, not API keys.")
    action = _action(request)
    if action != "GetCallerIdentity":
        text = f"Could not find operation {action[:100]}; this server has GetCallerIdentity only."
        raise Fault("UnknownOperation", text)
    caller = request.caller
    record_action(ACTION, "*")
    result: list[Element | None] = [
        ("Arn", caller.arn),
        ("UserId", caller.id),
        ("Account", caller.account),
    ]
    content: list[Element | None] = [
        ("GetCallerIdentityResult", result),
        ("ResponseMetadata", [("RequestId", request.request_id)]),
    ]
    body = document("GetCallerIdentityResponse", content, NAMESPACE)
    return Response(200, body, {"Content-Type": "text/xml"})


def _action(request: Request) -> str:
    """Return the single ``Action`` of the form or query; raises :class:`Fault` for several."""
    try:
        form = parse_qsl(request.body.decode(), keep_blank_values=True, errors="strict")
    except ValueError as error:
        raise Fault("MalformedQueryString", "The body is not a form in UTF-8.") from error
    named = [value for name, value in form if name == "Action"] + request.query.get("Action", [])
    if len(named) > 1:
        raise Fault("MalformedQueryString", "The parameter Action occurs more than once.")
    return named[0] if named else ""
