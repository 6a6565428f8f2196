"""One process of a group that adds up numbers until the last of them fails, for tests.

``python group_member.py FAULT FOLDER`` in each process; what each of them hears is in ``FOLDER/RANK``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

from luthier.errors import DiskFull, LuthierError, RefusedInput
from luthier.models.process_group import ProcessGroup


class PluginError(RefusedInput):
    """An error that other processes do not know."""


def fail(fault: str) -> None:
    """What the last process does in its third exchange, or before it meets the others."""
    if fault in ("SIGKILL", "SIGSTOP"):
        os.kill(os.getpid(), getattr(signal, fault))
    if fault == "bug":
        raise KeyError("nothing of that name")
    if fault == "plugin":
        raise PluginError("nothing fits")
    if fault == "no space":
        raise OSError(28, "No space left on device", "/scratch/rows")
    raise DiskFull("the disk of /scratch is full")


def main(fault: str, folder: Path) -> None:
    """Meet the others, and write down the error that it comes to."""
    torch.set_num_threads(1)
    group = ProcessGroup.of_environment()
    (folder / f"ready-{group.rank}").touch()
    while len(list(folder.glob("ready-*"))) < group.size:  # one imports for longer than another
        time.sleep(0.02)
    try:
        with group.shared_errors():
            if fault == "early refusal" and group.rank == group.size - 1:
                fail(fault)
            group.agree()
            (folder / f"pid-{group.rank}").write_text(str(os.getpid()))
            for step in range(100):
                if step == 3 and group.rank == group.size - 1:
                    fail(fault)
                group.sum(1.0)
    except Exception as error:
        ranks = sorted(getattr(error, "ranks", ()))
        words = [type(error).__name__, str(error), ranks, isinstance(error, LuthierError)]
        (folder / str(group.rank)).write_text(json.dumps(words))
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
