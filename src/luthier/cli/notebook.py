"""Use cases as Jupyter notebooks: a heading and a call for each command of the page."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import luthier
from luthier.cli.terminal.options import TUNING
from luthier.recipe import parse_setting

_STEPS = {
    "examples": "Write the rows",
    "convert": "Read the rows",
    "study": "Compare settings on the same rows",
    "tune": "Tune a model",
    "compare": "Compare with simpler methods on unseen rows",
    "evaluate": "Score on unseen rows",
    "predict": "Predict",
    "nearest": "Search",
    "generate": "Generate a reply",
    "sample": "Generate images",
}
"""Heading of a notebook's cell by command."""
_IMPORTS = "import sys\nfrom pathlib import Path\n\nimport luthier"
"""First cell. A shell has the PATH of Jupyter, often of another environment than the kernel's."""


def as_notebook(use: Mapping[str, Any]) -> dict[str, Any]:
    """Return a use case as a notebook of calls of the Python API."""
    result = f"Measured {use['date']}, {use['measure']}: {use['result']}."
    cells = [_cell("markdown", 0, f"# {use['title']}\n\n{result}\n\n{use['credit']}")]
    cells.append(_cell("code", len(cells), _IMPORTS))
    for command in use["commands"]:
        heading = f"## {_STEPS[_name(command)]}"
        cells.append(_cell("markdown", len(cells), heading))
        cells.append(_cell("code", len(cells), as_python(command)))
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return {
        "nbformat": 4,
        "nbformat_minor": 5,
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
        "cells": cells,
    }


def as_python(command: str) -> str:
    """Return the code of a cell for a ``luthier`` command: a call, if Python has the function."""
    from luthier.cli.app import COMMANDS

    name, (first, _, *words) = _name(command), shlex.split(command)
    # A call has no environment of its own, so a command with a variable stays a command.
    if name not in dir(luthier) or first != "luthier":
        return "!" + command.replace("luthier", "{sys.executable} -m luthier", 1)
    parameters = inspect.signature(COMMANDS[name].function).parameters
    given = COMMANDS[name].parse(words)
    settings = dict(parse_setting(text) for text in given.pop("set_", ()))
    parts = list[str]()
    for key in sorted(given, key=lambda key: [*parameters, key].index(key)):
        value = TUNING[key].convert(given[key]) if key in TUNING else given[key]
        shown = repr(str(value) if isinstance(value, Path) else value)
        is_first = (
            key in parameters and parameters[key].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        )
        parts.append(shown if is_first else f"{key}={shown}")
    parts += [f"{key.replace('.', '__')}={value!r}" for key, value in settings.items()]
    return f"luthier.{name}({', '.join(parts)})".replace("PosixPath(", "Path(")


def _name(command: str) -> str:
    """Return the name of a ``luthier`` command, which may follow variables of the environment."""
    words = command.split()
    return words[words.index("luthier") + 1]


def _cell(kind: str, number: int, text: str) -> dict[str, Any]:
    code: dict[str, Any] = {"execution_count": None, "outputs": []} if kind == "code" else {}
    return {"cell_type": kind, "id": f"cell-{number}", "metadata": {}, "source": text, **code}
