"""Jobs and imports take turns, account by account; imports are part of the account of memory."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Go to this revision."""
    # Those that wait already keep the order in which they came.
    for table in ("jobs", "model_imports"):
        turn = sa.Column("turn", sa.Integer(), nullable=False, server_default="0")
        op.add_column(table, turn)
    memory = sa.Column("memory", sa.BigInteger(), nullable=False, server_default="0")
    op.add_column("model_imports", memory)
