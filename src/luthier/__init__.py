"""luthier: turn a base model and your own data into a custom model you own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from luthier.recipe import Recipe
    from luthier.sdk import Model, clean, distil, evaluate, inspect, load, pretrain, student, tune

__all__ = [
    "Model",
    "Recipe",
    "__version__",
    "clean",
    "distil",
    "evaluate",
    "inspect",
    "load",
    "pretrain",
    "student",
    "tune",
]

_HOMES = {
    "Recipe": "luthier.recipe",
    "Model": "luthier.sdk",
    "clean": "luthier.sdk",
    "distil": "luthier.sdk",
    "evaluate": "luthier.sdk",
    "inspect": "luthier.sdk",
    "load": "luthier.sdk",
    "pretrain": "luthier.sdk",
    "student": "luthier.sdk",
    "tune": "luthier.sdk",
}


def __getattr__(name: str) -> Any:
    """Import public names when they are first used, so that ``import luthier`` stays instant."""
    if name not in _HOMES:
        raise AttributeError(f"module 'luthier' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
