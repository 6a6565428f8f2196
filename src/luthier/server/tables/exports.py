"""Exports: custom models that are written for other software, below an address of their account.

An export goes on as a customization job does: it waits, a worker holds it by a lease, and it ends once.
What a worker is about to write stands in its row first, so that whoever ends it can take that back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NotRequired, TypedDict

from sqlalchemy import ColumnElement, select
from sqlalchemy.orm import Mapped, Session, mapped_column

from luthier.errors import WrongState
from luthier.server.tables.custom_models import CustomModel
from luthier.server.tables.database import Base, Plain, QuotingText, find_row, new_id, now, page_of
from luthier.server.tables.jobs import COMPLETED, ENDED, FAILED, QUEUED, RUNNING, STOPPED, STOPPING
from luthier.server.tables.queue import QueuedWork, hold, log_file, next_turn
from luthier.server.tables.queue import renew as renew_lease

MOST_CRASHES = 3
"""So many workers may die over one export, and as many again as they remove what it has written."""
_LONGEST = 2048
"""Letters of a failure message."""


class ExportProgress(TypedDict):
    """Where an export stands."""

    phase: str
    """``merge``, ``trace``, ``write``, ``compare`` or ``upload``."""
    done: int
    total: int
    """Bytes of ``write`` and ``upload``; else networks, prompts or batches."""
    estimated_finish: NotRequired[str]
    """Of this part: a moment in ISO 8601."""


class ExportedFile(TypedDict):
    """One file of an export."""

    name: str
    """Below the address of the export."""
    bytes: int
    sha256: str


class ExportResult(TypedDict):
    """What came of a completed export."""

    address: str
    """Below which its files are."""
    files: list[ExportedFile]
    bytes: int
    network: str
    """Its type, as transformers calls it."""
    compared: str | None
    """How near the answers from the files are; none of forms that hold the model's own weights."""


class ModelExport(QueuedWork, Base):
    """One export of a custom model."""

    __tablename__ = "model_exports"
    noun = "the export"
    memory_advice = "ask for another format, or for a server with more memory."
    unknown_memory = 1 << 29
    """What its process takes by itself, until the model was looked at."""

    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    """Order of creation."""
    id: Mapped[str] = mapped_column(unique=True)
    """Twelve letters and digits."""
    model: Mapped[str]
    """ARN of the custom model."""
    model_name: Mapped[str]
    stored_id: Mapped[str]
    """Id under which the store opens it."""
    format: Mapped[str]
    """``safetensors``, ``onnx`` or ``gguf``."""
    merged: Mapped[bool | None]
    """Whether an adapter is folded into its base; ``None`` for what the format does by itself."""
    quantization: Mapped[str | None]
    """Type of the weights of a GGUF file."""
    output: Mapped[str]
    """Address below which its files are written."""
    written: Mapped[list[Any]] = mapped_column(default=list)
    """Addresses of what may have been written."""
    state: Mapped[str] = mapped_column(default=QUEUED, index=True)
    """As of a customization job that cannot be paused."""
    failure: Mapped[str | None] = mapped_column(QuotingText)
    progress: Mapped[ExportProgress | None] = mapped_column(Plain)
    result: Mapped[ExportResult | None] = mapped_column(Plain)
    created: Mapped[datetime]
    started: Mapped[datetime | None]
    """When the first worker began."""
    ended: Mapped[datetime | None]

    @classmethod
    def is_unfinished(cls) -> ColumnElement[bool]:
        """See :meth:`luthier.server.tables.queue.TakesTurns.is_unfinished`."""
        return cls.state.not_in(ENDED)

    @classmethod
    def ready(cls) -> tuple[ColumnElement[bool], ...]:
        """Queued, or with files to be taken back before it ends."""
        return (cls.state.in_((QUEUED, STOPPING)),)

    def start(self, session: Session, lease: str, worker: Mapping[str, Any]) -> None:
        """Let ``worker`` hold it by ``lease``."""
        if self.state == QUEUED:
            self.state = RUNNING
        self.started = self.started or now()
        super().start(session, lease, worker)

    def give_back(self, session: Session, message: str) -> None:
        """Let another worker begin anew, or take back what was written of one that is stopped."""
        if self.state == RUNNING:
            self.state, self.since, self.progress = QUEUED, now(), None
        super().give_back(session, message)

    def expire(self, session: Session, why: str, cause: str = "") -> str:
        """Take the export from a worker that died; the export fails after several deaths."""
        self.crashes += 1
        if self.crashes >= MOST_CRASHES and self.failure is None and self.state == RUNNING:
            self.failure = (
                f"{self.crashes} workers died one after the other over the export (the last one: "
                f"{why}). {cause}"
            ).rstrip()
            self.state = STOPPING
        if self.state == STOPPING and (not self.written or self.crashes >= 2 * MOST_CRASHES):
            self.end(session)
            # The process may have died before it locked its files, so that nobody else would.
            log_file(files_name(self.id)).unlink(missing_ok=True)
            return f"it is {self.state}"
        self.give_back(session, why)
        return f"it is {self.state}"

    def end(self, session: Session, result: ExportResult | None = None) -> None:
        """Completed with a ``result``; without one failed, or stopped where nothing failed."""
        self.result, self.progress, self.ended = result, None, now()
        self.state = COMPLETED if result is not None else FAILED if self.failure else STOPPED
        self.lease = self.lease_ends = self.worker = None
        session.flush()


