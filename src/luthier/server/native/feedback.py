"""Feedback about captured requests."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy.orm import Session

from luthier.server.http.messages import Fault
from luthier.server.http.routes import Name
from luthier.server.live.feedback import (
    Statement,
    UnknownRequest,
    latest_feedback,
    store_feedback,
)
from luthier.server.native.operations import NativeCall, View, native_router
from luthier.server.tables.captures import CapturedRequest, find_captured

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
    """The feedback that counts for a request: the latest of each rater and name."""

    request: str
    """Request id."""
    added: int = 0
    """Number of new values; repeated values are not stored again."""
    feedback: list[StatementView]


@router.post("/feedback")
def add_feedback(call: NativeCall, body: Statement) -> FeedbackView:
    """Add feedback about a captured request."""
    database, capture = call.context.database, call.context.capture
    with database.read() as session:
        known = find_captured(session, call.account, body.request)
    if known is None:
        capture.flush()  # the request may be younger than the last write
    try:
        with database.write() as session:
            request, added = store_feedback(session, call.account, body, call.caller.user)
            return _view(session, request, added)
    except UnknownRequest as unknown:
        raise Fault("ResourceNotFound", unknown.text, parameter="request") from unknown


@router.get("/feedback/{request}")
def get_feedback(call: NativeCall, request: Name) -> FeedbackView:
    """Return the feedback about a captured request."""
    with call.context.database.read() as session:
        found = find_captured(session, call.account, request)
        if found is None:
            raise Fault("ResourceNotFound", UnknownRequest(request).text, parameter="request")
        return _view(session, found)


def _view(session: Session, request: CapturedRequest, added: int = 0) -> FeedbackView:
    rows = latest_feedback(session, [request.seq]).get(request.seq, [])
    values = [
        StatementView(
            name=row.name, value=row.value["value"], rater=row.rater, position=row.position,
            created=row.created,
        )
        for row in rows
    ]  # fmt: skip
    return FeedbackView(request=request.id, added=added, feedback=values)
