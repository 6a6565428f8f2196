"""The STS face: who a caller is, and temporary credentials, in AWS's query protocol.

Requests are forms, in the body of a POST or the query of a GET, and answers XML. Input shapes come from
botocore's service model of STS, as clients are made from the same file.
Source: AWS Security Token Service API reference, version 2011-06-15.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from functools import cache
from typing import Any
from urllib.parse import parse_qsl

from botocore.loaders import Loader
from botocore.model import ServiceModel, StructureShape
from sqlalchemy.orm import Session

from luthier.api.bedrock.shapes import ShapeChecker
from luthier.api.http.messages import Caller, Fault, Request, RequestHead, Response
from luthier.api.http.routing import Operation, Route
from luthier.api.policies import (
    ASSUME_ROLE,
    authorize,
    record_action,
    record_actions,
    refuse_denied,
    trusts,
)
from luthier.api.s3.documents import Content, Element, document
from luthier.errors import RefusedInput
from luthier.limits import ServerLimits
from luthier.store.database import Database
from luthier.store.policy_documents import check_document
from luthier.store.principals import AccessKey, IamRole, find_role
from luthier.store.sessions import ASSUMED, TemporaryKey, TemporarySession, issue

NAMESPACE = "https://sts.amazonaws.com/doc/2011-06-15/"
VERSION = "2011-06-15"
USER_SECONDS, ROLE_SECONDS = 43_200, 3600
"""How long credentials are good for where a call names no ``DurationSeconds``."""
CHAINED_SECONDS = 3600
"""The longest session of a role that was assumed from another role's session, as with AWS."""
ROLE_ARN = re.compile(r"arn:aws:iam::(?P<account>[0-9]{12}):role/(?P<name>[\w+=,.@-]{1,64})", re.A)
_UNSUPPORTED = {
    "PolicyArns": "there are no managed policies here; pass the document as Policy",
    "Tags": "conditions on tags are not evaluated here",
    "TransitiveTagKeys": "conditions on tags are not evaluated here",
    "SerialNumber": "there are no MFA devices here",
    "TokenCode": "there are no MFA devices here",
    "SourceIdentity": "the audit log names the user whose key began a session anyway",
    "ProvidedContexts": "there are no context providers here",
    "MinimumSessionTokenSize": "tokens are as long as they have to be",
}
"""Parameters that would change what credentials may do, or how they look: passed over they would be
taken for fulfilled."""
_ERRORS = {
    "AccessDenied": ("AccessDenied", 403),
    "ExpiredToken": ("ExpiredToken", 403),
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
"""Names of STS, with their statuses, by the names that the rest of the service has for the same."""


class STSFace:
    """One route: which action is meant stands in the form."""

    name, request_id_header = "sts", "x-amzn-RequestId"

    def __init__(self, database: Database, key: bytes, limits: ServerLimits) -> None:
        """``key`` is the server's, under which session tokens are sealed."""
        self._database, self._key = database, key
        self._body_bytes = limits.sts_body_bytes
        self._policy_chars, self._token_bytes = (
            limits.session_policy_characters,
            limits.session_token_bytes,
        )
        self._actions: dict[str, Callable[[Request, Mapping[str, Any]], list[Element | None]]] = {
            "GetCallerIdentity": self._get_caller_identity,
            "GetSessionToken": self._get_session_token,
            "AssumeRole": self._assume_role,
        }

    def serves(self, head: RequestHead, service: str) -> bool:
        """Whatever is signed for STS."""
        return service == "sts"

    def route(self, head: RequestHead) -> Route:
        """One route: which action is meant stands in the form."""
        if head.method not in ("GET", "POST"):
            raise Fault("UnknownOperation", "STS takes GET and POST.")
        return Route(Operation("sts", head.method, "/", self._answer, self._body_bytes))

    def refusal(self, fault: Fault, request_id: str) -> Response:
        """``fault`` as botocore reads it."""
        code, status = _ERRORS.get(fault.code, (fault.code, 400))
        error: list[Element | None] = [
            ("Type", "Sender" if status < 500 else "Receiver"),
            ("Code", code),
            ("Message", fault.message),
        ]
        body = document("ErrorResponse", [("Error", error), ("RequestId", request_id)], NAMESPACE)
        return Response(status, body, {"Content-Type": "text/xml"})

    def _answer(self, request: Request) -> Response:
        if request.caller.bearer:
            raise Fault("IncompleteSignature", "STS takes signatures only, and no API keys.")
        form = _form(request)
        action, version = form.pop("Action", ""), form.pop("Version", VERSION)
        act = self._actions.get(action)
        if act is None or version != VERSION:
            text = (
                f"Could not find operation {action[:100]} for version {version[:40]}; there are "
                f"{', '.join(self._actions)} of {VERSION} here."
            )
            raise Fault("UnknownOperation", text)
        result = act(request, _members(action, form))
        content: list[Element | None] = [
            (f"{action}Result", result),
            ("ResponseMetadata", [("RequestId", request.request_id)]),
        ]
        body = document(f"{action}Response", content, NAMESPACE)
        return Response(200, body, {"Content-Type": "text/xml"})

    def _get_caller_identity(
        self, request: Request, members: Mapping[str, Any]
    ) -> list[Element | None]:
        caller = request.caller
        # No policy is asked: with AWS even an explicit Deny does not keep anybody from it.
        record_action("sts:GetCallerIdentity", "*")
        return [("Arn", caller.arn), ("UserId", caller.id), ("Account", caller.account)]

    def _get_session_token(
        self, request: Request, members: Mapping[str, Any]
    ) -> list[Element | None]:
        caller = request.caller
        # No policy is asked here either, as with AWS: the credentials can do what the key can.
        record_action("sts:GetSessionToken", caller.arn)
        if caller.session is not None:
            text = "Cannot call GetSessionToken with session credentials"
            raise Fault("AccessDenied", text)
        with self._database.read() as session:
            begun = _session_of(session, request, members.get("DurationSeconds", USER_SECONDS))
        made = self._issue(begun)
        return [_credentials(made, begun.expires), *self._token_size(made)]

    def _assume_role(self, request: Request, members: Mapping[str, Any]) -> list[Element | None]:
        policy = self._session_policy(members.get("Policy"))
        name = members["RoleSessionName"]
        try:
            # The audit log names the role where it is refused, and the session where one begins.
            with record_actions(), self._database.read() as session:
                role = _assumable(session, request.caller, members["RoleArn"])
                seconds = _role_seconds(request.caller, role, members.get("DurationSeconds"))
                begun = _session_of(session, request, seconds)
        except Fault:
            record_action(ASSUME_ROLE, members["RoleArn"])
            raise
        earlier = request.caller.session.roles if request.caller.session else ()
        roles = (*(each for each in earlier if each != role.id), role.id)
        begun = begun.model_copy(update={"roles": roles, "name": name, "policy": policy})
        made = self._issue(begun)
        arn = f"arn:aws:sts::{role.account}:{ASSUMED}/{role.name}/{name}"
        record_action(ASSUME_ROLE, arn)
        size = self._token_size(made)
        return [
            _credentials(made, begun.expires),
            ("AssumedRoleUser", [("AssumedRoleId", f"{role.id}:{name}"), ("Arn", arn)]),
            ("PackedPolicySize", size[0][1]) if policy is not None else None,
            *size,
        ]

    def _session_policy(self, policy: str | None) -> str | None:
        if policy is None:
            return None
        if len(policy) > self._policy_chars:
            text = f"Member must have length less than or equal to {self._policy_chars}"
            raise Fault("Validation", f"'policy' failed to satisfy constraint: {text}")
        try:
            check_document(json.loads(policy), "Policy")
        except RefusedInput as refused:
            raise Fault("MalformedPolicyDocument", f"{refused}.") from refused
        except (ValueError, RecursionError) as error:
            raise Fault("MalformedPolicyDocument", "Policy is not JSON.") from error
        return policy

    def _issue(self, session: TemporarySession) -> TemporaryKey:
        made = issue(self._key, session)
        if len(made.token) > self._token_bytes:
            percent = 100 * len(made.token) // self._token_bytes
            text = f"The session policy is packed into {percent}% of the allowed token; shorten it."
            raise Fault("PackedPolicyTooLarge", text)
        return made

    def _token_size(self, made: TemporaryKey) -> list[Element]:
        size = len(made.token)
        utilization = -(-100 * size // self._token_bytes)
        return [("SessionTokenUtilization", utilization), ("SessionTokenSize", size)]


@cache
def _inputs() -> Mapping[str, StructureShape]:
    """Input shapes of the installed botocore by the names of their actions."""
    model = ServiceModel(Loader().load_service_model("sts", "service-2"), "sts")
    shapes = {name: model.operation_model(name).input_shape for name in model.operation_names}
    return {name: shape for name, shape in shapes.items() if isinstance(shape, StructureShape)}


def _form(request: Request) -> dict[str, str]:
    """The parameters of a call, each of which stands there once."""
    text = request.body if request.method == "POST" else b""
    try:
        pairs = parse_qsl(text.decode(), keep_blank_values=True, errors="strict")
    except ValueError as error:
        raise Fault("MalformedQueryString", "The body is no form in UTF-8.") from error
    pairs += [(name, value) for name, values in request.query.items() for value in values]
    # Signatures in the query were verified; nothing else of AWS's own is a parameter.
    pairs = [pair for pair in pairs if not pair[0].startswith("X-Amz-")]
    form = dict(pairs)
    if len(form) != len(pairs):
        raise Fault("MalformedQueryString", "A parameter stands in the request more than once.")
    return form


def _members(action: str, form: Mapping[str, str]) -> Mapping[str, Any]:
    """The parameters by the input shape of ``action``; those it does not know are left out.

    Raises:
        Fault: Validation, with all that breaks the constraints of the service model, and for what is
            not supported here.
    """
    shape = _inputs().get(action)
    if shape is None:
        return {}
    given: dict[str, Any] = {}
    for parameter, text in form.items():
        name = parameter.partition(".")[0]
        member = shape.members.get(name)
        if member is None:
            continue
        if name in _UNSUPPORTED:
            raise Fault("Validation", f"{name} is not supported: {_UNSUPPORTED[name]}.")
        if member.type_name == "integer":
            # Digits of other scripts are numbers to Python, and thousands of them cost time.
            if not re.fullmatch(r"-?[0-9]{1,10}", text):
                raise Fault("Validation", f"'{name}' has to be a whole number.")
            given[name] = int(text)
        else:
            given[name] = text
    checker = ShapeChecker()
    found = checker.members(shape, given)
    checker.finish()
    return found


def _assumable(session: Session, caller: Caller, arn: str) -> IamRole:
    """The role that ``caller`` may assume.

    Raises:
        Fault: AccessDenied, in the same words where there is no such role.
    """
    named = ROLE_ARN.fullmatch(arn)
    role = find_role(session, named["account"], named["name"]) if named else None
    trusted = trusts(role.trust, caller) if role is not None else None
    if (
        role is not None
        and trusted == "principal"
        and role.account == caller.account
        and (caller.session is None or caller.session.policy is None)
    ):
        # A trust policy that names a principal of its own account needs no other Allow.
        refuse_denied(caller, ASSUME_ROLE, arn)
        return role
    authorize(caller, ASSUME_ROLE, arn)
    if role is None or trusted is None:
        text = f"User: {caller.arn} is not authorized to perform: {ASSUME_ROLE} on resource: {arn}"
        raise Fault("AccessDenied", text)
    return role


def _role_seconds(caller: Caller, role: IamRole, asked: int | None) -> int:
    """How long a session of ``role`` lasts."""
    if asked is not None and asked > role.max_session_seconds:
        text = "The requested DurationSeconds exceeds the MaxSessionDuration set for this role."
        raise Fault("Validation", text)
    chained = caller.session is not None and bool(caller.session.roles)
    if asked is not None and chained and asked > CHAINED_SECONDS:
        text = (
            "The requested DurationSeconds exceeds the 1 hour session limit for roles assumed by "
            "role chaining"
        )
        raise Fault("Validation", text)
    return ROLE_SECONDS if asked is None else asked


def _session_of(session: Session, request: Request, seconds: int) -> TemporarySession:
    """A session of ``seconds`` that ends with the long-term key it goes back to."""
    caller, begun = request.caller, request.caller.session
    key = session.get(AccessKey, caller.access_key)
    if key is None:  # removed since the signature was verified
        raise Fault("UnrecognizedClient", "The security token included in the request is invalid.")
    return TemporarySession(
        account=begun.account if begun else caller.account,
        user=begun.user if begun else caller.user,
        access_key=key.id,
        key_created=key.created,
        expires=request.received.replace(microsecond=0) + timedelta(seconds=seconds),
    )


def _credentials(made: TemporaryKey, expires: datetime) -> Element:
    content: Content = [
        ("AccessKeyId", made.access_key),
        ("SecretAccessKey", made.secret),
        ("SessionToken", made.token),
        ("Expiration", f"{expires:%Y-%m-%dT%H:%M:%SZ}"),
    ]
    return "Credentials", content
