"""Studies: comparisons of settings by training, each with a report."""

from __future__ import annotations

from typing import Any, ClassVar

from sqlalchemy.orm import Mapped, mapped_column

from luthier.server.tables.database import Base, JSONText
from luthier.server.tables.measurements import ReportWork

STUDY = "study"


class Study(ReportWork, Base):
    """A study of an account."""

    __tablename__ = "studies"
    noun = "the study"
    plural = "studies"
    unknown_memory = 1 << 29
    prefix = "study-"
    kind: ClassVar[str] = STUDY

    recipe: Mapped[dict[str, Any]] = mapped_column(JSONText)
    """Settings of all trainings, with addresses as data."""