def files_name(export_id: str) -> str:
    """What the folder, the lock and the log of an export are called."""
    return f"export-{export_id}"


def create_export(
    session: Session,
    model: CustomModel,
    arn: str,
    output: str,
    format: str,
    merged: bool | None,
    quantization: str | None,
) -> ModelExport:
    """Have ``model``, which is ``Active`` and has this ``arn``, written below ``output``."""
    assert model.stored_id is not None
    moment = now()
    made = ModelExport(
        id=new_id(),
        account=model.account,
        turn=next_turn(session, ModelExport, model.account),
        since=moment,
        created=moment,
        model=arn,
        model_name=model.name,
        stored_id=model.stored_id,
        format=format,
        merged=merged,
        quantization=quantization,
        output=output,
        lease=None,
        lease_ends=None,
        worker=None,
    )
    session.add(made)
    session.flush()
    return made


def is_exported(session: Session, arn: str) -> bool:
    """Whether an export that has not ended reads the model of this ARN."""
    found = select(ModelExport.seq).where(ModelExport.model == arn, ModelExport.is_unfinished())
    return session.scalar(found.limit(1)) is not None


def get(
    session: Session, account: str, export_id: str, *, lock: bool = False
) -> ModelExport | None:
    """The account's export of this id; ``lock`` keeps it as it is until the transaction ends."""
    found = select(ModelExport).where(ModelExport.account == account, ModelExport.id == export_id)
    return find_row(session, found, lock=lock)


def list_exports(
    session: Session,
    account: str,
    states: Sequence[str] = (),
    *,
    model: str | None = None,
    limit: int,
    position: int | None = None,
) -> list[ModelExport]:
    """At most ``limit`` exports, the newest first: those before the one whose ``seq`` is given.

    With ``model``, an ARN, those of one custom model.
    """
    query = select(ModelExport).where(ModelExport.account == account)
    if states:
        query = query.where(ModelExport.state.in_(states))
    if model is not None:
        query = query.where(ModelExport.model == model)
    return page_of(session, query, ModelExport.seq, limit=limit, position=position)


def stop(session: Session, export: ModelExport) -> ModelExport:
    """End an export without files: at once, or as soon as its worker has taken them back.

    ``export`` was read with ``lock``. One that is stopping or stopped stays as it is.

    Raises:
        WrongState: where it is completed or failed.
    """
    if export.state in (STOPPING, STOPPED):
        return export
    if export.state in ENDED:
        raise WrongState(f"export {export.id} is {export.state} and cannot be stopped")
    if export.lease is None and not export.written:
        export.end(session)
        return export
    export.state = STOPPING
    session.flush()
    return export


def renew(
    session: Session, export_id: str, lease: str, progress: ExportProgress | None
) -> ModelExport:
    """Hear from the worker: the lease is longer, and it stands at ``progress``.

    Raises:
        LeaseLost: where ``lease`` does not hold it.
    """
    export = renew_lease(session, ModelExport, export_id, lease)
    export.progress = progress
    session.flush()
    return export


def plan_writing(session: Session, export_id: str, lease: str, addresses: Sequence[str]) -> None:
    """Note ``addresses`` that are written next.

    Raises:
        LeaseLost: where ``lease`` does not hold it.
    """
    hold(session, ModelExport, export_id, lease).written = list(addresses)


def complete(session: Session, export_id: str, lease: str, result: ExportResult) -> None:
    """End an export whose files are all written.

    Raises:
        LeaseLost: where ``lease`` does not hold it.
        WrongState: where it was stopped meanwhile.
    """
    export = hold(session, ModelExport, export_id, lease)
    if export.state != RUNNING:
        raise WrongState(f"export {export.id} is {export.state}")
    export.end(session, result)


def fail(session: Session, export_id: str, lease: str, failure: str | None) -> None:
    """End an export without files: for ``failure``, or for what was noted before; else it is stopped.

    Raises:
        LeaseLost: where ``lease`` does not hold it.
    """
    export = hold(session, ModelExport, export_id, lease)
    if export.state == RUNNING and failure is not None:
        export.failure = failure[:_LONGEST]
    export.written = []
    export.end(session)
