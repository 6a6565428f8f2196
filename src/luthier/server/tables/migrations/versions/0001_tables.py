"""Tables of release 0.1.0.

The file is frozen: databases with these tables exist. Later changes are new revisions.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0001"
down_revision = None

MOMENT = sa.DateTime(timezone=True)
PLAIN = sa.JSON().with_variant(JSONB(), "postgresql")


def upgrade() -> None:
    """Create all tables."""
    op.create_table(
        "accounts",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("disabled", sa.Boolean(), nullable=False),
        sa.Column("created", MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "answered_requests",
        sa.Column("account", sa.String(), nullable=False),
        sa.Column("operation", sa.String(), nullable=False),
        sa.Column("token", sa.String(), nullable=False),
        sa.Column("parameters", sa.String(), nullable=False),
        sa.Column("answer", PLAIN, nullable=False),
        sa.Column("created", MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("account", "operation", "token"),
    )
    op.create_table(
        "audit_log",
        sa.Column("seq", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("at", MOMENT, nullable=False),
        sa.Column("account", sa.String(), nullable=False),
        sa.Column("user", sa.String(), nullable=False),
        sa.Column("action", sa.String(), nullable=False),
        sa.Column("resource", sa.String(), nullable=False),
        sa.Column("outcome", sa.String(), nullable=False),
        sa.Column("request_id", sa.String(), nullable=False),
        sa.Column("address", sa.String(), nullable=False),
        sa.Column("details", PLAIN, nullable=False),
        sa.PrimaryKeyConstraint("seq"),
    )
    op.create_index("ix_audit_log_account", "audit_log", ["account"], unique=False)
    op.create_table(
        "batches",
        sa.Column("seq", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("endpoint", sa.String(), nullable=False),
        sa.Column("window", sa.String(), nullable=False),
        sa.Column("input_file", sa.String(), nullable=False),
        sa.Column("output_file", sa.String(), nullable=True),
        sa.Column("error_file", sa.String(), nullable=True),
        sa.Column("errors", PLAIN, nullable=False),
        sa.Column("user_metadata", PLAIN, nullable=False),
        sa.Column("total", sa.Integer(), nullable=False),
        sa.Column("succeeded", sa.Integer(), nullable=False),
        sa.Column("failed", sa.Integer(), nullable=False),
        sa.Column("moments", PLAIN, nullable=False),
        sa.Column("caller", PLAIN, nullable=False),
        sa.Column("status", sa.String(), nullable=False),
        sa.Column("created", MOMENT, nullable=False),
        sa.Column("expires", MOMENT, nullable=False),
        sa.Column("account", sa.String(), nullable=False),
        sa.Column("turn", sa.Integer(), nullable=False),
        sa.Column("lease", sa.String(), nullable=True),
        sa.Column("lease_ends", MOMENT, nullable=True),
        sa.PrimaryKeyConstraint("seq"),
        sa.UniqueConstraint("id"),
    )
    op.create_index("ix_batches_account", "batches", ["account"], unique=False)
    op.create_index("ix_batches_status", "batches", ["status"], unique=False)
    op.create_table(
        "buckets",
        sa.Column("seq", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("account", sa.String(), nullable=False),
        sa.Column(
            "name", sa.Text().with_variant(sa.Text(collation="C"), "postgresql"), nullable=False
        ),
        sa.Column("created", MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("seq"),
        sa.UniqueConstraint("account", "name"),
    )
    op.create_table(
        "custom_models",
        sa.Column("seq", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("account", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("foundation", sa.String(), nullable=False),
        sa.Column("root", sa.String(), nullable=False),
        sa.Column("base_model", sa.String(), nullable=False),
        sa.Column("stored_id", sa.String(), nullable=True),
        sa.Column("job_id", sa.String(), nullable=True),
        sa.Column("openai_id", sa.String(), nullable=True),
        sa.Column("status", sa.String(), nullable=False),
        sa.Column("failure", sa.String(), nullable=True),
        sa.Column("details", PLAIN, nullable=False),
        sa.Column("stored_bytes", sa.BigInteger(), nullable=True),
        sa.Column("created", MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("seq"),
        sa.UniqueConstraint("account", "name"),
        sa.UniqueConstraint("id"),
    )
    op.create_index("ix_custom_models_account", "custom_models", ["account"], unique=False)
    op.create_index("ix_custom_models_job_id", "custom_models", ["job_id"], unique=False)
    op.create_index("ix_custom_models_openai_id", "custom_models", ["openai_id"], unique=False)
    op.create_table(
        "endpoints",
        sa.Column("seq", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("account", sa.String(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("foundation", sa.String(), nullable=False),
        sa.Column("model", sa.String(), nullable=False),
        sa.Column("next_model", sa.String(), nullable=True),
        sa.Column("status", sa.String(), nullable=False),
        sa.Column("update_status", sa.String(), nullable=True),
        sa.Column("failure", sa.String(), nullable=True),
        sa.Column("description", sa.String(), nullable=True),
        sa.Column("units", sa.Integer(), nullable=True),
        sa.Column("commitment", sa.String(), nullable=True),
        sa.Column("created", MOMENT, nullable=False),
        sa.Column("modified", MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("seq"),
        sa.UniqueConstraint("account", "kind", "name"),
        sa.UniqueConstraint("id"),
    )
    op.create_index("ix_endpoints_account", "endpoints", ["account"], unique=False)
    op.create_index("ix_endpoints_model", "endpoints", ["model"], unique=False)
    op.create_index("ix_endpoints_next_model", "endpoints", ["next_model"], unique=False)
    op.create_table(
        "evals",
        sa.Column("seq", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("account", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("definition", sa.Text(), nullable=False),
        sa.Column("user_metadata", PLAIN, nullable=False),
        sa.Column("stored_bytes", sa.BigInteger(), nullable=False),
        sa.Column("created", MOMENT, nullable=False),
        sa.Column("updated", MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("seq"),
        sa.UniqueConstraint("id"),
    )
    op.create_index("ix_evals_account", "evals", ["account"], unique=False)
    op.create_table(
        "jobs",
        sa.Column("seq", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("model_name", sa.String(), nullable=False),
        sa.Column("api", sa.String(), nullable=False),
        sa.Column("customization_type", sa.String(), nullable=False),
        sa.Column("foundation", sa.String(), nullable=False),
        sa.Column("base_model", sa.String(), nullable=False),
        sa.Column("command", sa.String(), nullable=False),
        sa.Column("recipe", PLAIN, nullable=False),
        sa.Column("request", PLAIN, nullable=False),
        sa.Column("output", sa.String(), nullable=True),
        sa.Column("validators", PLAIN, nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("failure", sa.String(), nullable=True),
        sa.Column("result", PLAIN, nullable=True),
        sa.Column("details", PLAIN, nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("cores", sa.Integer(), nullable=False),
        sa.Column("worked", sa.Double(), nullable=False),
        sa.Column("time_limit", sa.Integer(), nullable=True),
        sa.Column("has_working_files", sa.Boolean(), nullable=False),
        sa.Column("created", MOMENT, nullable=False),
        sa.Column("modified", MOMENT, nullable=False),
        sa.Column("started", MOMENT, nullable=True),
        sa.Column("ended", MOMENT, nullable=True),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("memory", sa.BigInteger(), nullable=False),
        sa.Column("crashes", sa.Integer(), nullable=False),
        sa.Column("worker", PLAIN, nullable=True),
        sa.Column("account", sa.String(), nullable=False),
        sa.Column("turn", sa.Integer(), nullable=False),
        sa.Column("lease", sa.String(), nullable=True),
        sa.Column("lease_ends", MOMENT, nullable=True),
        sa.PrimaryKeyConstraint("seq"),
        sa.UniqueConstraint("account", "name"),
        sa.UniqueConstraint("id"),
    )
    op.create_index("ix_jobs_account", "jobs", ["account"], unique=False)
    op.create_index("ix_jobs_state", "jobs", ["state"], unique=False)
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
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("failure", sa.String(), nullable=True),
        sa.Column("progress", PLAIN, nullable=True),
        sa.Column("result", PLAIN, nullable=True),
        sa.Column("created", MOMENT, nullable=False),
        sa.Column("started", MOMENT, nullable=True),
        sa.Column("ended", MOMENT, nullable=True),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("since", MOMENT, nullable=False),
        sa.Column("memory", sa.BigInteger(), nullable=False),
        sa.Column("cores", sa.Integer(), nullable=False),
        sa.Column("crashes", sa.Integer(), nullable=False),
        sa.Column("worker", PLAIN, nullable=True),
        sa.Column("account", sa.String(), nullable=False),
        sa.Column("turn", sa.Integer(), nullable=False),
        sa.Column("lease", sa.String(), nullable=True),
        sa.Column("lease_ends", MOMENT, nullable=True),
        sa.PrimaryKeyConstraint("seq"),
        sa.UniqueConstraint("id"),
    )
    op.create_index("ix_model_exports_account", "model_exports", ["account"], unique=False)
    op.create_index("ix_model_exports_state", "model_exports", ["state"], unique=False)
    op.create_table(
        "model_imports",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("seq", sa.Integer(), nullable=False),
        sa.Column("source", sa.String(), nullable=False),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("since", MOMENT, nullable=False),
        sa.Column("memory", sa.BigInteger(), nullable=False),
        sa.Column("cores", sa.Integer(), nullable=False),
        sa.Column("crashes", sa.Integer(), nullable=False),
        sa.Column("worker", PLAIN, nullable=True),
        sa.Column("account", sa.String(), nullable=False),
        sa.Column("turn", sa.Integer(), nullable=False),
        sa.Column("lease", sa.String(), nullable=True),
        sa.Column("lease_ends", MOMENT, nullable=True),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("ix_model_imports_account", "model_imports", ["account"], unique=False)
    op.create_index("ix_model_imports_seq", "model_imports", ["seq"], unique=False)
    op.create_table(
        "principals_version",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("token", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "storage",
        sa.Column("account", sa.String(), nullable=False),
        sa.Column("stored_bytes", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("account"),
    )
    op.create_table(
        "tags",
        sa.Column("resource", sa.String(), nullable=False),
        sa.Column("key", sa.String(), nullable=False),
        sa.Column("value", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("resource", "key"),
    )
    op.create_table(
        "uploaded_files",
        sa.Column("seq", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("account", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("purpose", sa.String(), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.String(), nullable=False),
        sa.Column("created", MOMENT, nullable=False),
        sa.Column("expires", MOMENT, nullable=True),
        sa.Column("deleted", MOMENT, nullable=True),
        sa.PrimaryKeyConstraint("seq"),
        sa.UniqueConstraint("id"),
    )
    op.create_index("ix_uploaded_files_account", "uploaded_files", ["account"], unique=False)
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
    op.create_table(
        "batch_lines",
        sa.Column("seq", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("batch_id", sa.String(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("failed", sa.Boolean(), nullable=False),
        sa.Column("result", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["batch_id"],
            ["batches.id"],
        ),
        sa.PrimaryKeyConstraint("seq"),
        sa.UniqueConstraint("batch_id", "number"),
    )
    op.create_index("ix_batch_lines_batch_id", "batch_lines", ["batch_id"], unique=False)
    op.create_table(
        "evaluation_runs",
        sa.Column("seq", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("eval_id", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("request", sa.Text(), nullable=False),
        sa.Column("user_metadata", PLAIN, nullable=False),
        sa.Column("error_code", sa.String(), nullable=True),
        sa.Column("error_message", sa.String(), nullable=True),
        sa.Column("total", sa.Integer(), nullable=False),
        sa.Column("passed", sa.Integer(), nullable=False),
        sa.Column("failed", sa.Integer(), nullable=False),
        sa.Column("errored", sa.Integer(), nullable=False),
        sa.Column("tallies", PLAIN, nullable=False),
        sa.Column("stored_bytes", sa.BigInteger(), nullable=False),
        sa.Column("completed", MOMENT, nullable=True),
        sa.Column("caller", PLAIN, nullable=False),
        sa.Column("status", sa.String(), nullable=False),
        sa.Column("created", MOMENT, nullable=False),
        sa.Column("expires", MOMENT, nullable=False),
        sa.Column("account", sa.String(), nullable=False),
        sa.Column("turn", sa.Integer(), nullable=False),
        sa.Column("lease", sa.String(), nullable=True),
        sa.Column("lease_ends", MOMENT, nullable=True),
        sa.ForeignKeyConstraint(
            ["eval_id"],
            ["evals.id"],
        ),
        sa.PrimaryKeyConstraint("seq"),
        sa.UniqueConstraint("id"),
    )
    op.create_index("ix_evaluation_runs_account", "evaluation_runs", ["account"], unique=False)
    op.create_index("ix_evaluation_runs_eval_id", "evaluation_runs", ["eval_id"], unique=False)
    op.create_index("ix_evaluation_runs_status", "evaluation_runs", ["status"], unique=False)
    op.create_table(
        "job_events",
        sa.Column("seq", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("job_id", sa.String(), nullable=False),
        sa.Column("at", MOMENT, nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("message", sa.String(), nullable=False),
        sa.Column("data", PLAIN, nullable=False),
        sa.ForeignKeyConstraint(
            ["job_id"],
            ["jobs.id"],
        ),
        sa.PrimaryKeyConstraint("seq"),
    )
    op.create_index("ix_job_events_job_id", "job_events", ["job_id"], unique=False)
    op.create_table(
        "object_uploads",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("account", sa.String(), nullable=False),
        sa.Column("bucket_seq", sa.Integer(), nullable=False),
        sa.Column(
            "key", sa.Text().with_variant(sa.Text(collation="C"), "postgresql"), nullable=False
        ),
        sa.Column("headers", PLAIN, nullable=False),
        sa.Column("user_metadata", PLAIN, nullable=False),
        sa.Column("checksum", sa.String(), nullable=False),
        sa.Column("checksum_type", sa.String(), nullable=False),
        sa.Column("created", MOMENT, nullable=False),
        sa.ForeignKeyConstraint(
            ["bucket_seq"],
            ["buckets.seq"],
        ),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("ix_object_uploads_bucket_seq", "object_uploads", ["bucket_seq"], unique=False)
    op.create_table(
        "objects",
        sa.Column("seq", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("account", sa.String(), nullable=False),
        sa.Column("bucket_seq", sa.Integer(), nullable=False),
        sa.Column(
            "key", sa.Text().with_variant(sa.Text(collation="C"), "postgresql"), nullable=False
        ),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("etag", sa.String(), nullable=False),
        sa.Column("parts", sa.Integer(), nullable=False),
        sa.Column("headers", PLAIN, nullable=False),
        sa.Column("user_metadata", PLAIN, nullable=False),
        sa.Column("checksums", PLAIN, nullable=False),
        sa.Column("modified", MOMENT, nullable=False),
        sa.ForeignKeyConstraint(
            ["bucket_seq"],
            ["buckets.seq"],
        ),
        sa.PrimaryKeyConstraint("seq"),
        sa.UniqueConstraint("bucket_seq", "key"),
    )
    op.create_table(
        "quotas",
        sa.Column("account", sa.String(), nullable=False),
        sa.Column("jobs_in_flight", sa.Integer(), nullable=True),
        sa.Column("custom_models", sa.Integer(), nullable=True),
        sa.Column("deployments", sa.Integer(), nullable=True),
        sa.Column("requests_per_second", sa.Double(), nullable=True),
        sa.Column("stored_bytes", sa.BigInteger(), nullable=True),
        sa.Column("provisioned_throughputs", sa.Integer(), nullable=True),
        sa.ForeignKeyConstraint(
            ["account"],
            ["accounts.id"],
        ),
        sa.PrimaryKeyConstraint("account"),
    )
    op.create_table(
        "users",
        sa.Column("seq", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("account", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("role", sa.String(), nullable=False),
        sa.Column("disabled", sa.Boolean(), nullable=False),
        sa.Column("created", MOMENT, nullable=False),
        sa.ForeignKeyConstraint(
            ["account"],
            ["accounts.id"],
        ),
        sa.PrimaryKeyConstraint("seq"),
        sa.UniqueConstraint("account", "name"),
    )
    op.create_index("ix_users_account", "users", ["account"], unique=False)
    op.create_table(
        "access_keys",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("account", sa.String(), nullable=False),
        sa.Column("user", sa.Integer(), nullable=False),
        sa.Column("sealed", sa.LargeBinary(), nullable=False),
        sa.Column("role", sa.String(), nullable=True),
        sa.Column("origin", sa.String(), nullable=False),
        sa.Column("disabled", sa.Boolean(), nullable=False),
        sa.Column("created", MOMENT, nullable=False),
        sa.ForeignKeyConstraint(
            ["user"],
            ["users.seq"],
        ),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("ix_access_keys_account", "access_keys", ["account"], unique=False)
    op.create_index("ix_access_keys_user", "access_keys", ["user"], unique=False)
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("digest", sa.String(), nullable=False),
        sa.Column("shown", sa.String(), nullable=False),
        sa.Column("label", sa.String(), nullable=False),
        sa.Column("account", sa.String(), nullable=False),
        sa.Column("user", sa.Integer(), nullable=False),
        sa.Column("role", sa.String(), nullable=True),
        sa.Column("origin", sa.String(), nullable=False),
        sa.Column("expires", MOMENT, nullable=True),
        sa.Column("disabled", sa.Boolean(), nullable=False),
        sa.Column("created", MOMENT, nullable=False),
        sa.ForeignKeyConstraint(
            ["user"],
            ["users.seq"],
        ),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("digest"),
    )
    op.create_index("ix_api_keys_account", "api_keys", ["account"], unique=False)
    op.create_index("ix_api_keys_user", "api_keys", ["user"], unique=False)
    op.create_table(
        "evaluation_rows",
        sa.Column("seq", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("run_id", sa.String(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("status", sa.String(), nullable=False),
        sa.Column("record", sa.Text(), nullable=False),
        sa.Column("graded", MOMENT, nullable=False),
        sa.ForeignKeyConstraint(
            ["run_id"],
            ["evaluation_runs.id"],
        ),
        sa.PrimaryKeyConstraint("seq"),
        sa.UniqueConstraint("run_id", "number"),
    )
    op.create_index("ix_evaluation_rows_run_id", "evaluation_rows", ["run_id"], unique=False)
    op.create_table(
        "object_pieces",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("account", sa.String(), nullable=False),
        sa.Column("object_seq", sa.Integer(), nullable=True),
        sa.Column("upload_id", sa.String(), nullable=True),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("md5", sa.String(), nullable=False),
        sa.Column("sha256", sa.String(), nullable=False),
        sa.Column("checksums", PLAIN, nullable=False),
        sa.Column("modified", MOMENT, nullable=False),
        sa.ForeignKeyConstraint(
            ["object_seq"],
            ["objects.seq"],
        ),
        sa.ForeignKeyConstraint(
            ["upload_id"],
            ["object_uploads.id"],
        ),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("upload_id", "number"),
    )
    op.create_index("object_pieces_of", "object_pieces", ["object_seq", "number"], unique=False)
