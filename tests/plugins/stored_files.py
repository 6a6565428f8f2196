"""Files of a library."""

from __future__ import annotations

from pathlib import Path


def files_in(home: Path) -> list[str]:
    """Return the paths of files in a store, without its caches; the store need not exist."""
    paths = [path.relative_to(home) for path in home.rglob("*") if path.is_file()]
    return sorted(path.as_posix() for path in paths if path.parts[0] not in ("cache", "probes"))
