"""Add rules for automatic drafts of retrainings, and the share of answers with two raters."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    """Add the columns."""
    plain = sa.JSON().with_variant(JSONB(), "postgresql")
    op.add_column("endpoints", sa.Column("retraining", plain, nullable=True))
    op.add_column("capture_settings", sa.Column("second_rater", sa.Double(), nullable=True))
