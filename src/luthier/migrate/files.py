"""The files that an import writes, and the report of the import."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from luthier.errors import RecipeError
from luthier.files import new_file, write_bytes
from luthier.recipe import to_toml

MAX_BYTES = 64 * 2**20
"""Maximum size of a file that is read as a whole, in bytes."""
REPORT = "IMPORT.md"


class NotConvertible(Exception):
    """The reason why a part cannot be imported."""


@dataclass(frozen=True)
class ImportedFile:
    """A file written by an import."""

    path: Path
    content: str
    """Short description of the content."""
    command: str | None = None
    """A command that uses the file."""


@dataclass(frozen=True)
class NotImported:
    """A part that cannot be imported."""

    where: str
    """Location in the imported configuration or account."""
    reason: str


@dataclass
class Import:
    """The result of an import."""

    source: Path
    folder: Path
    target: Path
    """Temporary folder of the files until the import is complete."""
    files: list[ImportedFile] = field(default_factory=list)
    not_imported: list[NotImported] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    """Parts that were imported with a different meaning."""
    _reported: set[tuple[str, str]] = field(default_factory=set)
    results: list[str] = field(default_factory=list)
    """Earlier results, as sentences."""

    def skip(self, where: str, reason: str) -> None:
        """Record a part that cannot be imported, once."""
        if (where, reason) not in self._reported:
            self._reported.add((where, reason))
            self.not_imported.append(NotImported(where, reason))

    def remark(self, text: str) -> None:
        """Record a remark, once."""
        if ("", text) not in self._reported:
            self._reported.add(("", text))
            self.remarks.append(text)

    def write_rows(
        self, name: str, rows: Iterable[Mapping[str, Any]], content: str, command: str | None = None
    ) -> None:
        """Write rows as JSON Lines."""
        number = 0
        with new_file(self.target / name) as file:
            for row in rows:
                file.write((json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode())
                number += 1
        count = f"{number:,} row{'s' * (number != 1)}"
        self.files.append(ImportedFile(Path(name), f"{count} {content}", command))

    def copy_rows(self, name: str, source: Path, content: str) -> None:
        """Copy a file of rows unchanged."""
        path = self.target / name
        with source.open("rb") as original, new_file(path) as copy:
            shutil.copyfileobj(original, copy)
        self.files.append(ImportedFile(Path(name), content, f"luthier inspect {self.place(name)}"))

    def write_toml(
        self, name: str, fields: Mapping[str, Any], content: str, command: str = ""
    ) -> None:
        """Write graders or a recipe."""
        self._write(name, to_toml(fields), content, command or None)

    def place(self, name: str) -> str:
        """Return the final path of a file, quoted for a shell."""
        return shlex.quote(str(self.folder / name))

    def write_report(self) -> None:
        """Write the report as Markdown."""
        self._write(REPORT, "\n".join(self.lines()) + "\n", "this report", None, listed=False)

    def lines(self) -> list[str]:
        """Return the lines of the report."""
        lines = [f"# Import of {self.source.name}", ""]
        for file in self.files:
            lines.append(f"- `{file.path}`: {file.content}")
        commands = [file.command for file in self.files if file.command]
        if commands:
            lines += ["", "## Commands", "", "```sh", *commands, "```"]
        for title, texts in (
            ("Earlier results", self.results),
            ("Differences", self.remarks),
            (
                "Not imported",
                [f"{each.where}: {each.reason}" for each in self.not_imported],
            ),
        ):
            if texts:
                lines += ["", f"## {title}", "", *(f"- {text}" for text in texts)]
        return lines

    def plain(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return {
            "folder": str(self.folder),
            "files": [
                {
                    "path": str(self.folder / each.path),
                    "content": each.content,
                    "command": each.command,
                }
                for each in self.files
            ],
            "results": self.results,
            "remarks": self.remarks,
            "not_imported": [
                {"where": each.where, "reason": each.reason} for each in self.not_imported
            ],
        }

    def _write(
        self, name: str, text: str, content: str, command: str | None, listed: bool = True
    ) -> None:
        path = self.target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, text.encode())
        if listed:
            self.files.append(ImportedFile(Path(name), content, command))


def file_name(text: str, used: set[str], suffix: str) -> str:
    """Return a file name for the title ``text`` that is not in ``used``, and add the name to
    ``used``."""
    stem = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:48].rstrip("-") or "unnamed"
    name, number = f"{stem}{suffix}", 2
    while name in used:
        name, number = f"{stem}-{number}{suffix}", number + 1
    used.add(name)
    return name


def read_text(path: Path) -> str:
    """Return the content of a text file.

    Raises:
        RecipeError: for a missing file, a file over the size limit, or a file that is not UTF-8.
    """
    try:
        if not path.is_file():
            raise RecipeError(f"{path} is not a file")
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise RecipeError(f"{path} is larger than {MAX_BYTES >> 20} MiB")
        return content.decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path} cannot be read: {error}") from error
