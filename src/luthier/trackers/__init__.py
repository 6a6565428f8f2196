"""Experiment trackers: external services that receive settings and metrics of runs.

A tracker is a class in a file and an entry in the table :data:`TRACKERS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from luthier.errors import RecipeError
from luthier.plugins import PluginTable

Status = Literal["finished", "failed", "interrupted"]


@dataclass(frozen=True)
class TrackedRun:
    """A new or resumed run."""

    model_id: str
    """Id of the custom model, used as the run's name."""
    folder: Path
    """Folder of the run, which exists until the run or the model is removed."""
    settings: Mapping[str, Any]
    """Recipe settings by dotted name."""

    def stored_id(self, tracker: str, create: Callable[[], str]) -> str:
        """Return the run's id in ``tracker``; a resumed run keeps the id.

        ``create`` returns a new id.
        """
        path = self.folder / f"{tracker}.run"
        if not path.is_file():
            path.write_text(create(), encoding="utf-8")
        return path.read_text(encoding="utf-8")


class Tracker(ABC):
    """Connection to a tracker for a run. Each method may raise any error."""

    @abstractmethod
    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record ``values``, with names such as ``train/loss``, at an optimizer step."""

    @abstractmethod
    def end(self, status: Status) -> None:
        """Record the final status of the run, and close the connection."""


@dataclass(frozen=True)
class TrackerEntry:
    """A tracker by name."""

    id: str
    open: Callable[[TrackedRun], Tracker]
    package: str = ""
    """Import name of the library, if the tracker needs a library."""

    def check(self) -> None:
        """Raise :class:`RecipeError` if the library is not installed."""
        if self.package and find_spec(self.package) is None:
            raise RecipeError(
                f"`training.track`: {self.id} needs the package {self.package}. "
                f"Run pip install 'luthier[{self.id}]'",
                setting="training.track",
                value=self.id,
            )


def _built_in(name: str, class_name: str) -> Callable[[TrackedRun], Tracker]:
    """Return a function that imports a tracker's module on first use: the libraries are optional."""

    def open_tracker(run: TrackedRun) -> Tracker:
        tracker: Tracker = getattr(import_module(f"luthier.trackers.{name}"), class_name)(run)
        return tracker

    return open_tracker


TRACKERS: PluginTable[TrackerEntry] = PluginTable(
    "trackers",
    TrackerEntry,
    {
        "mlflow": TrackerEntry("mlflow", _built_in("mlflow", "MlflowTracker"), "mlflow"),
        "tensorboard": TrackerEntry(
            "tensorboard", _built_in("tensorboard", "TensorBoardTracker"), "tensorboard"
        ),
        "wandb": TrackerEntry("wandb", _built_in("wandb", "WandbTracker"), "wandb"),
    },
)
