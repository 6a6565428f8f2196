"""Feedback about captured requests: ratings, corrections, labels and outcomes.

Rows are only appended. For each rater, name and position, the latest row counts; an equal statement
is not stored again, so that clients may repeat a request.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationError, model_validator
from sqlalchemy import select
from sqlalchemy.orm import Session

from luthier.data.files.read import read_records
from luthier.errors import DataError, Problem, RefusedInput
from luthier.server.live.redaction import redact
from luthier.server.tables.database import lock_by_name, now
from luthier.server.tables.live.captures import (
    CapturedRequest,
    CaptureSettings,
    Feedback,
    find_captured,
)
from luthier.validation import describe_located_error

OUTCOME = "outcome."
"""Prefix of the names of outcomes among the names of feedback."""
RATINGS = ("thumb", "rating", "preferred", "corrected", "label")
"""Names of feedback with which an answer counts as rated."""
_STATEMENTS = (*RATINGS, "comment")
_TEXT_CHARACTERS = 1_000_000
Text = Annotated[str, Field(min_length=1, max_length=_TEXT_CHARACTERS)]


class UnknownRequest(RefusedInput):
    """Feedback about a request that the account has not captured."""

    default_rule = "feedback.unknown_request"

    def __init__(self, identifier: str) -> None:
        super().__init__(
            f'No captured request has the id "{identifier}".',
            advice="Turn capture on before the request: luthier live capture on.",
        )


class Outcome(BaseModel):
    """A named outcome of a request: ``reopened`` or ``sale``, for example."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    value: StrictBool | Annotated[float, Field(strict=True, allow_inf_nan=False)]
    higher_is_better: bool = True
    """True if a higher value, or ``true``, is better."""


class Statement(BaseModel):
    """Feedback of a rater about a captured request."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    request: Annotated[str, Field(min_length=1, max_length=256)]
    """Request id in the headers of the response (``x-request-id``), or id of the response object
    (``chatcmpl-…``)."""
    position: int = Field(default=0, ge=0, lt=10_000)
    """Number of the input or choice, from 0, for a request with several."""
    rater: str | None = Field(default=None, min_length=1, max_length=128)
    """Name of the rater; the caller's user by default."""
    thumb: Literal["up", "down"] | None = None
    rating: int | None = Field(default=None, ge=1, le=5)
    """Rating from 1 (worst) to 5."""
    preferred: Text | None = None
    """A better answer than the model's, for the rater."""
    corrected: Text | None = None
    """The model's answer after corrections."""
    label: str | int | float | list[str] | None = None
    """Correct label, labels or value of a prediction."""
    comment: Text | None = None
    outcomes: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")], Outcome] = {}
    """Outcomes by name. A later value of the same name replaces an earlier value."""

    @model_validator(mode="after")
    def _says_something(self) -> Statement:
        if not self.values():
            names = ", ".join((*_STATEMENTS, "outcomes"))
            raise ValueError(f"feedback needs at least one of {names}")
        return self

    def values(self) -> dict[str, dict[str, Any]]:
        """Return the values by the name of the feedback."""
        given = {name: getattr(self, name) for name in _STATEMENTS}
        return {
            **{name: {"value": value} for name, value in given.items() if value is not None},
            **{f"{OUTCOME}{name}": each.model_dump() for name, each in self.outcomes.items()},
        }


def find_request(session: Session, account: str, statement: Statement) -> CapturedRequest:
    """Return the captured request of a statement.

    Raises:
        UnknownRequest: If the account has not captured the request.
        RefusedInput: If the request has no answer at the position.
    """
    request = find_captured(session, account, statement.request)
    if request is None:
        raise UnknownRequest(statement.request)
    if request.answers is not None and statement.position >= request.answers:
        raise RefusedInput(
            f"The request {request.id} has {request.answers} answers. `position` counts from 0 and "
            f"must be less than {request.answers}, but is {statement.position}.",
            setting="position",
        )
    return request


