"""What stands in a store."""

from __future__ import annotations

from pathlib import Path


def files_in(home: Path) -> list[str]:
    """Paths below a store, which need not be there yet."""
    if not home.exists():
        return []
    return sorted(p.relative_to(home).as_posix() for p in home.rglob("*") if p.is_file())
