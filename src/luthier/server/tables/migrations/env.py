"""Alembic environment, which uses the connection of the caller."""

from typing import Any, Literal

from alembic import context
from sqlalchemy import JSON

from luthier.server.tables.database import Moment
from luthier.server.tables.schema import METADATA


def render_item(kind: str, item: Any, _: Any) -> str | Literal[False]:
    """Return the source text of luthier's column types in a migration."""
    if kind == "type" and isinstance(item, Moment):
        return "Moment()"
    if kind == "type" and isinstance(item, JSON):
        return "Plain"
    return False


context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=METADATA,
    render_as_batch=True,
    render_item=render_item,
    transactional_ddl=True,
)
context.run_migrations()
