"""Ranges of bytes and conditions on what an object is now (RFC 9110)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import format_datetime, parsedate_to_datetime

from luthier.api.wire import Fault
from luthier.store.objects import StoredObject


def http_date(moment: datetime) -> str:
    """A time as headers have it, to the second."""
    return format_datetime(moment.astimezone(UTC), usegmt=True)


def span(header: str | None, size: int) -> tuple[int, int] | None:
    """First byte and number of bytes of a ``Range``; ``None`` where the whole is meant.

    Raises:
        Fault: ``InvalidRange`` where nothing of the object is in it.
    """
    found = re.fullmatch(r"\s*bytes=([0-9]{0,18})-([0-9]{0,18})\s*", header or "")
    if found is None or not (found[1] or found[2]):
        return None  # several ranges, or another unit: passed over, as the RFC allows
    if found[1]:
        first, last = int(found[1]), int(found[2] or size - 1)
        if found[2] and int(found[2]) < first:
            return None
    else:
        first, last = max(0, size - int(found[2])), size - 1
    if first >= size or (not found[1] and not int(found[2])):
        text = "The requested range is not satisfiable"
        raise Fault("InvalidRange", text, headers={"Content-Range": f"bytes */{size}"})
    return first, min(last, size - 1) - first + 1


def check_read(headers: Mapping[str, str], found: StoredObject, start: str = "if-") -> None:
    """Compare an object with the conditions of a read, whose names begin with ``start``.

    Raises:
        Fault: ``PreconditionFailed``, or ``NotModified`` where the client has it already.
    """
    match, none_match = headers.get(f"{start}match"), headers.get(f"{start}none-match")
    changed = headers.get(f"{start}modified-since")
    unchanged = headers.get(f"{start}unmodified-since")
    moment = found.modified.replace(microsecond=0)
    if match is not None:
        if not _matches(match, found):
            raise _failed("If-Match")
    elif unchanged is not None and (limit := _moment(unchanged)) and moment > limit:
        raise _failed("If-Unmodified-Since")
    if none_match is not None:
        same = _matches(none_match, found)
    else:
        limit = _moment(changed) if changed is not None else None
        same = limit is not None and moment <= limit
    if same and start == "if-":
        told = {"ETag": f'"{found.etag}"', "Last-Modified": http_date(found.modified)}
        raise Fault("NotModified", "Not Modified", headers=told)
    if same:
        raise _failed("If-None-Match")


def check_write(headers: Mapping[str, str], found: StoredObject | None) -> None:
    """Compare what a key names now with the conditions of a write.

    Raises:
        Fault: ``PreconditionFailed``; ``NoSuchKey`` where ``If-Match`` has nothing to match.
    """
    match, none_match = headers.get("if-match"), headers.get("if-none-match")
    if match is not None and found is None:
        raise Fault("NoSuchKey", "The specified key does not exist.")
    if match is not None and found is not None and not _matches(match, found):
        raise _failed("If-Match")
    if none_match is not None and found is not None and _matches(none_match, found):
        raise _failed("If-None-Match")


def _matches(header: str, found: StoredObject) -> bool:
    tags = [each.strip().removeprefix("W/").strip('"') for each in header.split(",")]
    return "*" in tags or found.etag in tags


def _moment(text: str) -> datetime | None:
    try:
        moment = parsedate_to_datetime(text)
    except ValueError:
        return None  # passed over, as the RFC asks
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _failed(condition: str) -> Fault:
    text = "At least one of the pre-conditions you specified did not hold"
    return Fault("PreconditionFailed", text, fields={"Condition": condition})
