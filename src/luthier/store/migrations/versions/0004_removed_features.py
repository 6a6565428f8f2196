"""Drop the tables and columns of features that were removed."""

import sqlalchemy as sa
from alembic import op

from luthier.store.database import Plain

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
    with op.batch_alter_table("evaluation_runs") as batch:
        batch.alter_column("eval_id", existing_type=sa.String(), nullable=False)
        for column in ("face", "application", "source_hash"):
            batch.drop_column(column)
    op.drop_table("shared_store")
    for table, column, name in (
        ("evals", "sealed", "definition"),
        ("evaluation_runs", "sealed", "request"),
        ("evaluation_rows", "sealed", "record"),
        ("batch_lines", "result", "result"),
    ):
        _store_as_text(table, column, name)


def _store_as_text(table: str, column: str, name: str) -> None:
    """Turn the JSON column ``column`` of ``{"text": …}`` into the text column ``name``."""
    rows = sa.table(table, sa.column("seq"), sa.column(column, Plain), sa.column("as_text"))
    with op.batch_alter_table(table) as batch:
        batch.add_column(sa.Column("as_text", sa.Text(), nullable=True))
    connection = op.get_bind()
    for seq, value in connection.execute(sa.select(rows.c.seq, rows.c[column])).all():
        # The content of an encrypted store has no "text", and nothing can read it any more.
        text = value.get("text", "{}")
        connection.execute(rows.update().where(rows.c.seq == seq).values(as_text=text))
    with op.batch_alter_table(table) as batch:
        batch.drop_column(column)
        batch.alter_column("as_text", new_column_name=name, existing_type=sa.Text(), nullable=False)
