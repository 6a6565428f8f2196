"""TensorBoard event files in the run's folder ``tensorboard``."""

from __future__ import annotations

from collections.abc import Mapping

from torch.utils.tensorboard import SummaryWriter

from luthier.trackers import Status, TrackedRun, Tracker


class TensorBoardTracker(Tracker):
    """Writer of event files, with the run's settings as a table."""

    def __init__(self, run: TrackedRun) -> None:
        self._writer = SummaryWriter(str(run.folder / "tensorboard"))
        rows = "\n".join(f"| {name} | {value} |" for name, value in run.settings.items())
        self._writer.add_text("recipe", f"| setting | value |\n| --- | --- |\n{rows}")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See :class:`Tracker`."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def end(self, status: Status) -> None:
        """See :class:`Tracker`."""
        self._writer.add_text("status", status)
        self._writer.close()
