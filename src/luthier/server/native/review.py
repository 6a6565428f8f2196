"""Capture of requests, and captured answers for review: settings, the queue of a rater, and rows."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta
from itertools import chain
from typing import Annotated, Any

from fastapi import Query
from pydantic import Field
from sqlalchemy import Integer, case, cast, delete, func, null, or_, select, union_all
from sqlalchemy.orm import Session

from luthier.errors import RefusedInput
from luthier.files import json_lines
from luthier.server.http.messages import Fault
from luthier.server.live import rows as live_rows
from luthier.server.live import settings
from luthier.server.live.feedback import RATINGS
from luthier.server.live.rows import RowKind
from luthier.server.native.operations import Input, NativeCall, Page, View, native_router
from luthier.server.stores.uploaded_files import file_address
from luthier.server.tables.database import lock_by_name, now
from luthier.server.tables.live.captures import (
    DAYS,
    CapturedRequest,
    CaptureSettings,
    Feedback,
    ReviewLease,
)

router = native_router()
LEASE = timedelta(minutes=15)
"""Time for which an answer in the queue of a rater is kept from other raters."""
MOST_READ = 20
"""Records that are read for each answer of a page, because some records have no text."""


class CaptureView(View):
    """Capture settings of the account."""

    enabled: bool
    share: float
    """Share of captured requests, from 0 to 1."""
    redact: bool
    """True if personal data and secrets are replaced before anything is written."""
    days: int
    """Days until records are deleted."""
    second_rater: float | None = None
    """Share of answers that two raters get, where others have one rater; missing if all raters get all
    answers."""


class CaptureChange(Input):
    """New state of the capture."""

    enabled: bool
    second_rater: float | None = Field(default=None, ge=0, le=1)
    """Share of answers that two raters get, where others have one rater; null for all answers to all
    raters. Stays if missing."""


class ReviewPage(Page):
    """Filter and page of the queue."""

    model: str | None = Field(default=None, max_length=2048)
    """Name that clients sent, or a custom model; all models by default."""
    limit: int = Field(default=10, ge=0, le=100)


class ReviewedAnswer(View):
    """A captured answer that the caller has not rated."""

    request: str
    """Request id for feedback."""
    position: int
    """Number of the input or choice, from 0."""
    model: str
    """Model as named by the client."""
    created: datetime
    prompt: str | list[dict[str, Any]]
    """Text, or messages in OpenAI's form."""
    reply: str
    """Text of the answer; empty for a prediction."""
    prediction: dict[str, Any] | None = None
    """Fields of a prediction, such as ``label``."""


class ReviewView(View):
    """Answers to rate, newest first."""

    answers: list[ReviewedAnswer]
    waiting: int
    """Number of captured requests with answers that the caller has not rated."""
    rated: int
    """Number of captured requests that the caller has rated."""
    models: list[str]
    """Models with captured requests."""
    next: int | None = None
    """``position`` of the next page; missing on the last page."""


class RowsRequest(Input):
    """Answers for training rows."""

    model: Annotated[str, Field(min_length=1, max_length=2048)]
    """Name that clients sent, or a custom model."""
    to: RowKind = "sft"
    """Kind of rows."""
    rating: str | None = Field(default=None, max_length=64)
    """Only answers with this mean rating, such as ``>=4``."""


class RatedRowsView(View):
    """Training rows as a file of the account."""

    address: str
    """Address for the ``training`` of a job."""
    rows: int
    answers: int
    """Number of rated answers before the filter."""


@router.get("/capture")
def get_capture(call: NativeCall) -> CaptureView:
    """Return the capture settings of the account."""
    with call.context.database.read() as session:
        return _settings_view(session.get(CaptureSettings, call.account))


@router.put("/capture")
def set_capture(call: NativeCall, body: CaptureChange) -> CaptureView:
    """Enable or disable the capture of requests. Records of earlier requests stay until they expire."""
    call.record("capture/settings")
    with call.context.database.write() as session:
        if body.enabled:
            settings.enable(
                session,
                call.account,
                **body.model_dump(include={"second_rater"}, exclude_unset=True),
            )
        else:
            settings.disable(session, call.account)
        session.flush()
        view = _settings_view(session.get(CaptureSettings, call.account))
    call.context.capture.reload()
    return view