def store_feedback(
    session: Session, account: str, statement: Statement, rater: str
) -> tuple[CapturedRequest, list[Feedback]]:
    """Append the new values of a statement; return the request and the new rows.

    Text is redacted if the account's captured requests are.

    Raises:
        RefusedInput: See :func:`find_request`.
    """
    request = find_request(session, account, statement)
    lock_by_name(session, f"feedback {account} {request.id}")
    settings = session.get(CaptureSettings, account)
    values = statement.values()
    if settings is None or settings.redact:
        values = redact(values)
    known = {
        each.name: each.value
        for each in latest_feedback(session, [request.seq]).get(request.seq, ())
        if (each.rater, each.position) == (rater, statement.position)
    }
    fresh = [
        Feedback(
            account=account, request_seq=request.seq, position=statement.position, rater=rater,
            name=name, value=value, created=now(),
        )
        for name, value in values.items()
        if known.get(name) != value
    ]  # fmt: skip
    session.add_all(fresh)
    session.flush()
    return request, fresh


def latest_feedback(session: Session, requests: Sequence[int]) -> Mapping[int, list[Feedback]]:
    """Return the feedback that counts, by ``seq`` of the request, oldest first."""
    rows = session.scalars(
        select(Feedback).where(Feedback.request_seq.in_(requests)).order_by(Feedback.seq)
    )
    latest = {(each.request_seq, each.rater, each.name, each.position): each for each in rows}
    found = defaultdict[int, list[Feedback]](list)
    for each in sorted(latest.values(), key=lambda row: row.seq):
        found[each.request_seq].append(each)
    return found


def read_statements(path: Path) -> Iterator[tuple[int, Statement]]:
    """Yield line number and statement of each row of a file (JSON Lines or CSV).

    In a table, the column of an outcome is ``outcome.NAME``, or ``outcome.NAME.lower`` if lower values
    are better.

    Raises:
        DataError: With all invalid rows.
    """
    problems: list[Problem] = []
    statements: list[tuple[int, Statement]] = []
    for line, record in read_records(path, problems):
        try:
            statements.append((line, Statement.model_validate(_nest_outcomes(record))))
        except ValidationError as error:
            for each in error.errors():
                problems.append(row_problem(path, line, describe_located_error(each, "the row")))
    if problems:
        raise DataError(problems)
    yield from statements


def row_problem(path: Path, line: int, message: str) -> Problem:
    """Return the problem of a row of a feedback file."""
    advice = "Fix the row. `luthier live feedback add --help` lists the fields."
    return Problem("feedback.invalid", message, advice).at(str(path), line)


def _nest_outcomes(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row with the columns of outcomes as ``outcomes``, without empty cells."""
    given = record.get("outcomes") or {}
    if not isinstance(given, Mapping):
        return dict(record)  # refused by the validation
    outcomes: dict[str, Any] = dict(given)
    row: dict[str, Any] = {}
    for name, value in record.items():
        if name.startswith(OUTCOME) and value not in (None, ""):
            outcome = name.removeprefix(OUTCOME)
            lower = outcome.endswith(".lower")
            outcomes[outcome.removesuffix(".lower")] = {
                "value": parse_value(value),
                "higher_is_better": not lower,
            }
        elif value not in (None, "") and not name.startswith(OUTCOME):
            row[name] = value
    return row | ({"outcomes": outcomes} if outcomes else {})


def parse_value(text: Any) -> Any:
    """Return the number or boolean in a text, or the text."""
    try:
        return json.loads(str(text).lower())
    except ValueError:
        return text


def ratings_of(feedback: Iterable[Feedback], position: int = 0) -> list[float]:
    """Return the ratings of raters from 1 to 5; a thumb is 5 or 1 for a rater without a rating."""
    found: dict[str, float] = {}
    for each in feedback:
        if each.position == position and each.name == "rating":
            found[each.rater] = each.value["value"]
        elif each.position == position and each.name == "thumb":
            found.setdefault(each.rater, 5.0 if each.value["value"] == "up" else 1.0)
    return [*found.values()]
