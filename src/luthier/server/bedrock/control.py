"""Shared parts of control plane operations: the request, idempotent creation, pagination."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from botocore.model import OperationModel
from sqlalchemy import ColumnElement, func, select, tuple_
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from luthier.server.actions import record_action, record_created
from luthier.server.bedrock.activation import Activation
from luthier.server.bedrock.shapes import parse_members, render_response
from luthier.server.components import Components
from luthier.server.http.messages import Fault, Request, Response
from luthier.server.http.routes import Handler
from luthier.server.tables.arns import Arn, Arns
from luthier.server.tables.custom_models import CustomModel
from luthier.server.tables.endpoints import Endpoint
from luthier.server.tables.idempotency import Attempt, recall, remember
from luthier.server.tables.jobs import Job
from luthier.server.tables.tags import TooManyTags

TOKEN = "clientRequestToken"  # noqa: S105  (the name of a member)
_ATTEMPTS = 3
Row = TypeVar("Row")
PagedRow = TypeVar("PagedRow", Job, CustomModel, Endpoint)
DEFAULT_RESULTS = 100
_MILLISECOND = timedelta(milliseconds=1)
MAX_FAILURE = 2048
"""Maximum length of a failure message in characters, from Bedrock's shape."""


@dataclass(frozen=True, kw_only=True)
class Control(Components):
    """Parts of the server that the control plane uses."""

    activation: Activation
    grader: Callable[[str, str], Mapping[str, Any] | None]
    """Returns method and fields of the grader with the given Lambda ARN, for an account."""


@dataclass(frozen=True)
class ControlRequest:
    """A request to the control plane, validated against the operation's shapes."""

    control: Control
    operation: OperationModel
    request: Request
    members: Mapping[str, Any]

    @property
    def account(self) -> str:
        """Account of the caller."""
        return self.request.caller.account

    @property
    def arns(self) -> Arns:
        """ARN builder of the server."""
        return self.control.arns

    def __getitem__(self, name: str) -> Any:
        return self.members[name]

    def get(self, name: str, default: Any = None) -> Any:
        """Return an optional member."""
        return self.members.get(name, default)

    def record(self, resource: str) -> None:
        """Record ``resource``, an ARN or ``*``, as the target of the operation in the audit log."""
        record_action(f"bedrock:{self.operation.name}", resource)

    def require_row(
        self, row: Row | None, arn: str | None, kind: str, identifier: str, noun: str
    ) -> Row:
        """Return ``row`` and record ``arn`` in the audit log.

        Args:
            row: the row that the client named by ``identifier``, or ``None``.
            arn: the ARN of the row, or ``None``.
            kind: the kind of resource in ARNs.
            identifier: the client's identifier: an ARN or a name.
            noun: the kind of resource in error messages.

        Raises:
            Fault: ResourceNotFound if ``row`` is ``None``.
        """
        parsed = Arn.parse(identifier)
        self.record(
            arn or (str(parsed) if parsed else self.arns.of(self.account, kind, identifier))
        )
        if row is None:
            raise not_found(noun, identifier)
        return row

    def record_kind(self, kind: str) -> None:
        """Record in the audit log that the operation creates a resource of ``kind``."""
        self.record(self.arns.of(self.account, kind, "*"))

    def members_sent(self, names: Iterable[str]) -> dict[str, Any]:
        """Return the members among ``names`` that the client sent."""
        return {name: self.members[name] for name in names if name in self.members}

    def earlier_response(self) -> dict[str, Any] | None:
        """Return the response to an earlier request with the same client token, if any."""
        attempt = self._attempt()
        if attempt is None:
            return None
        with self.control.database.read() as session:
            response = recall(session, attempt)
        return None if response is None else self._name_created(response)

    def create_once(self, create: Callable[[Session], dict[str, Any]]) -> dict[str, Any]:
        """Create a resource in one transaction, once per client token, and return the response.

        The response has one member, the ARN of the resource.
        If two requests race for a name, the loser tries again and reports that the name is in use.
        """
        attempt = self._attempt()
        for remaining in range(_ATTEMPTS - 1, -1, -1):
            try:
                with self.control.database.write() as session:
                    response = recall(session, attempt) if attempt else None
                    if response is None:
                        response = create(session)
                        if attempt:
                            remember(session, attempt, response)
                return self._name_created(response)
            except IntegrityError:
                if not remaining:
                    raise
        raise AssertionError("unreachable")

    @staticmethod
    def _name_created(response: dict[str, Any]) -> dict[str, Any]:
        (arn,) = response.values()
        record_created(arn)
        return response

    def _attempt(self) -> Attempt | None:
        token = self.get(TOKEN)
        if token is None:
            return None
        members = {name: value for name, value in self.members.items() if name != TOKEN}
        return Attempt.of(self.account, self.operation.name, token, members)


