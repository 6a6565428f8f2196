"""Database of the service: SQLite in the home folder by default, PostgreSQL by URL.

Each module declares its tables on :class:`Base`; :mod:`luthier.server.tables.schema` imports all
modules. Every change is one transaction, and acknowledged changes are on disk: SQLite runs in WAL
mode with ``synchronous=FULL``.
"""

from __future__ import annotations

import json
import os
import secrets
import sqlite3
import string
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import (
    JSON,
    ColumnElement,
    DateTime,
    Engine,
    Select,
    String,
    Text,
    create_engine,
    event,
    func,
    inspect,
    make_url,
    select,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.exc import ArgumentError, OperationalError
from sqlalchemy.orm import DeclarativeBase, InstrumentedAttribute, Session
from sqlalchemy.types import TypeDecorator

from luthier.errors import LuthierError, RefusedInput
from luthier.files import disk_errors, luthier_home
from luthier.server.tables.text import dump_storable, storable

Row = TypeVar("Row")
DATABASE_FILE = "luthier.db"
"""SQLite's file name in the home folder."""
BUSY_SECONDS = 30
"""Maximum wait of a transaction for a concurrent writer, in seconds."""
SMALL = string.ascii_lowercase + string.digits
MIXED = string.ascii_letters + string.digits
"""Alphabets of ids."""


class Moment(TypeDecorator[datetime]):
    """Point in time in UTC with microseconds. Both databases return aware datetimes."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Any) -> datetime | None:
        """Convert an aware datetime of any zone to UTC."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("the datetime has no time zone")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Any) -> datetime | None:
        """Add UTC to a datetime of SQLite, stored without zone."""
        return value if value is None or value.tzinfo else value.replace(tzinfo=UTC)


class QuotingText(TypeDecorator[str]):
    """Text with quotes of data rows, and therefore possibly with unstorable characters."""

    impl = String
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Any) -> str | None:
        """Replace unstorable characters."""
        return None if value is None else storable(value)


class JSONText(TypeDecorator[dict[str, Any]]):
    """Object stored as JSON text: JSON columns of PostgreSQL reject U+0000."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: dict[str, Any] | None, dialect: Any) -> str | None:
        """Write the object as JSON."""
        return None if value is None else json.dumps(value)

    def process_result_value(self, value: str | None, dialect: Any) -> dict[str, Any] | None:
        """Read the object."""
        return None if value is None else dict(json.loads(value))


Plain = JSON().with_variant(JSONB(), "postgresql")
"""Values ready for JSON."""


class Base(DeclarativeBase):
    """Parent of all tables."""

    type_annotation_map = {  # noqa: RUF012  (SQLAlchemy reads it off the class)
        datetime: Moment(),
        dict[str, Any]: Plain,
        list[Any]: Plain,
    }


def now() -> datetime:
    """Return the current time in UTC."""
    return datetime.now(UTC)


def random_id(length: int, alphabet: str = SMALL) -> str:
    """Return a random id of ``length`` characters."""
    return "".join(secrets.choice(alphabet) for _ in range(length))


def new_id() -> str:
    """Return a random id in the format of an ARN's last part."""
    return random_id(12)


def default_url() -> str:
    """Return the URL of the SQLite database in the home folder."""
    return f"sqlite:///{luthier_home() / DATABASE_FILE}"


def is_database_here(url: str | None) -> bool:
    """Return whether :class:`Database` opens an existing database and creates no SQLite file.

    The function does not connect to a database server.
    """
    parsed = make_url(url or default_url())
    return parsed.get_backend_name() != "sqlite" or Path(parsed.database or "").is_file()


class Database:
    """Database with connections and transactions. Safe to share between threads."""

    def __init__(self, url: str | None = None) -> None:
        """Connect to ``url``; by default to ``luthier.db`` in the home folder.

        Raises:
            RefusedInput: for a URL that is neither SQLite nor PostgreSQL.
            LuthierError: if the connection fails.
        """
        self.url = url or default_url()
        self.engine = _engine(self.url)
        try:
            with self.engine.connect():
                pass
        except OperationalError as error:
            fault = f"the database {self.engine.url.render_as_string()} cannot be "
            fault += f"opened: {error.orig}. " if self.is_sqlite else f"reached: {error.orig}"
            if self.is_sqlite:
                fault += "Check the disk space and the permissions of the folder"
            raise LuthierError(fault) from error

    @property
    def is_sqlite(self) -> bool:
        """Whether the database is SQLite, with a single writer at a time."""
        return self.engine.dialect.name == "sqlite"

    @contextmanager
    def write(self) -> Iterator[Session]:
        """Open a write transaction: committed at the end, rolled back after an exception.

        On SQLite the transaction is the only writer from its first statement, so that rows cannot
        change after they were read. On PostgreSQL, ``with_for_update`` locks rows.
        """
        with Session(self.engine, expire_on_commit=False) as session:
            if self.is_sqlite:
                session.connection().exec_driver_sql("BEGIN IMMEDIATE")
            # After an exception, leaving the session rolls back.
            yield session
            session.commit()

    @contextmanager
    def read(self) -> Iterator[Session]:
        """Open a read-only transaction with a consistent snapshot."""
        with Session(self.engine, expire_on_commit=False) as session:
            if self.is_sqlite:
                session.connection().exec_driver_sql("BEGIN")
            else:
                session.connection(execution_options={"isolation_level": "REPEATABLE READ"})
            yield session

    def tables(self) -> set[str]:
        """Return the names of the existing tables."""
        return set(inspect(self.engine).get_table_names())

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()


