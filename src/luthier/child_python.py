"""Safe start of Python child processes, without imports from the working directory.

The working directory often contains downloaded data. Without the safe path, a file such as
``random.py`` would replace a module of the standard library in every child process.
"""

from __future__ import annotations

import os
import sys


def python_command(module: str, *arguments: str) -> list[str]:
    """Return the command that runs ``module`` with this interpreter and the safe path."""
    return [sys.executable, "-P", "-m", module, *arguments]


def use_safe_path() -> None:
    """Set the safe path for all children, including children of multiprocessing and libraries.

    Multiprocessing starts its processes with ``python -c``, which puts the working directory first.
    """
    os.environ["PYTHONSAFEPATH"] = "1"
