"""${message}."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}

MOMENT = sa.DateTime(timezone=True)
PLAIN = sa.JSON().with_variant(JSONB(), "postgresql")


def upgrade() -> None:
    """${message}."""
    ${upgrades if upgrades else "pass"}
