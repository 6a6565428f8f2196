"""luthier: turn a base model and your own data into a custom model you own."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Waiting OpenMP threads spin for milliseconds. Next to another busy process, a step took 55 s
# instead of 1 s; 0.1 ms costs nothing. torch reads the variable once, on import.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

if TYPE_CHECKING:
    from luthier.cli.advise import advise
    from luthier.cli.compare import compare
    from luthier.cli.data import clean, convert, inspect, split
    from luthier.cli.distil import distil, student
    from luthier.cli.estimate import estimate
    from luthier.cli.evaluate import evaluate, judge
    from luthier.cli.forgetting import forgetting
    from luthier.cli.imports import import_openai
    from luthier.cli.launch import launch
    from luthier.cli.model import Model, load
    from luthier.cli.models.certificate import certificate, verify
    from luthier.cli.models.export import export, push
    from luthier.cli.models.samples import samples
    from luthier.cli.pipeline import pipeline
    from luthier.cli.pretrain import pretrain
    from luthier.cli.study import study
    from luthier.cli.tune import tune
    from luthier.recipe import Recipe

__all__ = [
    "Model",
    "Recipe",
    "__version__",
    "advise",
    "certificate",
    "clean",
    "compare",
    "convert",
    "distil",
    "estimate",
    "evaluate",
    "export",
    "forgetting",
    "import_openai",
    "inspect",
    "judge",
    "launch",
    "load",
    "pipeline",
    "pretrain",
    "push",
    "samples",
    "split",
    "student",
    "study",
    "tune",
    "verify",
]

_HOMES = {
    name: f"luthier.{module}"
    for module, names in {
        "cli.advise": ["advise"],
        "cli.models.certificate": ["certificate", "verify"],
        "cli.compare": ["compare"],
        "cli.data": ["clean", "convert", "inspect", "split"],
        "cli.distil": ["distil", "student"],
        "cli.estimate": ["estimate"],
        "cli.evaluate": ["evaluate", "judge"],
        "cli.models.export": ["export", "push"],
        "cli.forgetting": ["forgetting"],
        "cli.imports": ["import_openai"],
        "cli.launch": ["launch"],
        "cli.model": ["Model", "load"],
        "cli.pipeline": ["pipeline"],
        "cli.pretrain": ["pretrain"],
        "cli.models.samples": ["samples"],
        "cli.study": ["study"],
        "cli.tune": ["tune"],
        "recipe": ["Recipe"],
    }.items()
    for name in names
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that ``import luthier`` is fast."""
    if name not in _HOMES:
        raise AttributeError(f"module 'luthier' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """Return the public names, also before the first use."""
    return sorted(__all__)
