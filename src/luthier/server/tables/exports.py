"""Exports: custom models written for other software, below an address of their account."""

from __future__ import annotations

from typing import TypedDict

from sqlalchemy import select
from sqlalchemy.orm import Mapped, Session

from luthier.server.tables.custom_models import CustomModel
from luthier.server.tables.database import Base, new_id, now
from luthier.server.tables.queue import next_turn
from luthier.server.tables.results import ResultWork


class ExportedFile(TypedDict):
    """File of an export."""

    name: str
    """Path below the address of the export."""
    bytes: int
    sha256: str


class ExportResult(TypedDict):
    """Result of a completed export."""

    address: str
    files: list[ExportedFile]
    bytes: int
    network: str
    """Type of the network in transformers."""
    compared: str | None
    """Difference between replies from the files and the model's replies; ``None`` if the weights are
    copied unchanged."""


class ModelExport(ResultWork, Base):
    """An export of a custom model."""

    __tablename__ = "model_exports"
    noun = "the export"
    memory_advice = "choose a different format, or a server with more memory."
    unknown_memory = 1 << 29
    prefix = "export-"

    model: Mapped[str]
    model_name: Mapped[str]
    stored_id: Mapped[str]
    format: Mapped[str]
    """``safetensors``, ``onnx`` or ``gguf``."""
    merged: Mapped[bool | None]
    """Whether the adapter is merged into the base; ``None`` for the format's default."""
    quantization: Mapped[str | None]
    output: Mapped[str]
    """Address of the export's parent folder."""


def create_export(
    session: Session,
    model: CustomModel,
    arn: str,
    output: str,
    format: str,
    merged: bool | None,
    quantization: str | None,
) -> ModelExport:
    """Queue an export of the ``Active`` model ``model`` with the ARN ``arn`` to ``output``."""
    assert model.stored_id is not None
    moment = now()
    made = ModelExport(
        id=new_id(),
        account=model.account,
        turn=next_turn(session, ModelExport, model.account),
        since=moment,
        created=moment,
        model=arn,
        model_name=model.name,
        stored_id=model.stored_id,
        format=format,
        merged=merged,
        quantization=quantization,
        output=output,
    )
    session.add(made)
    session.flush()
    return made


def is_exported(session: Session, arn: str) -> bool:
    """Return whether an unfinished export reads the model of this ARN."""
    found = select(ModelExport.seq).where(ModelExport.model == arn, ModelExport.is_unfinished())
    return session.scalar(found.limit(1)) is not None
