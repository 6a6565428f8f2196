"""All tables of the service, and database migrations."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, inspect

from luthier.errors import LuthierError
from luthier.server.tables import (
    accounts,
    audit,
    custom_models,
    endpoints,
    exports,
    idempotency,
    imports,
    jobs,
    measurements,
    objects,
    principals,
    storage,
    studies,
    tags,
    usage,
)
from luthier.server.tables.database import Base, Database, lock_by_name
from luthier.server.tables.live import alerts, captures
from luthier.server.tables.openai import (
    batches,
    conversations,
    evaluations,
    uploaded_files,
    vector_stores,
)

_MODULES = (
    accounts, alerts, audit, batches, captures, conversations, custom_models, endpoints, evaluations,
    exports, idempotency, imports, jobs, measurements, objects, principals, storage,
    studies, tags,    uploaded_files, usage, vector_stores,
)  # fmt: skip
"""Modules that declare tables when imported."""
METADATA = Base.metadata


def upgrade(database: Database) -> None:
    """Create or migrate the tables. Servers that start together wait for each other.

    Raises:
        LuthierError: if the database belongs to another version of luthier.
    """
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    with database.write() as session:
        connection = session.connection()
        lock_by_name(session, "schema")
        found = MigrationContext.configure(connection).get_current_revision()
        script = ScriptDirectory.from_config(config)
        if found is not None and found not in {each.revision for each in script.walk_revisions()}:
            raise _other_version(database)
        if found != script.get_current_head():
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
        elif _columns(connection) != {
            name: set(t.columns.keys()) for name, t in METADATA.tables.items()
        }:
            # A development version has different tables under the same revision.
            raise _other_version(database)


def _columns(connection: Connection) -> dict[str, set[str]]:
    """Return the columns of each table. Alembic's comparison of types takes 20 times as long."""
    found = inspect(connection).get_multi_columns()
    return {
        name: {column["name"] for column in columns}
        for (_, name), columns in found.items()
        if name != "alembic_version"
    }


def _other_version(database: Database) -> LuthierError:
    return LuthierError(
        f"the database {database.engine.url.render_as_string()} belongs to a different version of "
        "luthier. Start that version, or set LUTHIER_DATABASE to a different database"
    )
