"""Exports: custom models written for other software, below an address of their account.

The life cycle of an export is that of a customization job without a pause.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TypedDict

from sqlalchemy import ColumnElement, select
from sqlalchemy.orm import Mapped, Session, mapped_column

from luthier.errors import WrongState
from luthier.server.tables.custom_models import CustomModel
from luthier.server.tables.database import Base, Plain, QuotingText, find_row, new_id, now, page_of
from luthier.server.tables.jobs import COMPLETED, ENDED, FAILED, QUEUED, RUNNING, STOPPED, STOPPING
from luthier.server.tables.queue import QueuedWork, lock_leased, log_file, next_turn
from luthier.server.tables.queue import renew as renew_lease

MOST_CRASHES = 3
"""Maximum number of worker deaths before an export fails."""
_LONGEST = 2048
"""Maximum length of a failure message, in characters."""


class ExportProgress(TypedDict):
    """Progress of a running export."""

    phase: str
    """``merge``, ``trace``, ``write``, ``compare`` or ``upload``."""
    done: int
    total: int
    """Bytes of ``write`` and ``upload``; else networks, prompts or batches."""


class ExportedFile(TypedDict):
    """File of an export."""

    name: str
    """Path below the address of the export."""
    bytes: int
    sha256: str


class ExportResult(TypedDict):
    """Result of a completed export."""

    address: str
    files: list[ExportedFile]
    bytes: int
    network: str
    """Type of the network in transformers."""
    compared: str | None
    """Difference between replies from the files and the model's replies; ``None`` if the weights are
    copied unchanged."""


class ModelExport(QueuedWork, Base):
    """An export of a custom model."""

    __tablename__ = "model_exports"
    noun = "the export"
    memory_advice = "choose a different format, or a server with more memory."
    unknown_memory = 1 << 29

    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(unique=True)
    model: Mapped[str]
    model_name: Mapped[str]
    stored_id: Mapped[str]
    format: Mapped[str]
    """``safetensors``, ``onnx`` or ``gguf``."""
    merged: Mapped[bool | None]
    """Whether the adapter is merged into the base; ``None`` for the format's default."""
    quantization: Mapped[str | None]
    output: Mapped[str]
    """Address of the export's parent folder."""
    state: Mapped[str] = mapped_column(default=QUEUED, index=True)
    failure: Mapped[str | None] = mapped_column(QuotingText)
    progress: Mapped[ExportProgress | None] = mapped_column(Plain)
    result: Mapped[ExportResult | None] = mapped_column(Plain)
    created: Mapped[datetime]
    started: Mapped[datetime | None]
    ended: Mapped[datetime | None]

    @classmethod
    def is_unfinished(cls) -> ColumnElement[bool]:
        """See :meth:`luthier.server.tables.queue.TakesTurns.is_unfinished`."""
        return cls.state.not_in(ENDED)

    @classmethod
    def ready(cls) -> tuple[ColumnElement[bool], ...]:
        """See :meth:`luthier.server.tables.queue.QueuedWork.ready`."""
        return (cls.state == QUEUED,)

    def start(self, session: Session, lease: str, worker: Mapping[str, object]) -> None:
        """See :meth:`luthier.server.tables.queue.QueuedWork.start`."""
        self.state, self.started = RUNNING, self.started or now()
        super().start(session, lease, worker)

    def release(self, session: Session, message: str) -> None:
        """Queue the export again, or end a stopped export."""
        if self.state == STOPPING:
            self.end(session)
            return
        self.state, self.since, self.progress = QUEUED, now(), None
        super().release(session, message)

    def expire(self, session: Session, why: str, cause: str = "") -> str:
        """Expire the lease of a dead worker. The export fails after :data:`MOST_CRASHES` deaths."""
        self.crashes += 1
        if self.crashes >= MOST_CRASHES and self.state == RUNNING:
            self.end(
                session,
                failure=f"{self.crashes} workers died during the export; in the last attempt, {why}. "
                f"{cause}".rstrip(),
            )
            # A worker that died before locking its files leaves the log.
            log_file(files_name(self.id)).unlink(missing_ok=True)
        else:
            self.release(session, why)
        return f"it is {self.state}"

    def end(
        self, session: Session, result: ExportResult | None = None, failure: str | None = None
    ) -> None:
        """End the export: completed with a ``result``, failed with a ``failure``, else stopped."""
        self.result, self.progress, self.ended = result, None, now()
        self.failure = failure and failure[:_LONGEST]
        self.state = COMPLETED if result is not None else FAILED if failure else STOPPED
        self.lease = self.lease_ends = self.worker = None
        session.flush()


def files_name(export_id: str) -> str:
    """Return the name of the folder, the lock and the log of an export."""
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
    """Queue an export of the ``Active`` model ``model`` with the ARN ``arn`` to ``output``."""
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
    )
    session.add(made)
    session.flush()
    return made


def is_exported(session: Session, arn: str) -> bool:
    """Return whether an unfinished export reads the model of this ARN."""
    found = select(ModelExport.seq).where(ModelExport.model == arn, ModelExport.is_unfinished())
    return session.scalar(found.limit(1)) is not None


def get(
    session: Session, account: str, export_id: str, *, lock: bool = False
) -> ModelExport | None:
    """Return the account's export; ``lock`` locks the row until the transaction ends."""
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
    """Return at most ``limit`` exports, the newest first, created before ``position``.

    ``model`` is the ARN of a custom model.
    """
    query = select(ModelExport).where(ModelExport.account == account)
    if states:
        query = query.where(ModelExport.state.in_(states))
    if model is not None:
        query = query.where(ModelExport.model == model)
    return page_of(session, query, ModelExport.seq, limit=limit, position=position)


def stop(session: Session, export: ModelExport) -> ModelExport:
    """Stop an export at once, or at the end of its worker. The caller has locked the row.

    Raises:
        WrongState: for a completed or failed export.
    """
    if export.state in (STOPPING, STOPPED):
        return export
    if export.state in ENDED:
        raise WrongState(f"export {export.id} is {export.state} and cannot be stopped")
    if export.lease is None:
        export.end(session)
    else:
        export.state = STOPPING
        session.flush()
    return export


def renew(
    session: Session, export_id: str, lease: str, progress: ExportProgress | None
) -> ModelExport:
    """Renew the lease and store the progress; raises :class:`LeaseLost`."""
    export = renew_lease(session, ModelExport, export_id, lease)
    export.progress = progress
    session.flush()
    return export


def finish(session: Session, export_id: str, lease: str, end: ExportResult | str) -> None:
    """End a running export with a result or a failure. A stopping export becomes stopped."""
    export = lock_leased(session, ModelExport, export_id, lease)
    if export.state == STOPPING:
        export.end(session)
    elif isinstance(end, str):
        export.end(session, failure=end)
    else:
        export.end(session, end)
