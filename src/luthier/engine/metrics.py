"""What a run reports: a line of JSON for each step, a live view, and a loss curve at the end."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from luthier.files import disk_errors, write_bytes

LEAST_GAIN = 0.02
"""Share of the validation loss below which a run is said to have learned nothing."""


class Reporter:
    """Receives what a run has to say. This base says nothing; the command line draws it."""

    def stage(self, text: str) -> None:
        """A part of the work begins."""

    def chosen(self, defaults: Sequence[tuple[str, Any, str]]) -> None:
        """Settings chosen from the data and the model: name, value, reason."""

    def note(self, text: str) -> None:
        """Something worth knowing that is not an error."""

    def counted(self, done: int, total: int, what: str) -> None:
        """``done`` of ``total`` things called ``what`` are finished, in work that is no training."""

    def recorded(self, line: Mapping[str, Any], steps: int) -> None:
        """A line went to the metrics file; ``steps`` is the length of the run."""


class MetricsFile:
    """``metrics.jsonl``: one object a line, appended as the run goes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines = 0

    def append(self, values: Mapping[str, Any]) -> int:
        """Add one line; returns how many there are now."""
        with disk_errors(self.path.parent), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
        self.lines += 1
        return self.lines

    def cut(self, lines: int) -> None:
        """Keep the first ``lines`` lines: what came after the checkpoint will be written again."""
        text = self.path.read_bytes() if self.path.is_file() else b""
        write_bytes(self.path, b"".join(text.splitlines(keepends=True)[:lines]))
        self.lines = lines

    def read(self) -> list[dict[str, Any]]:
        """All complete lines."""
        if not self.path.is_file():
            return []
        # What follows the last line end was cut short by a kill, or is being written now.
        return [json.loads(line) for line in self.path.read_bytes().split(b"\n")[:-1]]


def learned_nothing(lines: Sequence[Mapping[str, Any]], rate: float) -> str | None:
    """What to say of a run whose validation loss hardly fell, by the lines of its metrics."""
    held = [line["loss"] for line in lines if line["event"] == "validation"]
    if not held or held[0] - min(held) >= LEAST_GAIN * abs(held[0]):
        return None
    return (
        f"next to nothing was learned: the validation loss was {held[0]:.4f} before the first step and "
        f"{min(held):.4f} at its best. Unless the model knew the data already, the rate is too high "
        f"for it, or far too low: try --learning-rate {rate / 4:.1e} (it was {rate:.1e}), or let "
        "`luthier search` find one"
    )


def draw_loss_curve(lines: Sequence[Mapping[str, Any]], folder: Path, title: str) -> None:
    """Write ``loss.svg`` and ``loss.png`` of a run's metrics into ``folder``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    train = [(line["step"], line["loss"]) for line in lines if line["event"] == "train"]
    held = [(line["step"], line["loss"]) for line in lines if line["event"] == "validation"]
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    if train:
        steps, losses = zip(*train, strict=True)
        axes.plot(steps, losses, color="#b8c4d6", linewidth=1, label="training, each step")
        axes.plot(steps, smooth(losses), color="#2f5d9b", linewidth=2, label="training, smoothed")
    if held:
        steps, losses = zip(*held, strict=True)
        axes.plot(steps, losses, "o-", color="#c8553d", linewidth=1.5, label="validation")
        best = min(held, key=lambda point: point[1])
        axes.annotate(
            f"best {best[1]:.3f}", best, xytext=(0, 8), textcoords="offset points", ha="center"
        )
    axes.set(xlabel="optimizer step", ylabel="loss (nats per learned token)", title=title)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    for kind in ("svg", "png"):
        picture = io.BytesIO()
        figure.savefig(picture, format=kind, dpi=130)
        write_bytes(folder / f"loss.{kind}", picture.getvalue())
    pyplot.close(figure)


def smooth(values: Sequence[float], weight: float = 0.8) -> list[float]:
    """Exponential moving average, corrected for its start."""
    smoothed: list[float] = []
    mean = 0.0
    for index, value in enumerate(values, start=1):
        mean = weight * mean + (1 - weight) * value
        smoothed.append(mean / (1 - weight**index))
    return smoothed
