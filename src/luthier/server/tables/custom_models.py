"""Custom models of accounts: owner, name and origin."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from luthier.server.tables.arns import Arns
from luthier.server.tables.database import Base

RESERVED, CREATING, ACTIVE, FAILED = "Reserved", "Creating", "Active", "Failed"
"""Statuses of a custom model.

``Reserved`` reserves a name for an unfinished job and is invisible to clients. Only imported models
are ``Creating`` or ``Failed``.
"""
IMPORTED = "imported"
"""Replacement for the foundation model in the ARN of an imported model."""


NAME, LONGEST_NAME = r"([0-9a-zA-Z][_-]?){1,63}", 63
"""Pattern and maximum length of a custom model's name, as on Bedrock."""


class CustomModel(Base):
    """Custom model. A deleted model, or a model of a failed or stopped job, has no row."""

    __tablename__ = "custom_models"
    __table_args__ = (UniqueConstraint("account", "name"),)

    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(unique=True)
    """Twelve letters and digits, the last part of the ARN."""
    account: Mapped[str] = mapped_column(index=True)
    name: Mapped[str]
    foundation: Mapped[str]
    """Foundation model in the ARN: ``provider.name``, or ``imported``."""
    root: Mapped[str]
    """``provider.name`` of the foundation model.

    An imported whole network has its own unique root, which descendants inherit.
    """
    base_model: Mapped[str]
    """ARN of the parent model; empty for an imported whole network."""
    stored_id: Mapped[str | None]
    """Id for :func:`luthier.library.models.find`; ``None`` before the files exist."""
    job_id: Mapped[str | None] = mapped_column(index=True)
    """Customization job of the model."""
    openai_id: Mapped[str | None] = mapped_column(index=True)
    """``ft:model:organization:suffix:id``."""
    status: Mapped[str] = mapped_column(default=RESERVED)
    failure: Mapped[str | None]
    details: Mapped[dict[str, Any]] = mapped_column(default=dict)
    """Details of an imported model.

    ``request`` contains members that the API returns, ``trusted`` marks an import by an
    administrator, ``kind`` is ``causal_lm`` or ``encoder``. Descendants inherit ``kind``.
    """
    stored_bytes: Mapped[int | None] = mapped_column(BigInteger)
    """Size of the model's own files in bytes."""
    created: Mapped[datetime]

    def arn(self, arns: Arns) -> str:
        """Return the ARN of the model."""
        return arns.custom_model(self.account, self.foundation, self.id)

    @property
    def bottom(self) -> str:
        """``provider.name`` of the foundation model in ARNs, or a placeholder for a foreign root."""
        return self.root or f"luthier.{IMPORTED}"
