"""Which shared store belongs to which database.

Both hold one random id, made when a server first opens them together. Files that no row names are
removed, so a store that is opened with another database would lose all that it holds: it is refused.
One from before there were ids is taken for that of a database whose rows name files of it.
"""

from __future__ import annotations

from itertools import islice

from sqlalchemy import select
from sqlalchemy.orm import Mapped, Session, mapped_column

from luthier.errors import RefusedInput, SharedStoreAway
from luthier.store.custom_models import CustomModel
from luthier.store.database import Base, Database, lock_by_name
from luthier.store.ids import random_id
from luthier.store.jobs import Job
from luthier.store.shared import BLOBS, IDENTITY, OBJECTS, RECORDS, SharedStore, read_shared

_LOOKED_UP = 500
"""Files of a store without an id that are looked up at once."""


class SharedStoreIdentity(Base):
    """One row, with the id of the shared store that holds the files of this database."""

    __tablename__ = "shared_store"

    id: Mapped[int] = mapped_column(primary_key=True)
    token: Mapped[str]


def agree_identity(database: Database, store: SharedStore) -> None:
    """Have one id in both where neither has one; else do as :func:`check_identity`."""
    with database.read() as session:
        known = _identities(session, store)
    if known == (None, None):
        _refuse_unclaimed(database, store)
    with database.write() as session:
        lock_by_name(session, "shared store")  # servers that start together do this in turn
        token, shared = _identities(session, store)
        if token is None and shared is None:
            token = shared = random_id(32)
            session.add(SharedStoreIdentity(id=1, token=token))
            session.flush()
            if not store.create(IDENTITY, token.encode()):
                _, shared = _identities(session, store)
        _refuse_other(token, shared)


def check_identity(database: Database, store: SharedStore) -> None:
    """Refuse a shared store that is not the one of this database. Before anything is swept.

    Raises:
        RefusedInput: with the reason.
        SharedStoreAway: where the shared store cannot be read.
    """
    with database.read() as session:
        token, shared = _identities(session, store)
    _refuse_other(token, shared)
    if token is None:
        _refuse_unclaimed(database, store)


def check_present(database: Database, store: SharedStore) -> None:
    """As :func:`check_identity`, for a worker: its work waits until the store is the right one.

    Raises:
        SharedStoreAway: with the reason.
    """
    try:
        check_identity(database, store)
    except RefusedInput as error:
        raise SharedStoreAway(str(error)) from error


def _refuse_unclaimed(database: Database, store: SharedStore) -> None:
    """Refuse a store without an id that holds files, of which no row of the database names any."""
    # Objects alone look at the shared store where they are swept, by what is checked here.
    from luthier.store.objects import ObjectPiece

    keys = (each.key for prefix in (RECORDS, OBJECTS, BLOBS) for each in store.list(prefix))
    first = None
    while some := [*islice(keys, _LOOKED_UP)]:
        first = first or some[0]
        named: set[str] = set()
        for key in some:
            parts = key.removesuffix(".json").split("/")
            if parts[0] == BLOBS:
                parts.pop()
            named |= {parts[-1], ":".join(parts[-2:])}
        with database.read() as session:
            for column in (CustomModel.stored_id, Job.id, ObjectPiece.id):
                if session.scalar(select(column).where(column.in_(named)).limit(1)) is not None:
                    return
    if first is not None:
        raise RefusedInput(
            f"the shared store holds files, such as {first}, and no {IDENTITY}: an earlier version of "
            "luthier put them there, and this database has rows of none of them. Start a server with "
            "the database that they belong to (LUTHIER_DATABASE), which ties the two; or name another "
            f"bucket, prefix or folder. Where they are not needed any more, delete what is below "
            f"{RECORDS}/, {BLOBS}/ and {OBJECTS}/"
        )


def _identities(session: Session, store: SharedStore) -> tuple[str | None, str | None]:
    """The ids that the database and the shared store have."""
    content = read_shared(store, IDENTITY)
    token = session.scalar(select(SharedStoreIdentity.token))
    return token, None if content is None else content.decode(errors="replace").strip()


def _refuse_other(token: str | None, shared: str | None) -> None:
    if token == shared:
        return
    if shared is None:
        raise RefusedInput(
            f"the shared store has no {IDENTITY}, and the database belongs to the one with {token}: "
            "this bucket, prefix or folder is another one, was emptied, or is not mounted. Name or "
            "mount the one that the servers of this database use, or copy its content here; where "
            f"it is that one, and what it lost is lost, put {token} under its key {IDENTITY}"
        )
    if token is None:
        raise RefusedInput(
            f"the shared store belongs to another database: it has the {IDENTITY} {shared}, and this "
            "database has none. Name the database of its servers (LUTHIER_DATABASE), or another "
            "bucket, prefix or folder; where nothing in it is needed any more, delete its key "
            f"{IDENTITY}"
        )
    raise RefusedInput(
        f"the shared store belongs to another database: its {IDENTITY} is {shared}, and this database "
        f"belongs to the one with {token}. Name the database or the shared store that goes with it"
    )
