"""What accounts store is counted and has quotas; what they use is written down by day."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Go to this revision."""
    for name in (
        "objects", "files", "buckets", "uploads_in_progress", "imported_models", "imports_in_flight",
        "batches_in_flight", "provisioned_throughputs",
    ):  # fmt: skip
        op.add_column("quotas", sa.Column(name, sa.Integer(), nullable=True))
    op.add_column("quotas", sa.Column("stored_bytes", sa.BigInteger(), nullable=True))
    op.add_column("custom_models", sa.Column("stored_bytes", sa.BigInteger(), nullable=True))
    # Filled at the start of the server, which counts.
    op.create_table(
        "storage",
        sa.Column("account", sa.String(), nullable=False),
        sa.Column("stored_bytes", sa.BigInteger(), nullable=False),
        sa.Column("objects", sa.Integer(), nullable=False),
        sa.Column("files", sa.Integer(), nullable=False),
        sa.Column("buckets", sa.Integer(), nullable=False),
        sa.Column("uploads_in_progress", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("account"),
    )
    op.create_table(
        "usage",
        sa.Column("account", sa.String(), nullable=False),
        sa.Column("day", sa.Date(), nullable=False),
        sa.Column("model", sa.String(), nullable=False),
        sa.Column("requests", sa.BigInteger(), nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger(), nullable=False),
        sa.Column("generated_tokens", sa.BigInteger(), nullable=False),
        sa.Column("training_seconds", sa.Double(), nullable=False),
        sa.Column("bytes_in", sa.BigInteger(), nullable=False),
        sa.Column("bytes_out", sa.BigInteger(), nullable=False),
        sa.Column("stored_bytes", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("account", "day", "model"),
    )