Operate = Callable[[ControlRequest], Mapping[str, Any]]
"""An operation: returns the members of the response by name."""


def handler(control: Control, operation: OperationModel, operate: Operate) -> Handler:
    """Return the HTTP handler of ``operation``."""

    def handle(request: Request) -> Response:
        checked = ControlRequest(control, operation, request, parse_members(operation, request))
        try:
            return render_response(operation, operate(checked))
        except TooManyTags as error:
            raise Fault("TooManyTags", str(error), resourceName=error.resource) from error

    return handle


def parse_tags(sent: Iterable[Mapping[str, str]] | None) -> dict[str, str]:
    """Return tag values by key.

    Raises:
        Fault: Validation for a repeated key or a key with AWS's prefix.
    """
    tags: dict[str, str] = {}
    for tag in sent or ():
        key = tag["key"]
        if key in tags:
            raise Fault("Validation", f"The tag key {key} occurs more than once.")
        if key.lower().startswith("aws:"):
            raise Fault("Validation", "Tag keys must not begin with the reserved prefix aws:.")
        tags[key] = tag["value"]
    return tags


def not_found(kind: str, identifier: str) -> Fault:
    """Return the error for a resource that does not exist or belongs to another account."""
    return Fault("ResourceNotFound", f"Could not find {kind} {identifier}.")


def invalid(parameter: str, text: str) -> Fault:
    """Return a validation error for the member ``parameter``."""
    return Fault("Validation", text, parameter=parameter)


def failure_message(text: str | None) -> str | None:
    """Return a failure reason, cut to Bedrock's limit; ``None`` without a failure."""
    return text[:MAX_FAILURE] if text else None


def page(
    request: ControlRequest, table: type[PagedRow], *conditions: ColumnElement[bool]
) -> tuple[Sequence[PagedRow], str | None]:
    """Return one page of the account's rows in order of creation, and the token of the next page.

    A token names the last row: rows created or deleted between two pages move nothing.

    Raises:
        Fault: Validation, for a malformed token, or the token of another operation.
    """
    request.record("*")
    query = select(table).where(table.account == request.account, *conditions)
    if text := request.get("nameContains"):
        # LIKE ignores case on SQLite only.
        query = query.where(func.replace(table.name, text, "") != table.name)
    if (after := request.get("creationTimeAfter", request.get("createdAfter"))) is not None:
        # Clients know the millisecond only, so a row of the same millisecond is not later.
        after = min(after, datetime.max.replace(tzinfo=UTC) - _MILLISECOND)
        query = query.where(table.created >= after + _MILLISECOND)
    if (before := request.get("creationTimeBefore", request.get("createdBefore"))) is not None:
        query = query.where(table.created < before)
    ascending = request.get("sortOrder") == "Ascending"
    if token := request.get("nextToken"):
        position, last_position = tuple_(table.created, table.seq), _position(request, token)
        query = query.where(position > last_position if ascending else position < last_position)
    order = (table.created, table.seq) if ascending else (table.created.desc(), table.seq.desc())
    limit = request.get("maxResults", DEFAULT_RESULTS)
    with request.control.database.read() as session:
        rows = session.scalars(query.order_by(*order).limit(limit + 1)).all()
    if len(rows) <= limit:
        return rows, None
    last = rows[limit - 1]
    return rows[:limit], f"{request.operation.name}_{last.created.isoformat()}_{last.seq}"


def _position(request: ControlRequest, token: str) -> tuple[datetime, int]:
    operation, _, position = token.partition("_")
    moment, _, seq = position.rpartition("_")
    try:
        if operation != request.operation.name:
            raise ValueError(f"the token belongs to {operation}")
        return datetime.fromisoformat(moment).astimezone(UTC), int(seq)
    except (ValueError, OverflowError):
        raise invalid("nextToken", "The provided nextToken is not valid.") from None


def list_response(
    member: str, summaries: list[dict[str, Any]], token: str | None
) -> dict[str, Any]:
    """Return the response of a list; the last page has no token."""
    return {member: summaries, "nextToken": token}
