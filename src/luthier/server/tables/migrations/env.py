"""Alembic environment, with the connection of the caller or to the database of ``LUTHIER_HOME``.

Migrations name column types of SQLAlchemy only. Databases that exist do not change with luthier's
types.
"""

from typing import Any, Literal

from alembic import context
from sqlalchemy import JSON
from sqlalchemy.types import TypeDecorator

from luthier.server.tables.database import Database, Moment
from luthier.server.tables.schema import METADATA


def render_item(kind: str, item: Any, autogenerate: Any) -> str | Literal[False]:
    """Return the source text of luthier's column types in a migration."""
    if kind == "type" and isinstance(item, Moment):
        return "MOMENT"
    if kind == "type" and isinstance(item, JSON):
        return "PLAIN"
    if kind == "type" and isinstance(item, TypeDecorator):
        return f"sa.{type(item.impl).__name__}()"
    return False


context.configure(
    connection=context.config.attributes.get("connection") or Database().engine.connect(),
    target_metadata=METADATA,
    render_as_batch=True,
    render_item=render_item,
    transactional_ddl=True,
)
context.run_migrations()
