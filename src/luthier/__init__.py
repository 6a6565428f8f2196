"""luthier: turn a base model and your own data into a custom model you own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from luthier.recipe import Recipe
    from luthier.sdk import (
        Model,
        advise,
        clean,
        convert,
        distil,
        estimate,
        evaluate,
        inspect,
        load,
        pretrain,
        split,
        student,
        tune,
    )

__all__ = [
    "Model",
    "Recipe",
    "__version__",
    "advise",
    "clean",
    "convert",
    "distil",
    "estimate",
    "evaluate",
    "inspect",
    "load",
    "pretrain",
    "split",
    "student",
    "tune",
]

_HOMES = {
    "Recipe": "luthier.recipe",
    "Model": "luthier.sdk",
    "advise": "luthier.sdk",
    "clean": "luthier.sdk",
    "convert": "luthier.sdk",
    "distil": "luthier.sdk",
    "estimate": "luthier.sdk",
    "evaluate": "luthier.sdk",
    "inspect": "luthier.sdk",
    "load": "luthier.sdk",
    "pretrain": "luthier.sdk",
    "split": "luthier.sdk",
    "student": "luthier.sdk",
    "tune": "luthier.sdk",
}


def __getattr__(name: str) -> Any:
    """Import public names when they are first used, so that ``import luthier`` stays instant."""
    if name not in _HOMES:
        raise AttributeError(f"module 'luthier' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """The public names, those that were not used yet included."""
    return sorted(__all__)
