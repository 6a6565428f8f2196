"""Use cases with sample rows and measured results; written by ``benchmarks/use_cases.py``."""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

from luthier.errors import RecipeError

INDEX = Path(__file__).with_name("index.json")


def use_cases() -> list[dict[str, Any]]:
    """Return all use cases with their commands, scores and files."""
    found: list[dict[str, Any]] = json.loads(INDEX.read_text())
    return found


def use_case(name: str) -> dict[str, Any]:
    """Return a use case.

    Raises:
        RecipeError: if no use case has this name.
    """
    uses = {use["name"]: use for use in use_cases()}
    if name not in uses:
        raise RecipeError(f'unknown use case "{name}". Use cases: {", ".join(uses)}')
    return uses[name]


def files_of(use: dict[str, Any]) -> dict[str, Path]:
    """Return the sample files of a use case by their name in the commands."""
    package = INDEX.parent.parent
    return {path: package / source for source, path in use["files"].items()}


def contents(source: Path) -> bytes:
    """Return the bytes of a sample file; large files of the package are compressed (``.xz``)."""
    stored = source.read_bytes()
    return lzma.decompress(stored) if source.suffix == ".xz" else stored
