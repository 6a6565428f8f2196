"""Use cases with sample rows and measured results; written by ``benchmarks/use_cases.py``."""

from __future__ import annotations

import json
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


_STEPS = {
    "examples": "Write the rows",
    "tune": "Tune a model",
    "compare": "Compare with simpler methods on unseen rows",
    "evaluate": "Score on unseen rows",
    "predict": "Predict",
    "generate": "Generate a reply",
}
"""Heading of a notebook's cell by command."""


def as_notebook(use: dict[str, Any]) -> dict[str, Any]:
    """Return a use case as a Jupyter notebook: a cell for each command."""
    result = f"Measured {use['date']}, {use['measure']}: {use['result']}."
    cells = [_cell("markdown", 0, f"# {use['title']}\n\n{result}\n\n{use['credit']}")]
    for command in use["commands"]:
        heading = f"## {_STEPS[command.split()[1]]}"
        cells.append(_cell("markdown", len(cells), heading))
        cells.append(_cell("code", len(cells), f"!{command}"))
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return {
        "nbformat": 4,
        "nbformat_minor": 5,
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
        "cells": cells,
    }


def _cell(kind: str, number: int, text: str) -> dict[str, Any]:
    code: dict[str, Any] = {"execution_count": None, "outputs": []} if kind == "code" else {}
    return {"cell_type": kind, "id": f"cell-{number}", "metadata": {}, "source": text, **code}
