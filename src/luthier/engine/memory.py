"""How much memory there is. Nothing heavy is imported here: a server asks before it loads anything."""

from __future__ import annotations

from pathlib import Path

GROUP = Path("/sys/fs/cgroup")
"""What the kernel tells of this process's control group, as a container's (cgroup v2)."""


def total_memory() -> int:
    """Bytes of the machine, or of its control group if that has less."""
    import psutil

    total = int(psutil.virtual_memory().total)
    limit = _limit()
    return total if limit is None else min(total, limit)


def available_memory() -> int:
    """Bytes this process may still take: the machine's, or its control group's if that is less."""
    import psutil

    free = int(psutil.virtual_memory().available)
    limit = _limit()
    return free if limit is None else max(0, min(free, limit - _used()))


def _limit() -> int | None:
    try:
        text = (GROUP / "memory.max").read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _used() -> int:
    """Bytes in use that the kernel cannot take back at once: files that were read are given up."""
    used = int((GROUP / "memory.current").read_text())
    for line in (GROUP / "memory.stat").read_text().splitlines():
        name, _, value = line.partition(" ")
        if name == "inactive_file":
            used -= int(value)
    return used
