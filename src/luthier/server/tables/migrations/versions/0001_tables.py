"""Tables of the first release.

Until the first release, no data needs a migration, and this revision creates the declared tables.
The release replaces the revision by `alembic revision --autogenerate`.
"""

from alembic import op

from luthier.server.tables.schema import METADATA

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Create all tables."""
    METADATA.create_all(op.get_bind())
