"""The id that a database has in common with its shared store."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Go to this revision."""
    if sa.inspect(op.get_bind()).has_table("shared_store"):
        return  # for a while the migration before made it
    op.create_table(
        "shared_store",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("token", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
