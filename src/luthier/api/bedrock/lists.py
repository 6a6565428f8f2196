"""Pages of lists. A token is the place of the last row, not a count: what is made or deleted between
two pages moves nothing.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from sqlalchemy import ColumnElement, Select, and_, func, or_
from sqlalchemy.orm import InstrumentedAttribute, Session

from luthier.api.bedrock.control import Request
from luthier.api.wire import Fault

Row = TypeVar("Row")
DEFAULT_RESULTS = 100
_PLACE = struct.Struct(">qq")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND, _MILLISECOND = timedelta(microseconds=1), timedelta(milliseconds=1)
_SIGNATURE_BYTES = 16


@dataclass(frozen=True)
class Order:
    """Columns that a list is ordered by: time of creation, then order of creation."""

    created: InstrumentedAttribute[datetime]
    seq: InstrumentedAttribute[int]


def page(
    request: Request, session: Session, wanted: Select[Row], order: Order
) -> tuple[Sequence[Row], str | None]:
    """Rows of the page that is asked for, and the token of the next one.

    Raises:
        Fault: Validation, for a token that is not of this operation and account.
    """
    limit = request.get("maxResults", DEFAULT_RESULTS)
    ascending = request.get("sortOrder") == "Ascending"
    if token := request.get("nextToken"):
        wanted = wanted.where(_beyond(order, _opened(request, token), ascending))
    columns = (order.created, order.seq)
    sorted_by = [each.asc() if ascending else each.desc() for each in columns]
    rows = session.scalars(wanted.order_by(*sorted_by).limit(limit + 1)).all()
    if len(rows) <= limit:
        return rows, None
    last = rows[limit - 1]
    place = getattr(last, order.created.key), getattr(last, order.seq.key)
    return rows[:limit], _sealed(request, place)


def created_within(
    order: Order, after: datetime | None, before: datetime | None
) -> list[ColumnElement[bool]]:
    """Conditions on the time of creation, both bounds excluded.

    Clients know times to the millisecond, and compare with what they were told.
    """
    found: list[ColumnElement[bool]] = []
    try:
        if after is not None:
            found.append(order.created >= _floor(after) + _MILLISECOND)
        if before is not None:
            exact = _floor(before) == before
            found.append(order.created < (before if exact else _floor(before) + _MILLISECOND))
    except OverflowError as error:
        raise Fault("Validation", "The time is out of range.") from error
    return found


def contains(column: InstrumentedAttribute[str], text: str | None) -> list[ColumnElement[bool]]:
    """A condition on a name: LIKE would tell small letters from capitals on one database alone."""
    return [func.replace(column, text, "") != column] if text else []


def _beyond(order: Order, place: tuple[datetime, int], ascending: bool) -> ColumnElement[bool]:
    moment, seq = place
    if ascending:
        later = order.created > moment
        return or_(later, and_(order.created == moment, order.seq > seq))
    earlier = order.created < moment
    return or_(earlier, and_(order.created == moment, order.seq < seq))


def _floor(moment: datetime) -> datetime:
    return moment.replace(microsecond=moment.microsecond // 1000 * 1000)


def _sealed(request: Request, place: tuple[datetime, int]) -> str:
    moment, seq = place
    packed = _PLACE.pack((moment - _EPOCH) // _MICROSECOND, seq)
    return base64.urlsafe_b64encode(packed + _signature(request, packed)).decode()


def _opened(request: Request, token: str) -> tuple[datetime, int]:
    try:
        raw = base64.b64decode(token.encode(), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError) as error:
        raise _refused() from error
    packed, signature = raw[: _PLACE.size], raw[_PLACE.size :]
    if not hmac.compare_digest(signature, _signature(request, packed)):
        raise _refused()
    microseconds, seq = _PLACE.unpack(packed)
    return _EPOCH + microseconds * _MICROSECOND, seq


def _signature(request: Request, packed: bytes) -> bytes:
    """Binds a token to its operation and account: elsewhere it opens nothing."""
    bound = f"{request.operation.name} {request.account} ".encode() + packed
    whole = hmac.digest(request.control.secret, bound, hashlib.sha256)
    return whole[:_SIGNATURE_BYTES]


def _refused() -> Fault:
    return Fault("Validation", "The provided nextToken is not valid.", parameter="nextToken")


def listed(member: str, summaries: list[dict[str, Any]], token: str | None) -> dict[str, Any]:
    """The answer of a list; at its end there is no token."""
    return {member: summaries, "nextToken": token}
