"""A small file system in memory that can be full or read-only. Only root can mount it."""

from __future__ import annotations

import subprocess
from pathlib import Path


class Disk:
    """A file system that can be full or read-only."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.filler = folder, folder / "filler"

    def mount(self, *options: str) -> bool:
        command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(self.folder)]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    def unmount(self) -> None:
        subprocess.run(["umount", "-l", str(self.folder)], check=True)

    def fill(self) -> None:
        with self.filler.open("wb", buffering=0) as file:
            for size in (1 << 20, 4096):
                try:
                    while True:
                        file.write(b"\0" * size)
                except OSError:
                    pass

    def free(self) -> None:
        self.filler.unlink(missing_ok=True)

    def lock(self, read_only: bool) -> None:
        """Set the mode for files opened later; open files keep theirs."""
        place = str(self.folder)
        if not read_only:
            subprocess.run(["umount", "-l", place], check=True)
            return
        for options in (["--bind", place, place], ["-o", "remount,bind,ro", place]):
            subprocess.run(["mount", *options], check=True)
