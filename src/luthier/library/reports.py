"""Evaluation reports of a stored model: ``reports/KIND-HASH.json`` in the model's folder.

Evaluations, comparisons and other measurements store results here for the model's certificate. The
file name contains the content's hash: reports are added, never changed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from luthier import __version__
from luthier.errors import CorruptFile, RecipeError
from luthier.files import json_text, luthier_home, read_json, sha256_of, write_bytes
from luthier.formatting import finite_or_none
from luthier.library.models import StoredModel
from luthier.models.manifest import REPORTS, Record, created_now

REMEDY = "restore the file, or remove it and measure again"


class ModelReport(Record):
    """One evaluation result of a model."""

    kind: str = Field(pattern=r"^[a-z][a-z0-9-]{0,40}$")
    """Type of measurement: ``evaluation``, ``comparison``, …"""
    created: str
    """ISO 8601, UTC."""
    luthier: str
    """Version of luthier."""
    data: dict[str, str]
    """SHA-256 of the evaluation files by path."""
    result: dict[str, Any]
    """Result as the command prints it with ``--json``."""


@dataclass(frozen=True)
class StoredReport:
    """A report and its file."""

    name: str
    """Name of the file, relative to the model's folder."""
    sha256: str
    report: ModelReport


def check_attachable(model: StoredModel) -> None:
    """Reject a model that cannot store reports.

    Raises:
        RecipeError: for a model outside the library.
        CorruptFile: for a changed report.
    """
    if not model.folder.is_relative_to(luthier_home()):
        raise RecipeError(
            f"{model.id} is not in the library, so reports cannot be attached. Write the "
            "result to a file."
        )
    reports_of(model)  # existing reports are part of the next certificate


def write_report(
    model: StoredModel, kind: str, data: Mapping[str, str], result: Mapping[str, Any]
) -> Path:
    """Store ``result``, measured for ``model`` on files with the hashes ``data``.

    Raises:
        RecipeError: see :func:`check_attachable`.
    """
    check_attachable(model)
    report = ModelReport(
        kind=kind,
        created=created_now(),
        luthier=__version__,
        data=dict(data),
        result=finite_or_none(dict(result)),
    )
    content = json_text(report.model_dump()).encode("utf-8", "replace")
    path = model.folder / REPORTS / f"{kind}-{hashlib.sha256(content).hexdigest()[:16]}.json"
    write_bytes(path, content)
    return path


def hashes_of_data(*sources: str | Path) -> dict[str, str]:
    """Return the SHA-256 of data files and folders by path; without missing files."""
    return {str(each): sha256_of(Path(each)) for each in sources if Path(each).exists()}


def reports_of(model: StoredModel) -> list[StoredReport]:
    """Return all reports of ``model``, oldest first.

    Raises:
        CorruptFile: for an invalid or changed report.
    """
    found = []
    for path in sorted((model.folder / REPORTS).glob("*.json")):
        try:
            report = ModelReport.model_validate(read_json(path))
        except ValidationError as error:
            raise CorruptFile(f"{path} is not a valid report: {REMEDY}") from error
        except CorruptFile as error:
            raise CorruptFile(f"{error}: {REMEDY}") from error
        digest = sha256_of(path)
        if path.stem != f"{report.kind}-{digest[:16]}":
            raise CorruptFile(
                f"{path} has changed (SHA-256 differs): {REMEDY}",
                rule="report.changed",
            )
        found.append(StoredReport(f"{REPORTS}/{path.name}", digest, report))
    return sorted(found, key=lambda each: (each.report.created, each.name))
