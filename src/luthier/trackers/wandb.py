"""Weights & Biases runs, offline unless ``WANDB_MODE`` sets another mode.

No data leaves the machine unless the user sets ``WANDB_MODE=online`` or calls ``wandb sync``.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from typing import Any, cast

import wandb

from luthier.trackers import Status, TrackedRun, Tracker


class WandbTracker(Tracker):
    """A run of Weights & Biases, with files in the run's folder ``wandb``."""

    def __init__(self, run: TrackedRun) -> None:
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "luthier"),
            name=run.model_id,
            id=run.stored_id("wandb", lambda: secrets.token_hex(8)),
            resume="allow",
            dir=os.environ.get("WANDB_DIR", str(run.folder)),
            config=dict(run.settings),
            mode=cast("Any", os.environ.get("WANDB_MODE", "offline")),
            # Do not record terminal output and hardware statistics.
            settings=wandb.Settings(silent=True, console="off", x_disable_stats=True),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See :class:`Tracker`."""
        self._run.log(dict(values), step=step)

    def end(self, status: Status) -> None:
        """See :class:`Tracker`."""
        self._run.summary["status"] = status
        self._run.finish(exit_code=0 if status == "finished" else 1)
