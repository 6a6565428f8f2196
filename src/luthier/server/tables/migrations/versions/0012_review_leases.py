"""Add leases of answers in the queues of raters."""

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"


def upgrade() -> None:
    """Add leases."""
    op.create_table(
        "review_leases",
        sa.Column("request_seq", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("rater", sa.String(), nullable=False),
        sa.Column("ends", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("request_seq", "rater"),
    )
