"""Files of the OpenAI API, as rows."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import BigInteger
from sqlalchemy.orm import Mapped, mapped_column

from luthier.server.tables.database import Base


class UploadedFile(Base):
    """File of the OpenAI API."""

    __tablename__ = "uploaded_files"

    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(unique=True)
    """``file-`` and random letters and digits; also the key of the object."""
    account: Mapped[str] = mapped_column(index=True)
    name: Mapped[str]
    """Label from the client, never a path."""
    purpose: Mapped[str]
    size: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str]
    created: Mapped[datetime]
    expires: Mapped[datetime | None]
    deleted: Mapped[datetime | None]
