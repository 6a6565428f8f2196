"""Registration of objectives, commands, readers and other parts by other packages.

A package declares its parts as entry points, one group per table:

    [project.entry-points."luthier.objectives"]
    focal = "luthier_focal:Focal"

The name is the name in recipes: the default of the class's ``method``, or the ``id`` of a base
model or backend. A package is imported on the first iteration of the table or lookup of its name.
Iteration skips a broken package with a warning, so other commands keep working. A lookup raises an
error with the reason and the package.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from typing import Any, Generic, TypeVar, cast

from luthier.errors import RecipeError

log = logging.getLogger(__name__)

Component = TypeVar("Component")

BUNDLED = ("luthier.media",)
"""Packages of luthier with ``ENTRY_POINTS``, registered like plugins. The core works without them."""


def bundled_extensions(group: str) -> dict[str, EntryPoint]:
    """Return the entry points of the packages in :data:`BUNDLED` for ``group``, by name."""
    group = f"luthier.{group}"
    return {
        name: EntryPoint(name, value, group)
        for package in BUNDLED
        if find_spec(package)
        for name, value in import_module(package).ENTRY_POINTS.get(group, {}).items()
    }


@cache
def extensions(group: str) -> dict[str, EntryPoint]:
    """Return the entry points for ``group`` of bundled, then of other packages, by name."""
    return {**_points(f"luthier.{group}"), **bundled_extensions(group)}


def load_extension(point: EntryPoint) -> Any:
    """Import the part that an entry point names.

    Raises:
        RecipeError: if the package cannot be imported.
    """
    try:
        return point.load()
    except Exception as error:  # a third-party package may raise anything on import
        raise _broken(point.name, _package(point), f"{type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class Plugin:
    """One entry point of an installed package."""

    group: str
    name: str
    package: str
    """Name and version of the distribution."""
    problem: str = ""
    """Reason why the plugin is broken; empty if usable."""


class PluginTable(Mapping[str, Component], Generic[Component]):
    """Parts of one kind by name: built-in, then bundled, then plugins.

    A broken plugin is ``in`` the table and raises on lookup; iteration skips the plugin.
    """

    def __init__(self, group: str, kind: type, built_in: Mapping[str, Component]) -> None:
        """``kind`` is the base class or the class of the parts."""
        self.group, self.kind, self.built_in = f"luthier.{group}", kind, dict(built_in)
        self._loaded: dict[str, Component | Plugin] = {}

    @cached_property
    def _bundled(self) -> dict[str, EntryPoint]:
        return bundled_extensions(self.group.removeprefix("luthier."))

    @cached_property
    def _points(self) -> dict[str, EntryPoint]:
        return _points(self.group)

    def plugins(self) -> list[Plugin]:
        """Return all plugins of the table, each loaded to detect problems."""
        return [self._plugin(name) for name in self._points]

    def package_of(self, name: str) -> str | None:
        """Return name and version of the plugin's package; ``None`` for luthier's own parts."""
        return None if self._is_own(name) else _package(self._points[name])

    def _is_own(self, name: object) -> bool:
        return name in self.built_in or name in self._bundled

    def __getitem__(self, name: str) -> Component:
        """Return the part with this name.

        Raises:
            KeyError: if no part has the name.
            RecipeError: if the plugin is broken.
        """
        if name in self.built_in:
            return self.built_in[name]
        if name in self._bundled:
            return cast(Component, self._bundled[name].load())
        part = self._load(name)
        if isinstance(part, Plugin):
            raise _broken(name, part.package, part.problem)
        return part

    def __contains__(self, name: object) -> bool:
        return self._is_own(name) or name in self._points

    def __iter__(self) -> Iterator[str]:
        yield from self.built_in
        yield from self._bundled
        for name in self._points:
            if not self._is_own(name) and not isinstance(self._load(name), Plugin):
                yield name

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _plugin(self, name: str) -> Plugin:
        if self._is_own(name):
            problem = "the name is that of a built-in one; it needs another"
            return Plugin(self.group, name, _package(self._points[name]), problem)
        part = self._load(name)
        if isinstance(part, Plugin):
            return part
        return Plugin(self.group, name, _package(self._points[name]))

    def _load(self, name: str) -> Component | Plugin:
        """Return the part of an entry point, or a :class:`Plugin` with the problem."""
        if name not in self._loaded:
            point = self._points[name]
            try:
                part = point.load()
                self._check(name, part)
            # A third-party package may raise anything on import and must not break the others.
            except Exception as error:
                problem = f"{type(error).__name__}: {error}"
                part = Plugin(self.group, name, _package(point), problem)
                log.warning("%s of %s is left out: %s", name, part.package, problem)
            self._loaded[name] = part
        return self._loaded[name]

    def _check(self, name: str, part: Any) -> None:
        if not (isinstance(part, type) and issubclass(part, self.kind)) and not isinstance(
            part, self.kind
        ):
            raise TypeError(f"{part!r} is no {self.kind.__module__}.{self.kind.__name__}")
        own = _own_name(part)
        # Stored models and recipes refer to the part by its own name.
        if own != name:
            raise ValueError(f"the entry point is called {name!r}, and what it names {own!r}")


def _points(group: str) -> dict[str, EntryPoint]:
    """Return the entry points of installed packages, by name."""
    # Sorted, because the order of entry points depends on sys.path.
    points = sorted(entry_points(group=group), key=lambda each: (each.name, _package(each)))
    return {each.name: each for each in reversed(points)}


def _broken(name: str, package: str, problem: str) -> RecipeError:
    return RecipeError(
        f"{name} comes from the installed package {package}, which cannot be used: {problem}",
        rule="plugin.broken",
        value=package,
    )


def _package(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else point.value


def _own_name(part: Any) -> object:
    """Return the part's own name, from the attribute of its kind."""
    if "method" in getattr(part, "model_fields", {}):
        return part.model_fields["method"].default
    return next((getattr(part, key) for key in ("id", "name", "shape") if hasattr(part, key)), None)
