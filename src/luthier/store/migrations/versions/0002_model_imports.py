"""Imports of custom models."""

import sqlalchemy as sa
from alembic import op

from luthier.store.database import Moment, Plain

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Go to this revision."""
    op.create_table(
        "model_imports",
        sa.Column("model_id", sa.String(), nullable=False),
        sa.Column("seq", sa.Integer(), nullable=False),
        sa.Column("account", sa.String(), nullable=False),
        sa.Column("source", sa.String(), nullable=False),
        sa.Column("crashes", sa.Integer(), nullable=False),
        sa.Column("lease", sa.String(), nullable=True),
        sa.Column("lease_ends", Moment(), nullable=True),
        sa.Column("worker", Plain, nullable=True),
        sa.PrimaryKeyConstraint("model_id"),
    )
    op.create_index("ix_model_imports_seq", "model_imports", ["seq"])
