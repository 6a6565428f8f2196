"""Training and validation rows of a stored model: overlap of other rows with them, and repetitions."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path

from luthier.data.files.sources import files_of
from luthier.data.rows import RowReader
from luthier.engine.dataset import checker_for
from luthier.engine.runs import HELD_OUT
from luthier.errors import location_text
from luthier.files import folder_size, read_json, sha256_of
from luthier.gate.row_keys import match_questions, question_of, repeated_rows
from luthier.library.folders import working_folders
from luthier.library.models import StoredModel
from luthier.types import Row

MAX_COMPARED_BYTES = 64_000_000
"""Maximum size of the training files to search: a few seconds."""


def row_remarks(stored: StoredModel, data: str | Path, rows: Sequence[Row]) -> list[str]:
    """Return the reasons why scores of ``rows`` say less than their standard errors do."""
    remarks = overlap_remarks(stored, data, rows)
    if repeats := repeated_rows(rows):
        remarks.append(
            f"{len(repeats):,} of {len(rows):,} rows repeat other rows word for word, so the intervals "
            "are too narrow"
        )
    return remarks


def overlap_remarks(stored: StoredModel, data: str | Path, rows: Sequence[Row]) -> list[str]:
    """Return a remark if the model was trained on some of ``rows``."""
    trained = _training_files(stored)
    if trained and os.path.exists(data) and sha256_of(Path(data)) in trained.values():
        return [
            f"{stored.id} was trained on these rows, so the scores measure memory. Evaluate the model "
            "on other rows"
        ]
    if seen := _trained_rows(stored, trained, rows):
        number, location = next(iter(seen.items()))
        place = location_text(rows[number].file, rows[number].line)
        return [
            f"{len(seen):,} of {len(rows):,} rows have the input of a training row of {stored.id} "
            f"({place} and {location}, for example), so their scores "
            "measure memory. `luthier split` keeps such rows apart"
        ]
    return []


def training_sources(stored: StoredModel) -> tuple[list[str], list[str]]:
    """Return the unchanged sources of a model's training rows, and the missing or changed sources."""
    data = (stored.manifest.recipe or {}).get("data", {})
    known = stored.manifest.data.sha256 if stored.manifest.data else {}
    sources = [data.get("train"), *(each["train"] for each in data.get("mix", ()))]
    unchanged, others = list[str](), list[str]()
    for source in filter(None, sources):
        files = files_of(source) if os.path.exists(source) else []
        same = files and all(_is_unchanged(path, known) for path in files)
        (unchanged if same else others).append(source)
    return unchanged, others


def held_out_rows(stored: StoredModel, sources: Sequence[str]) -> int:
    """Return the number of rows of ``sources`` that the model did not learn."""
    held_out = stored.manifest.data.held_out if stored.manifest.data else {}
    files = {str(path) for source in sources for path in files_of(source)}
    return sum(len(lines) for file, lines in held_out.items() if file in files)


def validation_rows(stored: StoredModel) -> tuple[list[Row], list[str | Path]]:
    """Return the validation rows of a model's run, and their files. Changed files are skipped."""
    record = stored.manifest.data
    if record is None:
        return [], []
    data = (stored.manifest.recipe or {}).get("data", {})
    given = data.get("validation") or []
    lines_of: dict[str, list[int] | None] = {**record.held_out}
    lines_of |= dict.fromkeys([given] if isinstance(given, str) else given)
    checker = checker_for(stored.objective)
    rows, files = list[Row](), list[str | Path]()
    for path, lines in lines_of.items():
        if not os.path.isfile(path) or not _is_unchanged(path, record.sha256):
            continue
        known = None if lines is None else {*lines}
        reader = RowReader(path, data.get("columns"), checker, accepts_own_keys=True)
        rows += (row for row in reader if known is None or row.line in known)
        files.append(path)
    return rows, files


def _is_unchanged(path: str | Path, sha256: Mapping[str, str]) -> bool:
    return sha256_of(Path(path)) == sha256.get(str(path))


def _training_files(stored: StoredModel) -> dict[str, str]:
    if stored.manifest.data is None:
        return {}
    data = (stored.manifest.recipe or {}).get("data", {})
    held_out = set[str]()
    for each in (data.get("validation"), data.get("test")):
        held_out.update([each] if isinstance(each, str) else each or ())
    return {p: digest for p, digest in stored.manifest.data.sha256.items() if p not in held_out}


def _trained_rows(
    stored: StoredModel, trained: Mapping[str, str], rows: Sequence[Row]
) -> dict[int, str]:
    """Return the numbers of ``rows`` with the question of a training row, with the row's location.

    Missing or changed files, files beyond :data:`MAX_COMPARED_BYTES` in total, and held-out lines
    are skipped.
    """
    if not trained or not any(map(question_of, rows)):
        return {}
    held_out = [stored.manifest.data.held_out] if stored.manifest.data else []
    for folder in working_folders(stored.id)[:1]:
        if (folder / HELD_OUT).is_file():  # also has the lines of a test split
            held_out += read_json(folder / HELD_OUT).values()
    columns = (stored.manifest.recipe or {}).get("data", {}).get("columns")
    checker = checker_for(stored.objective)

    def rows_of(path: str) -> Iterator[Row]:
        skipped = {line for files in held_out for line in files.get(path, ())}
        rows = RowReader(path, columns, checker, accepts_own_keys=True)
        return (row for row in rows if row.line not in skipped)

    usable, remaining = list[str](), MAX_COMPARED_BYTES
    for path in filter(os.path.exists, trained):
        size = folder_size(Path(path)) if os.path.isdir(path) else os.path.getsize(path)
        if size <= remaining:
            remaining -= size
            usable.append(path)
    same = (path for path in usable if _is_unchanged(path, trained))
    return match_questions(rows, chain.from_iterable(map(rows_of, same)))
