"""All tables of the service, and how a database gets them: by migrations, never by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, inspect

from luthier.errors import LuthierError
from luthier.escaping import list_some
from luthier.server.tables import (
    accounts,
    audit,
    batches,
    custom_models,
    endpoints,
    evaluations,
    exports,
    idempotency,
    imports,
    jobs,
    objects,
    principals,
    storage,
    tags,
    uploaded_files,
    usage,
)
from luthier.server.tables.database import Base, Database, lock_by_name

_MODULES = (
    accounts, audit, batches, custom_models, endpoints, evaluations, exports,
    idempotency, imports, jobs, objects, principals, storage, tags, uploaded_files,
    usage,
)  # fmt: skip
"""Each declares its tables when it is imported."""
METADATA = Base.metadata


def upgrade(database: Database) -> None:
    """Bring the tables to what this version needs; servers that start together wait for each other.

    Raises:
        LuthierError: where a newer version of luthier made the database, or one between two releases,
            so that tables or columns lack that no migration adds.
    """
    config = _config()
    with database.write() as session:
        connection = session.connection()
        lock_by_name(session, "schema")
        found = MigrationContext.configure(connection).get_current_revision()
        script = ScriptDirectory.from_config(config)
        if found is not None and found not in {each.revision for each in script.walk_revisions()}:
            raise LuthierError(
                f"the database {database.engine.url.render_as_string()} was made by another version "
                f"of luthier (revision {found}). Start that version, or use another database"
            )
        if found != script.get_current_head():
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
        if lacking := _lacking(connection):
            raise LuthierError(
                f"the database {database.engine.url.render_as_string()} is of a version of luthier "
                f"that was not released, and lacks {list_some(lacking, 3)}. Use another database "
                "(LUTHIER_DATABASE); or start the version that made it, and fetch what "
                "is needed with it"
            )


def _lacking(connection: Connection) -> list[str]:
    """Tables and columns that are declared and not there."""
    columns = inspect(connection).get_multi_columns()
    there = {name: {column["name"] for column in found} for (_, name), found in columns.items()}
    lacking = [f"the table {name}" for name in METADATA.tables if name not in there]
    for name, table in METADATA.tables.items():
        missing = {column.name for column in table.columns} - there.get(name, set())
        lacking += [f"{name}.{column}" for column in sorted(missing) if name in there]
    return lacking


def _config(**attributes: Any) -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.attributes.update(attributes)
    return config
