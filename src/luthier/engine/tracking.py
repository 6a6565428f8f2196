"""Forwarding of a run's metrics to experiment trackers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from luthier.engine.metrics import Reporter
from luthier.errors import Interrupted
from luthier.trackers import TRACKERS, Status, TrackedRun, Tracker
from luthier.types import dotted_items


class TrackingReporter(Reporter):
    """A reporter with additional output to trackers.

    A failing tracker is dropped with one warning: training continues.
    """

    def __init__(self, reporter: Reporter, run: TrackedRun, names: Sequence[str]) -> None:
        self._reporter = reporter
        self.shows_replies = reporter.shows_replies
        self._trackers: dict[str, Tracker] = {}
        for name in names:
            with self._warn_of(name):
                self._trackers[name] = TRACKERS[name].open(run)

    @contextmanager
    def _warn_of(self, name: str) -> Iterator[None]:
        try:
            yield
        # Each tracker's library raises its own exceptions; training must survive all of them.
        except Exception as error:
            self._trackers.pop(name, None)
            reason = (str(error).splitlines() or [""])[0]
            self.note(
                f"warning: the tracker {name} failed and receives no more metrics: "
                f"{type(error).__name__}: {reason}"
            )

    def _track(self, act: Callable[[Tracker], None]) -> None:
        # A copy, because a tracker that fails is removed during the loop.
        for name, tracker in [*self._trackers.items()]:
            with self._warn_of(name):
                act(tracker)

    def end(self, status: Status) -> None:
        """Report to each tracker how the run ended."""
        self._track(lambda tracker: tracker.end(status))

    def receive(self, method: str, *arguments: Any) -> None:
        """Forward the call to the wrapped reporter."""
        getattr(self._reporter, method)(*arguments)

    def metrics(self, line: Mapping[str, Any], steps: int) -> None:
        """Forward the line, and log the numbers to each tracker."""
        super().metrics(line, steps)
        values = {
            f"{line['event']}/{name}": float(value)
            for name, value in line.items()
            if name != "step" and isinstance(value, int | float)
        }
        self._track(lambda tracker: tracker.log(int(line["step"]), values))


@contextmanager
def track(
    reporter: Reporter, names: Sequence[str], model_id: str, folder: Path, recipe: Mapping[str, Any]
) -> Iterator[Reporter]:
    """Yield a reporter with the trackers ``names`` until the block ends.

    Raises:
        RecipeError: if the library of a tracker is not installed.
    """
    if not names:
        yield reporter
        return
    for name in names:
        TRACKERS[name].check()
    tracking = TrackingReporter(
        reporter, TrackedRun(model_id, folder, dict(dotted_items(recipe))), names
    )
    status: Status = "failed"
    try:
        yield tracking
        status = "finished"
    except (Interrupted, KeyboardInterrupt):
        status = "interrupted"
        raise
    finally:
        tracking.end(status)
