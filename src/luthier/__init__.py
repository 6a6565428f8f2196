"""luthier: turn a base model and your own data into a custom model you own."""

from __future__ import annotations

import os
import warnings
from typing import Any

__version__ = "0.1.0"

# Waiting OpenMP threads spin for milliseconds. Next to another busy process, a step took 55 s
# instead of 1 s; 0.1 ms costs nothing. torch reads the variable once, on import.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

# A notebook without ipywidgets would begin with a warning about progress bars that nobody draws.
warnings.filterwarnings("ignore", "IProgress not found")

_HOMES = {
    name: f"luthier.{module}"
    for module, names in {
        "cli.advise": ["advise"],
        "cli.models.app": ["list_models", "remove_model"],
        "cli.models.certificate": ["certificate", "verify"],
        "cli.compare": ["compare"],
        "cli.data": ["clean", "convert", "inspect", "split"],
        "cli.distil": ["distil", "student"],
        "cli.documents": ["ask", "index_documents", "search_documents"],
        "cli.estimate": ["estimate"],
        "cli.evaluate": ["evaluate", "judge"],
        "cli.models.export": ["export", "push"],
        "cli.forgetting": ["forgetting"],
        "cli.imports": ["import_openai"],
        "cli.launch": ["launch"],
        "cli.model": ["Model", "load"],
        "cli.pipeline": ["pipeline"],
        "cli.inference.predict": ["predict"],
        "cli.pretrain": ["pretrain"],
        "cli.models.samples": ["samples"],
        "cli.safety": ["safety"],
        "cli.study": ["study"],
        "cli.tune": ["tune"],
        "errors": [
            "DataError",
            "Diverged",
            "DoesNotFit",
            "DownloadError",
            "GradingFailed",
            "Interrupted",
            "LuthierError",
            "OutOfMemory",
            "RecipeError",
            "RefusedInput",
            "RunConflict",
            "UnknownModel",
        ],
        "recipe": ["Recipe"],
    }.items()
    for name in names
}

__all__ = sorted(["__version__", *_HOMES])  # noqa: PLE0605 - type checkers read __init__.pyi


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that ``import luthier`` is fast."""
    if name not in _HOMES:
        raise AttributeError(f"module 'luthier' has no attribute {name!r}")
    from importlib import import_module

    found = getattr(import_module(_HOMES[name]), name)
    if not isinstance(found, type) and name != "load":
        found = import_module("luthier.cli.python").public(found)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    """Return the public names, also before the first use."""
    return sorted(__all__)
