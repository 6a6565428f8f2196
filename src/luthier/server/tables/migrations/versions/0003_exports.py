"""Exports of custom models as work of the queue."""

import sqlalchemy as sa
from alembic import op

from luthier.server.tables.database import Moment, Plain, QuotingText

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Go to this revision."""
    op.create_table(
        "model_exports",
        sa.Column("seq", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("model", sa.String(), nullable=False),
        sa.Column("model_name", sa.String(), nullable=False),
        sa.Column("stored_id", sa.String(), nullable=False),
        sa.Column("format", sa.String(), nullable=False),
        sa.Column("merged", sa.Boolean(), nullable=True),
        sa.Column("quantization", sa.String(), nullable=True),
        sa.Column("output", sa.String(), nullable=False),
        sa.Column("written", Plain, nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("failure", QuotingText(), nullable=True),
        sa.Column("progress", Plain, nullable=True),
        sa.Column("result", Plain, nullable=True),
        sa.Column("created", Moment(), nullable=False),
        sa.Column("started", Moment(), nullable=True),
        sa.Column("ended", Moment(), nullable=True),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("since", Moment(), nullable=False),
        sa.Column("memory", sa.BigInteger(), nullable=False),
        sa.Column("cores", sa.Integer(), nullable=False),
        sa.Column("crashes", sa.Integer(), nullable=False),
        sa.Column("worker", Plain, nullable=True),
        sa.Column("account", sa.String(), nullable=False),
        sa.Column("turn", sa.Integer(), nullable=False),
        sa.Column("lease", sa.String(), nullable=True),
        sa.Column("lease_ends", Moment(), nullable=True),
        sa.PrimaryKeyConstraint("seq"),
        sa.UniqueConstraint("id"),
    )
    op.create_index("ix_model_exports_account", "model_exports", ["account"])
    op.create_index("ix_model_exports_state", "model_exports", ["state"])
    op.add_column("quotas", sa.Column("exports_in_flight", sa.Integer(), nullable=True))
