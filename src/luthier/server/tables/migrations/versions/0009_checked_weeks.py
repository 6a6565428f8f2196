"""Add checked weeks, numbers of answers, and files and skips of schedules."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    """Add the columns."""
    moment = sa.DateTime(timezone=True)
    op.add_column("capture_settings", sa.Column("checked", moment, nullable=True))
    op.add_column("captured_requests", sa.Column("answers", sa.Integer(), nullable=True))
    for name in ("file", "skipped"):
        op.add_column("evaluation_schedules", sa.Column(name, sa.String(), nullable=True))
