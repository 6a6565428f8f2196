"""What Alembic runs for every command: it works on the connection that it is given."""

from typing import Any, Literal

from alembic import context
from sqlalchemy import JSON

from luthier.server.tables.database import Moment
from luthier.server.tables.schema import METADATA


def render_item(kind: str, item: Any, _: Any) -> str | Literal[False]:
    """How our own types are written in a migration."""
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