def _engine(url: str) -> Engine:
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise RefusedInput(f"{url!r} is not a database URL") from error
    if parsed.get_backend_name() == "postgresql":
        parsed = parsed.set(drivername="postgresql+psycopg")
        if find_spec("psycopg") is None:
            raise RefusedInput("PostgreSQL needs psycopg: pip install 'luthier[postgres]'")
        # Detects connections that died with a restarted database server.
        return create_engine(
            parsed, json_serializer=dump_storable, pool_pre_ping=True, pool_size=10, max_overflow=20
        )
    if parsed.get_backend_name() != "sqlite" or parsed.database in (None, "", ":memory:"):
        raise RefusedInput(
            f"{parsed.render_as_string()} is not supported. Use sqlite:///FILE or "
            "postgresql://USER@HOST/NAME"
        )
    folder = Path(parsed.database).parent
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    _keep_private(Path(parsed.database))
    engine = create_engine(
        parsed, json_serializer=dump_storable, connect_args={"timeout": BUSY_SECONDS}
    )
    event.listen(engine, "connect", _prepare_sqlite)
    return engine


def _keep_private(path: Path) -> None:
    """Restrict SQLite's file to the owner. SQLite gives new log files the same permissions."""
    path = path.resolve()
    # If this fails, opening the database reports the reason.
    with suppress(OSError):
        if not path.exists():
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
        for file in (path, *(path.with_name(f"{path.name}-{log}") for log in ("wal", "shm"))):
            if file.exists() and file.stat().st_mode & 0o077:
                file.chmod(file.stat().st_mode & 0o700)


def count_rows(session: Session, *conditions: ColumnElement[bool]) -> int:
    """Return the number of rows with all ``conditions``."""
    return session.scalar(select(func.count()).where(*conditions)) or 0


def find_row(session: Session, query: Select[Row], *, lock: bool = False) -> Row | None:
    """Return the first row of ``query``. ``lock`` locks the current row until the transaction ends."""
    if lock:
        # Refresh attributes that the session read before the lock.
        query = query.with_for_update().execution_options(populate_existing=True)
    return session.scalars(query).first()


def page_of(
    session: Session,
    query: Select[Row],
    number: InstrumentedAttribute[int],
    *,
    limit: int,
    position: int | None = None,
    ascending: bool = False,
) -> list[Row]:
    """Return at most ``limit`` rows that follow ``position`` in the order of ``number``."""
    if position is not None:
        query = query.where(number > position if ascending else number < position)
    order = number.asc() if ascending else number.desc()
    return list(session.scalars(query.order_by(order).limit(limit)))


def dialect_insert(session: Session, table: type[Base]) -> postgresql.Insert | sqlite.Insert:
    """Return the dialect's ``INSERT`` with support of ``ON CONFLICT``."""
    if session.get_bind().dialect.name == "postgresql":
        return postgresql.insert(table)
    return sqlite.insert(table)


def lock_by_name(session: Session, name: str) -> None:
    """Block other transactions that lock the same ``name`` until this transaction ends.

    PostgreSQL uses an advisory lock. SQLite allows one writer at a time anyway.
    """
    if session.get_bind().dialect.name == "postgresql":
        key = func.hashtextextended(name, 0)
        session.execute(select(func.pg_advisory_xact_lock(key)))


def _prepare_sqlite(connection: Any, record: Any) -> None:
    # The driver would begin transactions late, after the first read.
    connection.isolation_level = None
    _write_ahead(connection)
    # secure_delete overwrites deleted rows: clients expect deletion of their data.
    for pragma in ("synchronous=FULL", "foreign_keys=ON", "secure_delete=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _write_ahead(connection: Any) -> None:
    """Enable the write-ahead log. If several servers start at once, the first server enables the
    log."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            # PRAGMA journal_mode ignores the connection's busy timeout.
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.02)
