"""Requests to the control plane: parts of the server, idempotent creation, pages of lists."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from botocore.model import OperationModel
from sqlalchemy import ColumnElement, func, select, tuple_
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from luthier.limits import AccountQuotas
from luthier.server.audit import record_action
from luthier.server.bedrock.activation import Activation
from luthier.server.bedrock.shapes import answer_of, members_of
from luthier.server.http.messages import Fault, Request, Response
from luthier.server.http.routes import Handler
from luthier.server.tables.arns import Arn, Arns
from luthier.server.tables.custom_models import CustomModel
from luthier.server.tables.database import Database
from luthier.server.tables.endpoints import Endpoint
from luthier.server.tables.idempotency import Attempt, recall, remember
from luthier.server.tables.jobs import Job
from luthier.server.tables.locations import Locations
from luthier.server.tables.tags import TooManyTags

TOKEN = "clientRequestToken"  # noqa: S105  (the name of a member)
_ATTEMPTS = 3
Row = TypeVar("Row")
Listed = TypeVar("Listed", Job, CustomModel, Endpoint)
DEFAULT_RESULTS = 100
_MILLISECOND = timedelta(milliseconds=1)
LONGEST_FAILURE = 2048
"""Characters of a failure message, by the shape that Bedrock has for it."""


@dataclass(frozen=True)
class Control:
    """The parts of the server that its control plane stands on."""

    database: Database
    arns: Arns
    locations: Locations
    activation: Activation
    delete_model: Callable[[CustomModel], None]
    """Deletes a model, wherever it is; raises :class:`~luthier.errors.WrongState` where
    it is in use."""
    grader: Callable[[str, str], Mapping[str, Any] | None]
    """Method and fields of the grader behind the ARN of a Lambda function, for an account."""
    quotas: Callable[[str], AccountQuotas]
    """Of an account."""
    wake: Callable[[], None]
    """Tells the scheduler that there is a job, or a model from outside, to work on."""


@dataclass(frozen=True)
class ControlRequest:
    """One request to the control plane, checked for form."""

    control: Control
    operation: OperationModel
    request: Request
    members: Mapping[str, Any]

    @property
    def account(self) -> str:
        """Whose resources it is about."""
        return self.request.caller.account

    @property
    def arns(self) -> Arns:
        """Of this server."""
        return self.control.arns

    def __getitem__(self, name: str) -> Any:
        return self.members[name]

    def get(self, name: str, default: Any = None) -> Any:
        """A member that may be absent."""
        return self.members.get(name, default)

    def record(self, resource: str) -> None:
        """Note for the audit log that the operation acts on ``resource``, an ARN or ``*``."""
        record_action(f"bedrock:{self.operation.name}", resource)

    def found(self, row: Row | None, arn: str | None, kind: str, identifier: str, noun: str) -> Row:
        """Return the ``row`` that the client named by ``identifier``, and record its ``arn``.

        Raises:
            Fault: ResourceNotFound, by the ``noun``, without a row.
        """
        parsed = Arn.parse(identifier)
        self.record(
            arn or (str(parsed) if parsed else self.arns.of(self.account, kind, identifier))
        )
        if row is None:
            raise not_found(noun, identifier)
        return row

    def record_kind(self, kind: str) -> None:
        """Note for the audit log that the operation makes something of this ``kind``."""
        self.record(self.arns.of(self.account, kind, "*"))

    def members_sent(self, names: Iterable[str]) -> dict[str, Any]:
        """Those of the members ``names`` that were sent, to be told again."""
        return {name: self.members[name] for name in names if name in self.members}

    def earlier_answer(self) -> dict[str, Any] | None:
        """The answer to an earlier sending of this request, before anything is looked at."""
        attempt = self._attempt()
        if attempt is None:
            return None
        with self.control.database.read() as session:
            return recall(session, attempt)

    def once(self, make: Callable[[Session], dict[str, Any]]) -> dict[str, Any]:
        """Make something in one transaction, once for each token of the client.

        Who loses a race for a name tries again, and is told that the name is in use.
        """
        attempt = self._attempt()
        for left in range(_ATTEMPTS - 1, -1, -1):
            try:
                with self.control.database.write() as session:
                    answer = recall(session, attempt) if attempt else None
                    if answer is None:
                        answer = make(session)
                        if attempt:
                            remember(session, attempt, answer)
                return answer
            except IntegrityError:
                if not left:
                    raise
        raise AssertionError("unreachable")

    def _attempt(self) -> Attempt | None:
        token = self.get(TOKEN)
        if token is None:
            return None
        members = {name: value for name, value in self.members.items() if name != TOKEN}
        return Attempt.of(self.account, self.operation.name, token, members)


Operate = Callable[[ControlRequest], Mapping[str, Any]]
"""Carries out one operation: members of its answer by name."""


def handler(control: Control, operation: OperationModel, operate: Operate) -> Handler:
    """What the face calls for ``operation``."""

    def handle(request: Request) -> Response:
        checked = ControlRequest(control, operation, request, members_of(operation, request))
        try:
            return answer_of(operation, operate(checked))
        except TooManyTags as error:
            raise Fault("TooManyTags", str(error), resourceName=error.resource) from error

    return handle


def tags_of(given: Iterable[Mapping[str, str]] | None) -> dict[str, str]:
    """Values by key.

    Raises:
        Fault: Validation, for a key that comes twice or belongs to AWS.
    """
    found: dict[str, str] = {}
    for tag in given or ():
        key = tag["key"]
        if key in found:
            raise Fault("Validation", f"The tag key {key} is given more than once.")
        if key.lower().startswith("aws:"):
            raise Fault("Validation", "Tag keys must not begin with aws:, which is reserved.")
        found[key] = tag["value"]
    return found


def not_found(kind: str, identifier: str) -> Fault:
    """The answer for what is not there, and for what belongs to somebody else."""
    return Fault("ResourceNotFound", f"Could not find {kind} {identifier}.")


def invalid(parameter: str, text: str) -> Fault:
    """The refusal of what the member ``parameter`` asks for."""
    return Fault("Validation", text, parameter=parameter)


def failure_message(text: str | None) -> str | None:
    """Why something failed, as Bedrock tells it; ``None`` where nothing did."""
    return text[:LONGEST_FAILURE] if text else None


def page(
    request: ControlRequest, table: type[Listed], *conditions: ColumnElement[bool]
) -> tuple[Sequence[Listed], str | None]:
    """Return one page of the account's rows in order of creation, and the token of the next page.

    A token names the last row: rows created or deleted between two pages move nothing.

    Raises:
        Fault: Validation, for a malformed token.
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
        place, last = tuple_(table.created, table.seq), _position(token)
        query = query.where(place > last if ascending else place < last)
    order = (table.created, table.seq) if ascending else (table.created.desc(), table.seq.desc())
    limit = request.get("maxResults", DEFAULT_RESULTS)
    with request.control.database.read() as session:
        rows = session.scalars(query.order_by(*order).limit(limit + 1)).all()
    if len(rows) <= limit:
        return rows, None
    return rows[:limit], f"{rows[limit - 1].created.isoformat()}_{rows[limit - 1].seq}"


def _position(token: str) -> tuple[datetime, int]:
    moment, _, seq = token.rpartition("_")
    try:
        return datetime.fromisoformat(moment).astimezone(UTC), int(seq)
    except (ValueError, OverflowError):
        raise invalid("nextToken", "The provided nextToken is not valid.") from None


def list_answer(member: str, summaries: list[dict[str, Any]], token: str | None) -> dict[str, Any]:
    """Return the response of a list; the last page has no token."""
    return {member: summaries, "nextToken": token}
