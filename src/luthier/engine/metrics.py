"""What a run reports: a line of JSON for each step, a live view, and a loss curve at the end."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from luthier.encryption.files import open_line, place_of, seal_line
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

    def __init__(self, path: Path, texts: bool = False) -> None:
        """``texts`` says that there are texts in it: an encrypted store encrypts each line."""
        self.path, self.texts = path, texts
        self.lines = 0

    def append(self, values: Mapping[str, Any]) -> int:
        """Add one line; returns how many there are now."""
        with disk_errors(self.path.parent), self.path.open("a", encoding="utf-8") as file:
            line = json.dumps(values)
            if self.texts:
                line = seal_line(line, place_of(self.path, self.lines + 1))
            file.write(line + "\n")
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
        lines = self.path.read_bytes().split(b"\n")[:-1]
        return [
            open_line(line, place_of(self.path, number)) for number, line in enumerate(lines, 1)
        ]


def learned_nothing(lines: Sequence[Mapping[str, Any]], rate: float) -> str | None:
    """What to say of a run whose validation loss hardly fell, by the lines of its metrics."""
    held = [line["loss"] for line in lines if line["event"] == "validation"]
    if not held or held[0] - min(held) >= LEAST_GAIN * abs(held[0]):
        return None
    return (
        f"next to nothing was learned: the validation loss was {held[0]:.4f} before the first step and "
        f"{min(held):.4f} at its best. Unless the model knew the data already, the rate is too high "
        f"for it or far too low: try `training.learning_rate={rate / 4:.1e}` (it was {rate:.1e}), or "
        "let `luthier search` find one"
    )


def draw_curves(lines: Sequence[Mapping[str, Any]], folder: Path, title: str) -> list[str]:
    """Draw what a run's metrics say into ``folder``; the names of the pictures."""
    draw_loss_curve(lines, folder, title)
    names = ["loss"]
    if any("reward" in line for line in lines):
        draw_rewards(lines, folder, title)
        names.append("reward")
    return [f"{name}.{kind}" for name in names for kind in ("svg", "png")]


def draw_loss_curve(lines: Sequence[Mapping[str, Any]], folder: Path, title: str) -> None:
    """Write ``loss.svg`` and ``loss.png`` of a run's metrics into ``folder``."""
    figure, (axes,) = _figure(1)
    _draw(axes, lines, "loss")
    held = [line for line in lines if line["event"] == "validation" and "measure" not in line]
    if held:
        _draw_held(axes, held, "loss", min)
    axes.set(xlabel="optimizer step", ylabel="loss (nats per learned token)", title=title)
    axes.legend(frameon=False)
    _write(figure, folder / "loss")


def draw_rewards(lines: Sequence[Mapping[str, Any]], folder: Path, title: str) -> None:
    """Write ``reward.svg`` and ``reward.png``: reward, length and divergence of the completions.

    A reward that rises while texts grow, or leave the reference far behind, may be a grader's mistake.
    """
    train = [line for line in lines if line["event"] == "train"]
    shown = {
        "reward": "mean reward",
        "completion_tokens": "tokens of a completion",
        "kl": "divergence (nats per token)",
    }
    names = [name for name in shown if any(name in line for line in train)]
    figure, panels = _figure(len(names))
    for axes, name in zip(panels, names, strict=True):
        _draw(axes, lines, name)
        axes.set(ylabel=shown[name])
    held = [line for line in lines if line["event"] == "validation" and "reward" in line]
    if held:
        _draw_held(panels[0], held, "reward", max)
    panels[0].set(title=title)
    panels[0].legend(frameon=False)
    panels[-1].set(xlabel="step")
    _write(figure, folder / "reward")


def _figure(panels: int) -> tuple[Any, list[Any]]:
    """A figure with panels one below the other, which share their steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (8, 4.5 if panels == 1 else 2.6 * panels)
    figure, axes = pyplot.subplots(panels, 1, figsize=size, layout="constrained", sharex=True)
    found = [axes] if panels == 1 else list(axes)
    for each in found:
        each.grid(alpha=0.25)
    return figure, found


def _draw(axes: Any, lines: Sequence[Mapping[str, Any]], name: str) -> None:
    """A value of the training steps, as it is and smoothed."""
    train = [
        (line["step"], line[name]) for line in lines if line["event"] == "train" and name in line
    ]
    if train:
        steps, values = zip(*train, strict=True)
        axes.plot(steps, values, color="#b8c4d6", linewidth=1, label="training, each step")
        axes.plot(steps, smooth(values), color="#2f5d9b", linewidth=2, label="training, smoothed")


def _draw_held(
    axes: Any, lines: Sequence[Mapping[str, Any]], name: str, choose: Callable[..., Any]
) -> None:
    """What was measured on the validation rows, and the best of it."""
    held = [(line["step"], line[name]) for line in lines]
    steps, values = zip(*held, strict=True)
    axes.plot(steps, values, "o-", color="#c8553d", linewidth=1.5, label="validation")
    best = choose(held, key=lambda point: point[1])
    axes.annotate(
        f"best {best[1]:.3f}", best, xytext=(0, 8), textcoords="offset points", ha="center"
    )


def _write(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    for kind in ("svg", "png"):
        picture = io.BytesIO()
        figure.savefig(picture, format=kind, dpi=130)
        write_bytes(path.with_suffix(f".{kind}"), picture.getvalue())
    pyplot.close(figure)


def smooth(values: Sequence[float], weight: float = 0.8) -> list[float]:
    """Exponential moving average, corrected for its start."""
    smoothed: list[float] = []
    mean = 0.0
    for index, value in enumerate(values, start=1):
        mean = weight * mean + (1 - weight) * value
        smoothed.append(mean / (1 - weight**index))
    return smoothed
