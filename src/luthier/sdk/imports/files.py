"""The files that an import writes, and its report."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from luthier.files import new_file, write_bytes
from luthier.recipe import to_toml

MOST_BYTES = 64 * 2**20
"""Of one file that is read whole."""
REPORT = "IMPORT.md"


@dataclass(frozen=True)
class ImportedFile:
    """A file that an import wrote."""

    path: Path
    content: str
    """What it holds, in a few words."""
    command: str | None = None
    """A command to go on with."""


@dataclass(frozen=True)
class NotImported:
    """What could not be carried over."""

    where: str
    """The place in what was imported."""
    reason: str


@dataclass
class Import:
    """What came of an import."""

    source: Path
    folder: Path
    target: Path
    """Where files are written until the folder is whole."""
    files: list[ImportedFile] = field(default_factory=list)
    not_imported: list[NotImported] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    """What was carried over, but means something else here."""
    results: list[str] = field(default_factory=list)
    """Earlier results, in sentences."""

    def skip(self, where: str, reason: str) -> None:
        """Say once what is not carried over."""
        left = NotImported(where, reason)
        if left not in self.not_imported:
            self.not_imported.append(left)

    def remark(self, text: str) -> None:
        """Say something once."""
        if text not in self.remarks:
            self.remarks.append(text)

    def write_rows(
        self, name: str, rows: Iterable[Mapping[str, Any]], content: str, command: str | None = None
    ) -> None:
        """Write rows, one JSON object a line."""
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        count = f"{len(lines):,} row{'s' * (len(lines) != 1)}"
        self._write(name, "".join(lines), f"{count} {content}", command)

    def copy_rows(self, name: str, source: Path, content: str) -> None:
        """Copy a file of rows as it is."""
        path = self.target / name
        with source.open("rb") as given, new_file(path) as made:
            shutil.copyfileobj(given, made)
        self.files.append(ImportedFile(Path(name), content, f"luthier inspect {self.place(name)}"))

    def write_toml(
        self, name: str, fields: Mapping[str, Any], content: str, command: str = ""
    ) -> None:
        """Write graders or a recipe."""
        self._write(name, to_toml(fields), content, command or None)

    def place(self, name: str) -> str:
        """Where a file will stand, for commands."""
        return shlex.quote(str(self.folder / name))

    def write_report(self) -> None:
        """Write what was done as a page of Markdown."""
        self._write(REPORT, "\n".join(self.lines()) + "\n", "this report", None, listed=False)

    def lines(self) -> list[str]:
        """The report."""
        lines = [f"# What was imported from {self.source.name}", ""]
        for file in self.files:
            lines.append(f"- `{file.path}`: {file.content}")
        commands = [file.command for file in self.files if file.command]
        if commands:
            lines += ["", "## Commands", "", "```sh", *commands, "```"]
        for title, texts in (
            ("Earlier results", self.results),
            ("What means something else here", self.remarks),
            (
                "What was not imported",
                [f"{each.where}: {each.reason}" for each in self.not_imported],
            ),
        ):
            if texts:
                lines += ["", f"## {title}", "", *(f"- {text}" for text in texts)]
        return lines

    def plain(self) -> dict[str, Any]:
        """The same, ready for JSON."""
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


def file_name(text: str, taken: set[str], suffix: str) -> str:
    """A name for a file that people called ``text``; each only once."""
    stem = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:48].rstrip("-") or "unnamed"
    name, number = f"{stem}{suffix}", 2
    while name in taken:
        name, number = f"{stem}-{number}{suffix}", number + 1
    taken.add(name)
    return name
