"""What the operations of the control plane work with: who may, once for each token, pages of lists.

A token of a list is the place of the last row, not a count: what is made or deleted between two pages
moves nothing.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from botocore.model import OperationModel
from sqlalchemy import ColumnElement, Select, func, tuple_
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import InstrumentedAttribute, Session

from luthier.limits import AccountQuotas
from luthier.server.audit import record_action
from luthier.server.bedrock.activation import Activation
from luthier.server.bedrock.shapes import answer_of, members_of
from luthier.server.http.messages import Fault, Request, Response
from luthier.server.http.routing import Handler
from luthier.server.tables.arns import Arn, Arns
from luthier.server.tables.custom_models import CustomModel
from luthier.server.tables.database import Database
from luthier.server.tables.idempotency import Attempt, recall, remember
from luthier.server.tables.locations import Locations
from luthier.server.tables.tags import TooManyTags

TOKEN = "clientRequestToken"  # noqa: S105  (the name of a member)
_ATTEMPTS = 3
Row = TypeVar("Row")
DEFAULT_RESULTS = 100
_PLACE = struct.Struct(">qq")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND, _MILLISECOND = timedelta(microseconds=1), timedelta(milliseconds=1)
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


@dataclass(frozen=True)
class ListColumns:
    """What a list is ordered by, time and then order of creation, and the names it is searched by."""

    created: InstrumentedAttribute[datetime]
    seq: InstrumentedAttribute[int]
    name: InstrumentedAttribute[str]

    def conditions(self, request: ControlRequest) -> list[ColumnElement[bool]]:
        """What a request asks of name and time of creation, both bounds of which are excluded."""
        found: list[ColumnElement[bool]] = []
        if text := request.get("nameContains"):
            # LIKE would tell small letters from capitals on one database alone.
            found.append(func.replace(self.name, text, "") != self.name)
        after = request.get("creationTimeAfter", request.get("createdAfter"))
        before = request.get("creationTimeBefore", request.get("createdBefore"))
        try:
            # Clients know times to the millisecond, and compare with what they were told.
            if after is not None:
                found.append(self.created >= _floor(after) + _MILLISECOND)
            if before is not None:
                exact = _floor(before) == before
                found.append(self.created < (before if exact else _floor(before) + _MILLISECOND))
        except OverflowError as error:
            raise Fault("Validation", "The time is out of range.") from error
        return found


def page(
    request: ControlRequest, session: Session, wanted: Select[Row], columns: ListColumns
) -> tuple[Sequence[Row], str | None]:
    """Rows of the page that is asked for, and the token of the next one.

    Raises:
        Fault: Validation, for a malformed token.
    """
    limit = request.get("maxResults", DEFAULT_RESULTS)
    ascending = request.get("sortOrder") == "Ascending"
    if token := request.get("nextToken"):
        place, last_shown = tuple_(columns.created, columns.seq), _place_of(token)
        wanted = wanted.where(place > last_shown if ascending else place < last_shown)
    sorted_by = [
        each.asc() if ascending else each.desc() for each in (columns.created, columns.seq)
    ]
    rows = session.scalars(wanted.order_by(*sorted_by).limit(limit + 1)).all()
    if len(rows) <= limit:
        return rows, None
    last = rows[limit - 1]
    place_of_last = getattr(last, columns.created.key), getattr(last, columns.seq.key)
    return rows[:limit], _token_of(place_of_last)


def _floor(moment: datetime) -> datetime:
    return moment.replace(microsecond=moment.microsecond // 1000 * 1000)


def _token_of(place: tuple[datetime, int]) -> str:
    moment, seq = place
    packed = _PLACE.pack((moment - _EPOCH) // _MICROSECOND, seq)
    return base64.urlsafe_b64encode(packed).decode()


def _place_of(token: str) -> tuple[datetime, int]:
    try:
        packed = base64.b64decode(token.encode(), altchars=b"-_", validate=True)
        microseconds, seq = _PLACE.unpack(packed)
        return _EPOCH + microseconds * _MICROSECOND, seq
    except (OverflowError, ValueError, struct.error) as error:
        raise _invalid_token() from error


def _invalid_token() -> Fault:
    return Fault("Validation", "The provided nextToken is not valid.", parameter="nextToken")


def list_answer(member: str, summaries: list[dict[str, Any]], token: str | None) -> dict[str, Any]:
    """The answer of a list; at its end there is no token."""
    return {member: summaries, "nextToken": token}
