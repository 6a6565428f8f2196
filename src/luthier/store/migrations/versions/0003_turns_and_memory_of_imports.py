"""Imports take turns, account by account."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Go to this revision."""
    # Those that wait already keep the order in which they came.
    op.add_column(
        "model_imports", sa.Column("turn", sa.Integer(), nullable=False, server_default="0")
    )
