"""Add answers of canaries."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Add answers of canaries."""
    op.create_table(
        "canary_answers",
        sa.Column("seq", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("change", sa.Integer(), nullable=False),
        sa.Column("request_id", sa.String(), nullable=False),
        sa.Column("unit", sa.String(), nullable=False),
        sa.Column("is_new", sa.Boolean(), nullable=False),
        sa.Column("failed", sa.Boolean(), nullable=False),
        sa.Column("milliseconds", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["change"], ["deployment_changes.seq"]),
        sa.PrimaryKeyConstraint("seq"),
    )
    with op.batch_alter_table("canary_answers", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_canary_answers_change"), ["change"])
        batch_op.create_index(batch_op.f("ix_canary_answers_request_id"), ["request_id"])
