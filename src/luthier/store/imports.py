"""Imports: custom models that are copied from outside and looked at, and who works on which.

An import has a row as long as it goes on; its model is ``Creating`` for just as long. As with jobs
(``luthier.store.leases``), who works on one holds it by the token of a lease, and what anybody else
writes is refused.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, Select, func, select, update
from sqlalchemy.orm import Mapped, Session, mapped_column

from luthier.errors import LeaseLost
from luthier.limits import AccountQuotas
from luthier.store import storage
from luthier.store.accounts import quotas_of
from luthier.store.custom_models import ACTIVE, CREATING, FAILED, IMPORTED, CustomModel
from luthier.store.database import Base, now
from luthier.store.leases import LEASE, PATIENCE, Waiting, alone, fits
from luthier.store.text import storable
from luthier.store.turns import next_turn

MOST_CRASHES = 3
"""So many processes may die over one model."""
UNKNOWN = 1 << 29
"""Bytes that an import counts for until its files were looked at: what its process takes by itself."""
_LONGEST = 2048
"""Letters of a failure message."""


class ModelImport(Base):
    """One import."""

    __tablename__ = "model_imports"

    model_id: Mapped[str] = mapped_column(primary_key=True)
    """Id of the custom model."""
    seq: Mapped[int] = mapped_column(index=True)
    """That of the model: the order in which they came."""
    turn: Mapped[int] = mapped_column(default=0)
    """Lower ones are taken first; those of one account have turns one after the other."""
    account: Mapped[str]
    source: Mapped[str]
    """Address of the folder."""
    memory: Mapped[int] = mapped_column(BigInteger, default=0)
    """Bytes that trying it takes, for admission; 0 until its files were looked at."""
    crashes: Mapped[int] = mapped_column(default=0)
    lease: Mapped[str | None]
    lease_ends: Mapped[datetime | None]
    """The holder is taken for dead after this moment, unless it has been heard from."""
    worker: Mapped[dict[str, Any] | None]
    """The process that holds the lease: ``host``, ``pid``, and when it was ``born``."""


def begin(session: Session, model: CustomModel, source: str) -> ModelImport:
    """Have ``model``, which is ``Creating``, copied from ``source``."""
    made = ModelImport(
        model_id=model.id,
        seq=model.seq,
        turn=next_turn(session, ModelImport.turn, ModelImport.account, model.account),
        account=model.account,
        source=source,
        lease=None,
        lease_ends=None,
        worker=None,
    )
    session.add(made)
    session.flush()
    return made


def waiting_of(session: Session, account: str) -> int:
    """How many imports of an account have not ended."""
    counted = select(func.count()).where(ModelImport.account == account)
    return session.scalar(counted) or 0


def imported_by(session: Session, account: str) -> int:
    """How many models from outside an account has, those among them that are not there yet."""
    counted = select(func.count()).where(
        CustomModel.account == account, CustomModel.foundation == IMPORTED
    )
    return session.scalar(counted) or 0


def claim(
    session: Session,
    worker: Mapping[str, Any],
    free_memory: int,
    *,
    idle: bool = False,
    before: Waiting | None = None,
) -> ModelImport | None:
    """Take the next import that fits, by turns; ``worker`` holds it until its process is there.

    Args:
        worker: the process that holds the lease until the import's own is there.
        free_memory: bytes that an import may take.
        idle: nothing else runs on this machine.
        before: a job that waits for memory; imports that came later leave it what it needs.
    """
    alone(session)
    for seq, memory, since in session.execute(_in_turn()):
        if not fits(memory or UNKNOWN, since, free_memory, idle, before):
            if now() - since > PATIENCE:
                return None
            continue
        taken = select(ModelImport).where(ModelImport.seq == seq, ModelImport.lease.is_(None))
        found = session.scalars(taken.with_for_update(skip_locked=True)).first()
        if found is not None:
            found.lease, found.lease_ends = secrets.token_hex(16), now() + LEASE
            found.worker = dict(worker)
            session.flush()
            return found
    return None


def overdue(session: Session) -> Waiting | None:
    """The next import, where it has waited for memory for longer than ``PATIENCE``."""
    for _, memory, since in session.execute(_in_turn()):
        if memory and now() - since > PATIENCE:
            return Waiting(since, memory)
    return None


def _in_turn() -> Select[int, int, datetime]:
    """Imports that nobody holds, in their order: ``seq``, memory, and since when they wait."""
    waiting = select(ModelImport.seq, ModelImport.memory, CustomModel.created)
    waiting = waiting.join(CustomModel, CustomModel.id == ModelImport.model_id)
    waiting = waiting.where(ModelImport.lease.is_(None))
    return waiting.order_by(ModelImport.turn, ModelImport.seq)


def held(session: Session) -> list[ModelImport]:
    """Every import that somebody works on."""
    working = select(ModelImport).where(ModelImport.lease.is_not(None))
    return list(session.scalars(working.order_by(ModelImport.seq)))


def holding(session: Session, model_id: str, lease: str) -> ModelImport:
    """The import, kept as it is until the transaction ends.

    Raises:
        LeaseLost: where ``lease`` does not hold it.
    """
    asked = select(ModelImport).where(ModelImport.model_id == model_id, ModelImport.lease == lease)
    asked = asked.with_for_update().execution_options(populate_existing=True)
    found = session.scalars(asked).first()
    if found is None:
        raise LeaseLost(f"the lease of the import of model {model_id} is lost")
    return found


def renew(
    session: Session, model_id: str, lease: str, worker: Mapping[str, Any] | None = None
) -> ModelImport:
    """Hear from the process that works on it.

    Raises:
        LeaseLost: as :func:`holding`.
    """
    found = holding(session, model_id, lease)
    found.lease_ends = now() + LEASE
    if worker is not None:
        found.worker = dict(worker)
    return found


def needs(session: Session, model_id: str, lease: str, memory: int) -> None:
    """Note how many bytes of memory trying the model takes.

    Raises:
        LeaseLost: as :func:`holding`.
    """
    holding(session, model_id, lease).memory = memory
    session.flush()


def release(session: Session, model_id: str, lease: str) -> None:
    """Let somebody else go on with it, from the beginning. A lost lease is let go of already."""
    mine = ModelImport.model_id == model_id, ModelImport.lease == lease
    session.execute(update(ModelImport).where(*mine).values(lease=None, lease_ends=None))


def complete(
    session: Session,
    model_id: str,
    lease: str,
    changes: Mapping[str, Any],
    told: Mapping[str, Any],
    defaults: AccountQuotas | None = None,
) -> None:
    """The model is ``Active``, with ``changes`` to its columns, and ``told`` among its details.

    ``defaults`` are the quotas of an account without quotas of its own.

    Raises:
        LeaseLost: as :func:`holding`.
        QuotaExceeded: where the account has no room for it.
    """
    model = _model(session, holding(session, model_id, lease))
    model.status, model.failure = ACTIVE, None
    for name, value in changes.items():
        setattr(model, name, value)
    model.details = {**model.details, **told}
    session.flush()
    quotas = quotas_of(session, model.account, defaults or AccountQuotas())
    storage.charge(session, model.account, quotas, stored_bytes=model.stored_bytes or 0)


def fail(session: Session, model_id: str, lease: str, failure: str) -> None:
    """The model is ``Failed``; ``failure`` is told to its owner.

    Raises:
        LeaseLost: as :func:`holding`.
    """
    model = _model(session, holding(session, model_id, lease))
    model.status, model.failure = FAILED, storable(failure[:_LONGEST])
    session.flush()


def expire(session: Session, model_id: str, lease: str, why: str) -> bool:
    """Take the lease from a process that died; whether another one may try.

    Raises:
        LeaseLost: as :func:`holding`.
    """
    found = holding(session, model_id, lease)
    found.crashes += 1
    if found.crashes >= MOST_CRASHES:
        failure = (
            f"{found.crashes} processes died one after the other while they looked at the model (the "
            f"last one: {why}). Where this is the system's way to end what takes too much memory, take "
            "a smaller model, or a server with more memory."
        )
        fail(session, model_id, lease, failure)
        return False
    found.lease, found.lease_ends, found.worker = None, None, None
    session.flush()
    return True


def unfinished(session: Session, model_id: str) -> bool:
    """Whether there is anything to do for a model."""
    return session.get(ModelImport, model_id) is not None


def _model(session: Session, found: ModelImport) -> CustomModel:
    """The model of an import that ends."""
    model = session.scalars(select(CustomModel).filter_by(id=found.model_id)).one()
    assert model.status == CREATING
    session.delete(found)
    return model
