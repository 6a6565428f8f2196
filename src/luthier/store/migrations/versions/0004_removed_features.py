"""Drop the tables and columns of features that were removed."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Drop what no code reads any more."""
    # Evaluation jobs of Bedrock were runs without an eval.
    op.execute(
        "DELETE FROM evaluation_rows WHERE run_id IN "
        "(SELECT id FROM evaluation_runs WHERE eval_id IS NULL)"
    )
    op.execute("DELETE FROM evaluation_runs WHERE eval_id IS NULL")
    with op.batch_alter_table("evaluation_runs") as table:
        table.alter_column("eval_id", existing_type=sa.String(), nullable=False)
        for column in ("face", "application", "source_hash"):
            table.drop_column(column)
    op.drop_table("shared_store")
