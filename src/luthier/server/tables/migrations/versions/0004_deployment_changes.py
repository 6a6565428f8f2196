"""Add the history of deployments."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"

MOMENT = sa.DateTime(timezone=True)


def upgrade() -> None:
    """Add the history of deployments."""
    op.create_table(
        "deployment_changes",
        sa.Column("seq", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("endpoint", sa.String(), nullable=False),
        sa.Column("action", sa.String(), nullable=False),
        sa.Column("model", sa.String(), nullable=False),
        sa.Column("previous", sa.String(), nullable=True),
        sa.Column("user", sa.String(), nullable=False),
        sa.Column("requested", MOMENT, nullable=False),
        sa.Column("finished", MOMENT, nullable=True),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("note", sa.String(), nullable=True),
        sa.Column("share", sa.Double(), nullable=True),
        sa.Column("answers", sa.Integer(), nullable=True),
        sa.PrimaryKeyConstraint("seq"),
    )
    with op.batch_alter_table("deployment_changes", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_deployment_changes_endpoint"), ["endpoint"])
    with op.batch_alter_table("endpoints", schema=None) as batch_op:
        batch_op.add_column(sa.Column("canary_share", sa.Double(), nullable=True))
