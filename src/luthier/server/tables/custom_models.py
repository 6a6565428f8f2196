"""Custom models as the service knows them: whose they are, their names, where they came from."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from luthier.server.tables.arns import Arns
from luthier.server.tables.database import Base

RESERVED, CREATING, ACTIVE, FAILED = "Reserved", "Creating", "Active", "Failed"
"""``Reserved`` keeps a name for a job that has not ended; clients never see it. Only models from
outside are ``Creating`` or ``Failed``."""
IMPORTED = "imported"
"""In the ARN of a model from outside, in the place of its foundation model."""


NAME, LONGEST_NAME = r"([0-9a-zA-Z][_-]?){1,63}", 63
"""What a custom model may be called, and in how many characters: the rule of Bedrock."""


class CustomModel(Base):
    """One custom model. Once deleted, or its job failed or stopped, it has no row: the name is free."""

    __tablename__ = "custom_models"
    __table_args__ = (UniqueConstraint("account", "name"),)

    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(unique=True)
    """Twelve letters and digits: the end of its ARN."""
    account: Mapped[str] = mapped_column(index=True)
    name: Mapped[str]
    foundation: Mapped[str]
    """Of its ARN: ``provider.name``, or ``imported``."""
    root: Mapped[str]
    """``provider.name`` of the foundation model at the bottom. A whole network from outside has one of
    its own, that nothing else answers to: what is made from it has the same."""
    base_model: Mapped[str]
    """ARN of what it was trained from; empty for a whole network from outside."""
    stored_id: Mapped[str | None]
    """Id under which ``luthier.library.models.find`` opens it; none before its files are there."""
    job_id: Mapped[str | None] = mapped_column(index=True)
    """The customization job that made it."""
    openai_id: Mapped[str | None] = mapped_column(index=True)
    """``ft:model:organization:suffix:id``."""
    status: Mapped[str] = mapped_column(default=RESERVED)
    failure: Mapped[str | None]
    details: Mapped[dict[str, Any]] = mapped_column(default=dict)
    """Of an imported model: ``request``, the members to show again; ``trusted``, whether an
    administrator imported the model; ``kind``, ``causal_lm`` or ``encoder``, which models made from
    the model have, too."""
    stored_bytes: Mapped[int | None] = mapped_column(BigInteger)
    """Of its own files, once they are there."""
    created: Mapped[datetime]

    def arn(self, arns: Arns) -> str:
        """Its ARN on the server that ``arns`` are of."""
        return arns.custom_model(self.account, self.foundation, self.id)

    @property
    def bottom(self) -> str:
        """``provider.name`` at the bottom as ARNs name it: also where that is not one of ours."""
        return self.root or f"luthier.{IMPORTED}"
