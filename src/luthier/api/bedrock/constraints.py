"""Values against the shapes of a service model: types, and the constraints that AWS names in refusals.

Clients check next to nothing of this before they send: no pattern, no upper limit, no enumeration.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import cache
from typing import Any

import regex
from botocore.model import ListShape, MapShape, Shape, StringShape, StructureShape

from luthier.api.wire import Fault

LONGEST_UNBOUNDED = 4096
"""Characters of a text that has a pattern and no limit of its own."""
PATTERN_SECONDS = 0.1
"""For one pattern on one text: hundreds of times what the worst of them takes; then it is refused."""
PATIENT_SECONDS = 5.0
"""Of the second try."""
_SHOWN = 200
"""Characters of a refused value that its sender is shown."""
_FILE = r"file:///[^\x00-\x1f\x7f]+"
_ALIAS = "([0-9a-zA-Z][_-]?)+"
_WIDER = {
    # Data of one machine; where they may lie, the locations themselves decide.
    "S3Uri": _FILE,
    # A model from outside, which is a base like any other here.
    "BaseModelIdentifier": (
        "arn:aws:bedrock:[a-z0-9-]{1,20}:[0-9]{12}:custom-model/imported/[a-z0-9]{12}"
    ),
    # The alias of a base model.
    "GetFoundationModelIdentifier": _ALIAS,
    "BedrockModelId": _ALIAS,
}
"""What is taken here beyond a shape's own pattern, by the name of the shape."""
_LINEAR = (
    # Both stars take hyphens: a row of them could be split in exponentially many ways.
    (r"(-*[a-zA-Z0-9\+\-\.])*", r"[a-zA-Z0-9\+\-\.]*"),
)
"""Parts of patterns, and the same texts by an expression that is matched in one way only."""


