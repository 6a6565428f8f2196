"""Imports of models into custom models.

An import has a row until its end. Its model is ``Creating`` for the same time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Mapped, Session, mapped_column

from luthier.limits import AccountQuotas
from luthier.server.tables import storage
from luthier.server.tables.accounts import quotas_of
from luthier.server.tables.custom_models import ACTIVE, CREATING, FAILED, IMPORTED, CustomModel
from luthier.server.tables.database import Base
from luthier.server.tables.queue import QueuedWork, lock_leased, log_file, next_turn
from luthier.server.tables.text import storable

MOST_CRASHES = 3
"""Maximum number of worker deaths before an import fails."""
_LONGEST = 2048
"""Maximum length of a failure message, in characters."""


class ModelImport(QueuedWork, Base):
    """Unfinished import."""

    __tablename__ = "model_imports"
    noun = "the import of model"
    unknown_memory = 1 << 29
    """Memory of the worker process before the files are known, in bytes."""

    id: Mapped[str] = mapped_column(primary_key=True)
    seq: Mapped[int] = mapped_column(index=True)
    """Sequence number of the model, in order of creation."""
    source: Mapped[str]

    def expire(self, session: Session, why: str, cause: str = "") -> str:
        """Expire the lease of a dead worker. The model fails after :data:`MOST_CRASHES` deaths."""
        if self.crashes + 1 < MOST_CRASHES:
            return super().expire(session, why, cause)
        failure = (
            f"{self.crashes + 1} workers died during the import; in the last attempt, {why}. {cause}"
        ).rstrip()
        fail(session, self.id, str(self.lease), failure)
        # A worker that died before locking its files leaves the log.
        log_file(files_name(self.id)).unlink(missing_ok=True)
        return "the model failed"


def files_name(model_id: str) -> str:
    """Return the base name of an import's lock and log."""
    return f"import-{model_id}"


def stored_name(model_id: str) -> str:
    """Return the name of an imported model in the library, unique among accounts."""
    return f"model-{model_id}"


def root_name(model_id: str) -> str:
    """Return the placeholder root of an imported model without a foundation model."""
    return f"luthier.{IMPORTED}-{model_id}"


def create_import(session: Session, model: CustomModel, source: str) -> ModelImport:
    """Queue the import of ``model``, which is ``Creating``, from ``source``."""
    made = ModelImport(
        id=model.id,
        seq=model.seq,
        turn=next_turn(session, ModelImport, model.account),
        since=model.created,
        account=model.account,
        source=source,
    )
    session.add(made)
    session.flush()
    return made


def is_trusted(session: Session, model_id: str) -> bool:
    """Return whether an administrator created the import of a model."""
    model = session.scalars(select(CustomModel).filter_by(id=model_id)).one()
    return bool(model.details.get("trusted"))


def complete(
    session: Session,
    model_id: str,
    lease: str,
    changes: Mapping[str, Any],
    details: Mapping[str, Any],
    defaults: AccountQuotas | None = None,
) -> None:
    """Activate the model with ``changes`` to its columns and additional ``details``.

    ``defaults`` are the quotas of accounts without own quotas.

    Raises:
        LeaseLost: if ``lease`` has expired.
        QuotaExceeded: if the account has no space for the model.
    """
    model = _end(session, lock_leased(session, ModelImport, model_id, lease))
    model.status, model.failure = ACTIVE, None
    for name, value in changes.items():
        setattr(model, name, value)
    model.details = {**model.details, **details}
    session.flush()
    quotas = quotas_of(session, model.account, defaults or AccountQuotas())
    storage.charge(session, model.account, quotas, stored_bytes=model.stored_bytes or 0)


def fail(session: Session, model_id: str, lease: str, failure: str) -> None:
    """Fail the import; the model stores ``failure`` for its owner."""
    model = _end(session, lock_leased(session, ModelImport, model_id, lease))
    model.status, model.failure = FAILED, storable(failure[:_LONGEST])
    session.flush()


def _end(session: Session, row: ModelImport) -> CustomModel:
    """Delete the row of an import and return its model."""
    model = session.scalars(select(CustomModel).filter_by(id=row.id)).one()
    assert model.status == CREATING
    session.delete(row)
    return model
