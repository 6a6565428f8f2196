"""Count the usage of each user."""

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
COUNTS = "requests", "prompt_tokens", "generated_tokens", "bytes_in", "bytes_out", "stored_bytes"


def upgrade() -> None:
    """Add the user to the key of the usage. Rows of earlier versions have no user."""
    op.create_table(
        "usage_by_user",
        sa.Column("account", sa.String(), nullable=False),
        sa.Column("day", sa.Date(), nullable=False),
        sa.Column("user", sa.String(), nullable=False),
        sa.Column("model", sa.String(), nullable=False),
        sa.Column("training_seconds", sa.Double(), nullable=False),
        *(sa.Column(name, sa.BigInteger(), nullable=False) for name in COUNTS),
        sa.PrimaryKeyConstraint("account", "day", "user", "model"),
    )
    names = ["account", "day", "model", "training_seconds", *COUNTS]
    old, new = (
        sa.table(table, *map(sa.column, [*names, "user"])) for table in ("usage", "usage_by_user")
    )
    known = sa.select(*(old.c[name] for name in names), sa.literal(""))
    op.execute(new.insert().from_select([*names, "user"], known))
    op.drop_table("usage")
    op.rename_table("usage_by_user", "usage")