class Checker:
    """Walks through one request. What is wrong is gathered; all of it is told at once."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def finish(self) -> None:
        """Raise what was found."""
        if self.problems:
            count = len(self.problems)
            counted = f"{count} validation error{'s' if count > 1 else ''} detected"
            raise Fault("Validation", f"{counted}: {'; '.join(self.problems)}")

    def members(
        self, shape: StructureShape, given: Mapping[str, Any], path: str = ""
    ) -> dict[str, Any]:
        """The known members of ``given`` by their names in the model; ``None`` is absent."""
        if _is_document(shape):
            return dict(given)
        found = {}
        for name, member in shape.members.items():
            value = given.get(member.serialization.get("name", name))
            where = f"{path}.{name}" if path else name
            if value is not None:
                found[name] = self.value(member, value, where)
            elif name in shape.required_members:
                self._failed("null", where, "Member must not be null")
        if shape.is_tagged_union and len(found) != 1:
            known = ", ".join(shape.members)
            self._failed(sorted(found), path, f"Exactly one member must be set, of [{known}]")
        return found

    def value(self, shape: Shape, value: Any, path: str) -> Any:
        """``value`` as Python has it; raises :class:`Fault` where JSON has it as another type."""
        if isinstance(shape, StructureShape):
            return self.members(shape, _typed(value, dict, path, "an object"), path)
        if isinstance(shape, ListShape):
            items = _typed(value, list, path, "a list")
            self._size(shape, items, path, "length")
            return [self._item(shape.member, item, path, n) for n, item in enumerate(items, 1)]
        if isinstance(shape, MapShape):
            return self._map(shape, _typed(value, dict, path, "an object"), path)
        if isinstance(shape, StringShape):
            return self._text(shape, _typed(value, str, path, "a string"), path)
        return self._scalar(shape, value, path)

    def _item(self, shape: Shape, value: Any, path: str, number: int) -> Any:
        where = f"{path}.{number}.member"
        if value is None:
            self._failed("null", where, "Member must not be null")
            return None
        return self.value(shape, value, where)

    def _map(self, shape: MapShape, value: dict[str, Any], path: str) -> dict[str, Any]:
        self._size(shape, value, path, "length")
        return {
            self.value(shape.key, key, f"{path}.key"): self._entry(shape, key, item, path)
            for key, item in value.items()
        }

    def _entry(self, shape: MapShape, key: str, value: Any, path: str) -> Any:
        where = f"{path}.{key[:_SHOWN]}"
        if value is None:
            self._failed("null", where, "Member must not be null")
            return None
        return self.value(shape.value, value, where)

    def _scalar(self, shape: Shape, value: Any, path: str) -> Any:
        kind = shape.type_name
        if kind == "boolean":
            return _typed(value, bool, path, "true or false")
        if kind in ("integer", "long"):
            self._size(shape, _number(value, (int,), path, "a whole number"), path, "value")
            limit = 2**31 if kind == "integer" else 2**63
            if not -limit <= value < limit:
                raise _wrong_type(path, f"a whole number of {32 if limit == 2**31 else 64} bits")
        elif kind in ("float", "double"):
            value = _number(value, (int, float), path, "a number")
            if not math.isfinite(value):
                raise _wrong_type(path, "a finite number")
            self._size(shape, value, path, "value")
        elif kind == "timestamp":
            return moment_of(_typed(value, str, path, "a time"), path)
        return value

    def _text(self, shape: StringShape, value: str, path: str) -> str:
        if _unwritable(value):
            raise _wrong_type(path, "text without NUL and lone surrogates")
        shown = "***" if shape.metadata.get("sensitive") else value
        if not self._size(shape, value, path, "length", shown):
            return value
        if shape.enum and value not in shape.enum:
            known = ", ".join(shape.enum)
            self._failed(shown, path, f"Member must satisfy enum value set: [{known}]")
        pattern = shape.metadata.get("pattern")
        if pattern is not None and not matches(shape, value):
            text = f"Member must satisfy regular expression pattern: {pattern}"
            self._failed(shown, path, text)
        return value

    def _size(self, shape: Shape, value: Any, path: str, what: str, shown: Any = None) -> bool:
        size = value if what == "value" else len(value)
        low, high = shape.metadata.get("min"), shape.metadata.get("max")
        if high is None and isinstance(shape, StringShape) and "pattern" in shape.metadata:
            high = LONGEST_UNBOUNDED
        if low is not None and size < low:
            text = f"Member must have {what} greater than or equal to {low}"
        elif high is not None and size > high:
            text = f"Member must have {what} less than or equal to {high}"
        else:
            return True
        self._failed(value if shown is None else shown, path, text)
        return False

    def _failed(self, value: Any, path: str, constraint: str) -> None:
        shown = str(value)
        shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
        where = path or "the request"
        self.problems.append(
            f"Value '{shown}' at '{where}' failed to satisfy constraint: {constraint}"
        )


def matches(shape: Shape, value: str) -> bool:
    """Whether all of ``value`` is matched by the pattern of ``shape``, within its time.

    The time is the clock's: where many threads wait for their turn a short one passes unused.
    What did not end in it is tried once more, with time enough for all but patterns that blow up.
    """
    for seconds in (PATTERN_SECONDS, PATIENT_SECONDS):
        try:
            return bool(_compiled(shape)(value, timeout=seconds))
        except TimeoutError:
            continue
    return False


def moment_of(text: str, path: str) -> datetime:
    """A time of ISO 8601, in UTC where it names no zone.

    Raises:
        Fault: Validation, where it is none.
    """
    try:
        found = datetime.fromisoformat(text)
        # A moment near the ends of the calendar may have no name in UTC.
        return (found if found.tzinfo else found.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise Fault(
            "Validation", f"'{path}' is no time of the form 2026-01-31T12:00:00Z.", parameter=path
        ) from error


def _compiled(shape: Shape) -> Callable[..., Any]:
    return _pattern(shape.metadata["pattern"], _WIDER.get(shape.name, ""))


@cache
def _pattern(pattern: str, wider: str) -> Callable[..., Any]:
    for exponential, linear in _LINEAR:
        pattern = pattern.replace(exponential, linear)
    # The patterns are Java's, whose \s and \d know ASCII alone; those with \p know more than it.
    flags = regex.V0 if r"\p" in pattern else regex.V0 | regex.ASCII
    matcher: Callable[..., Any] = regex.compile(
        f"(?:{pattern})|(?:{wider})" if wider else pattern, flags
    ).fullmatch
    return matcher


def _is_document(shape: StructureShape) -> bool:
    """Whether it takes any JSON."""
    return bool(shape.is_document_type)


def _typed(value: Any, kind: type, path: str, called: str) -> Any:
    if not isinstance(value, kind):
        raise _wrong_type(path, called)
    return value


def _number(value: Any, kinds: tuple[type, ...], path: str, called: str) -> Any:
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise _wrong_type(path, called)
    return value


def _unwritable(text: str) -> bool:
    """Whether no database and no UTF-8 file would take it."""
    if "\0" in text:
        return True
    return not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text)


def _wrong_type(path: str, expected: str) -> Fault:
    return Fault("Serialization", f"'{path}' has to be {expected}.", parameter=path)
