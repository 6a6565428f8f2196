"""Feedback about captured requests."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from luthier.server.http.messages import Fault
from luthier.server.http.routes import Name
from luthier.server.live.agreement import Agreement, agreements
from luthier.server.live.feedback import (
    Statement,
    UnknownRequest,
    latest_feedback,
    store_feedback,
)
from luthier.server.native.operations import NativeCall, View, native_router
from luthier.server.roles import Permission, permissions_of
from luthier.server.tables.live.captures import CapturedRequest, Feedback, find_captured

router = native_router()


class StatementView(View):
    """A value of a rater."""

    name: str
    """``thumb``, ``rating``, ``preferred``, ``corrected``, ``label``, ``comment`` or
    ``outcome.NAME``."""
    value: Any
    rater: str
    position: int
    created: datetime


class FeedbackView(View):
    """Feedback about a request: the new values, or the latest of each rater and name."""

    request: str
    """Request id."""
    added: int = 0
    """Number of new values; repeated values are not stored again."""
    feedback: list[StatementView]


@router.post("/feedback")
def add_feedback(call: NativeCall, body: Statement) -> FeedbackView:
    """Add feedback about a captured request, and return the new values.

    Callers with the role ``invoker`` are raters under their own name.
    """
    permitted = permissions_of(call.caller) & {Permission.READ, Permission.DEVELOP}
    rater = (body.rater if permitted else None) or call.caller.user
    database, capture = call.context.database, call.context.capture
    with database.read() as session:
        known = find_captured(session, call.account, body.request)
    if known is None:
        capture.flush()  # the request may be younger than the last write
    try:
        with database.write() as session:
            request, added = store_feedback(session, call.account, body, rater)
            return _view(request, added, len(added))
    except UnknownRequest as unknown:
        raise Fault("ResourceNotFound", unknown.text, parameter="request") from unknown


@router.get("/feedback/{request}")
def get_feedback(call: NativeCall, request: Name) -> FeedbackView:
    """Return the feedback about a captured request."""
    with call.context.database.read() as session:
        found = find_captured(session, call.account, request)
        if found is None:
            raise Fault("ResourceNotFound", UnknownRequest(request).text, parameter="request")
        return _view(found, latest_feedback(session, [found.seq]).get(found.seq, ()))


class AgreementView(View):
    """Agreement of raters."""

    agreement: list[Agreement]
    """Kinds of feedback with two raters of an answer."""


@router.get("/models/{model}/agreement")
def get_agreement(call: NativeCall, model: Name) -> AgreementView:
    """Return how well the raters of a model's answers agree."""
    with call.context.database.read() as session:
        return AgreementView(agreement=agreements(session, call.account, model))


def _view(request: CapturedRequest, rows: Sequence[Feedback], added: int = 0) -> FeedbackView:
    values = [
        StatementView(
            name=row.name, value=row.value["value"], rater=row.rater, position=row.position,
            created=row.created,
        )
        for row in rows
    ]  # fmt: skip
    return FeedbackView(request=request.id, added=added, feedback=values)