@router.get("/review")
def list_answers_to_review(call: NativeCall, page: Annotated[ReviewPage, Query()]) -> ReviewView:
    """List captured answers that the caller has not rated, newest first."""
    capture, database = call.context.capture, call.context.database
    capture.flush()  # requests may be younger than the last write
    everything = select(CapturedRequest).where(CapturedRequest.account == call.account)
    own = live_rows.requests_to(call.account, page.model) if page.model else everything
    own = own.where(CapturedRequest.error == "").order_by(None)
    rated_by_me = Feedback.rater == call.caller.user
    is_rating = Feedback.account == call.account, Feedback.name.in_(RATINGS)
    # Counted from ratings and leases: most captured requests have none.
    given = select(Feedback.request_seq, Feedback.rater, Feedback.position).where(*is_rating)
    leased = select(ReviewLease.request_seq, ReviewLease.rater, cast(null(), Integer))
    said = union_all(given, leased.where(ReviewLease.ends > now())).subquery().c
    by_me = said.rater == call.caller.user
    marks = (
        select(
            said.request_seq,
            func.count(case((by_me, said.position)).distinct()).label("positions"),
            func.count(case((~by_me, said.rater)).distinct()).label("others"),
        )
        .group_by(said.request_seq)
        .subquery()
    )
    numbers = own.with_only_columns(CapturedRequest.seq)
    marked = numbers.join(marks, marks.c.request_seq == CapturedRequest.seq)
    done_by_me = marks.c.positions >= func.coalesce(CapturedRequest.answers, 1)
    closed = marked.where(done_by_me)
    with database.read() as session:
        rated = _count(session, closed)
        capturing = session.get(CaptureSettings, call.account)
        share = capturing.second_rater if capturing is not None else None
        if share is not None:
            # Multiplied, so that neighbours do not have the same number of raters.
            is_shared = (CapturedRequest.seq * 37) % 100 < 100 * share
            enough = marks.c.others >= case((is_shared, 2), else_=1)
            closed = marked.where(or_(done_by_me, enough))
        waiting = _count(session, numbers) - _count(session, closed)
        names = (
            select(CapturedRequest.model).distinct().where(CapturedRequest.account == call.account)
        )
        models = sorted(session.scalars(names))
        if not page.model:
            # An expression, so that SQLite walks back from the newest request. The index of the
            # account is in another order: all of its requests would be sorted.
            account = CapturedRequest.account + ""
            numbers = select(CapturedRequest.seq).where(
                account == call.account, CapturedRequest.error == ""
            )
        numbers = numbers.where(CapturedRequest.seq.not_in(closed))
        if page.position is not None:
            numbers = numbers.where(CapturedRequest.seq < page.position)
        newest = numbers.order_by(CapturedRequest.seq.desc()).limit(page.limit * MOST_READ)
        query = select(CapturedRequest).where(CapturedRequest.seq.in_(newest))
        records = session.scalars(query.order_by(CapturedRequest.seq.desc())).all()
        seqs = Feedback.request_seq.in_([each.seq for each in records])
        columns = Feedback.request_seq, Feedback.position
        done = {
            (seq, place)
            for seq, place in session.execute(select(*columns).where(seqs, rated_by_me, *is_rating))
        }
    found: dict[int, list[ReviewedAnswer]] = {}
    last = None
    for record in records:
        if sum(map(len, found.values())) >= page.limit:
            break
        answers = _answers(call, record)
        found[record.seq] = [each for each in answers if (record.seq, each.position) not in done]
        last = record.seq
    if share is not None:
        _lease(call, found, closed)
    more = last is not None and (last != records[-1].seq or len(records) == page.limit * MOST_READ)
    return ReviewView(
        answers=list(chain.from_iterable(found.values())),
        waiting=waiting,
        rated=rated,
        models=models,
        next=last if more else None,
    )


@router.post("/review/rows", status_code=201)
def create_rows(call: NativeCall, body: RowsRequest) -> RatedRowsView:
    """Store rated answers as training rows in a file of the account."""
    call.record("file")
    capture = call.context.capture
    capture.flush()
    wanted = live_rows.Condition.parse(body.rating) if body.rating else None
    captured = live_rows.captured_answers(capture.objects, call.account, body.model)
    answers = [each for each in captured if each.latest(*RATINGS) is not None]
    kept = live_rows.filter_answers(answers, wanted, {})
    found = live_rows.training_rows(kept, body.to, rated=wanted is not None)
    if not found:
        text = f"{len(answers)} rated answers give no rows of the kind {body.to}."
        raise Fault("Validation", f"{text} Rate or edit more answers first.", parameter="to")
    file = call.context.locations.uploads.add(
        call.account, [json_lines(found).encode()], f"review-{body.to}.jsonl", "fine-tune"
    )
    call.record_created(f"file/{file.id}")
    return RatedRowsView(address=file_address(file.id), rows=len(found), answers=len(answers))


def _settings_view(row: CaptureSettings | None) -> CaptureView:
    row = row or CaptureSettings(enabled=False, share=1.0, redact=True, days=DAYS)
    return CaptureView(
        enabled=row.enabled,
        share=row.share,
        redact=row.redact,
        days=row.days,
        second_rater=row.second_rater,
    )


def _lease(call: NativeCall, found: dict[int, list[ReviewedAnswer]], closed: Any) -> None:
    """Keep answers from other raters for a while, and remove answers that others got meanwhile."""
    with call.context.database.write() as session:
        lock_by_name(session, f"review {call.account}")
        session.execute(delete(ReviewLease).where(ReviewLease.ends < now()))
        for seq in session.scalars(closed.where(CapturedRequest.seq.in_(found))).all():
            del found[seq]
        for seq, answers in found.items():
            if answers:
                lease = ReviewLease(request_seq=seq, rater=call.caller.user, ends=now() + LEASE)
                session.merge(lease)


def _count(session: Session, query: Any) -> int:
    return session.scalar(select(func.count()).select_from(query.subquery())) or 0


def _answers(call: NativeCall, record: CapturedRequest) -> Iterator[ReviewedAnswer]:
    try:
        found = live_rows.read_answers(call.context.capture.objects, record)
    except RefusedInput:  # a client deleted or replaced the object
        return
    for answer in found:
        is_reply = "role" in answer.reply
        yield ReviewedAnswer(
            request=record.id,
            position=answer.position,
            model=record.model,
            created=record.created,
            prompt=answer.prompt,
            reply=live_rows.text_of(answer.reply) if is_reply else "",
            prediction=None if is_reply else answer.reply,
        )
