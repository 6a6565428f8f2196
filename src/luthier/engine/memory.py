"""How much memory is free. Nothing heavy is imported here: a server asks before it loads anything."""

from __future__ import annotations

from pathlib import Path


def available_memory() -> int:
    """Bytes this process may still take: the machine's, or its control group's if that is less."""
    import psutil

    free = int(psutil.virtual_memory().available)
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file():
        text = limit.read_text().strip()
        if text.isdigit():
            free = min(free, int(text) - int(used.read_text()))
    return free
