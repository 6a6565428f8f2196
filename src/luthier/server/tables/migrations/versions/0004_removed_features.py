"""Drop the tables and columns of features that were removed."""

import sqlalchemy as sa
from alembic import op

from luthier.server.tables.database import Plain

revision = "0004"
down_revision = "0003"

_ALLOW_ALL = {
    "Version": "2012-10-17",
    "Statement": [{"Effect": "Allow", "Action": "*", "Resource": "*"}],
}
_ROLES = {
    "admin": "administrator", "developer": "developer", "auditor": "read-only",
    "invoke-only": "invoker",
}  # fmt: skip


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
    _replace_policies()
    counts = ("objects", "files", "buckets", "uploads_in_progress")
    with op.batch_alter_table("storage") as batch:
        for column in counts:
            batch.drop_column(column)
    with op.batch_alter_table("quotas") as batch:
        for column in (
            *counts, "imported_models", "imports_in_flight", "exports_in_flight",
            "batches_in_flight", "evaluations_in_flight",
        ):  # fmt: skip
            batch.drop_column(column)
    with op.batch_alter_table("custom_models") as batch:
        batch.drop_column("pinned")
    op.drop_table("audit_head")
    with op.batch_alter_table("audit_log") as batch:
        for column in ("previous", "hash"):
            batch.drop_column(column)
    if op.get_bind().dialect.name == "postgresql":  # SQLite numbers rows by itself
        op.execute("CREATE SEQUENCE audit_log_seq_seq OWNED BY audit_log.seq")
        op.execute("ALTER TABLE audit_log ALTER seq SET DEFAULT nextval('audit_log_seq_seq')")
        last = "(SELECT coalesce(max(seq), 0) + 1 FROM audit_log)"
        op.execute(f"SELECT setval('audit_log_seq_seq', {last}, false)")


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


def _replace_policies() -> None:
    """Give each user a role in place of policies; users with policies of their own become read-only."""
    bind, users = op.get_bind(), sa.table(
        "users", sa.column("seq"), sa.column("role"), sa.column("policies", Plain)
    )  # fmt: skip
    roles = {}
    for user in bind.execute(sa.select(users)).all():
        if user.role is None and user.policies == [_ALLOW_ALL]:
            roles[user.seq] = "administrator"
        elif user.role in _ROLES and not user.policies:
            roles[user.seq] = _ROLES[user.role]
    # Not in batch mode: SQLite would drop the table that keys reference.
    op.drop_column("users", "policies")
    op.drop_column("users", "role")
    role = sa.Column("role", sa.String(), nullable=False, server_default="read-only")
    op.add_column("users", role)
    for seq, name in roles.items():
        bind.execute(sa.update(users).where(users.c.seq == seq).values(role=name))
    op.add_column("access_keys", sa.Column("role", sa.String(), nullable=True))
    op.add_column("api_keys", sa.Column("role", sa.String(), nullable=True))
    op.drop_table("iam_roles")
