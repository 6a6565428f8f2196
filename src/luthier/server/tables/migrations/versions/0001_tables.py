"""Tables of the first release.

Before the first release there is nothing to migrate, so that this revision creates the tables that the
code declares. The release replaces it by `alembic revision --autogenerate` of these tables.
"""

from alembic import op

from luthier.server.tables.schema import METADATA

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Create all tables."""
    METADATA.create_all(op.get_bind())
