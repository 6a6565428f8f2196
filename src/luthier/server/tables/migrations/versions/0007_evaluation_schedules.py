"""Add schedules of evaluations."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0007"
down_revision = "0006"

MOMENT = sa.DateTime(timezone=True)
PLAIN = sa.JSON().with_variant(JSONB(), "postgresql")


def upgrade() -> None:
    """Add schedules of evaluations, and the results of scheduled evaluations."""
    op.create_table(
        "evaluation_schedules",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("account", sa.String(), nullable=False),
        sa.Column("endpoint", sa.String(), nullable=False),
        sa.Column("every", sa.String(), nullable=False),
        sa.Column("request", sa.Text(), nullable=False),
        sa.Column("next_run", MOMENT, nullable=False),
        sa.Column("announced", sa.Integer(), nullable=False),
        sa.Column("created", MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("endpoint"),
    )
    op.create_index("ix_evaluation_schedules_account", "evaluation_schedules", ["account"])
    with op.batch_alter_table("measurements", schema=None) as batch_op:
        batch_op.add_column(sa.Column("schedule", sa.String(), nullable=True))
        batch_op.add_column(sa.Column("row_scores", sa.Text(), nullable=True))
        batch_op.add_column(sa.Column("change", PLAIN, nullable=True))
        batch_op.create_index("ix_measurements_schedule", ["schedule"])
