"""Metrics of a run: the metrics file, the reporter interface, and plots of the curves."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, TypedDict

from luthier.evaluation.significance import CHANCE, LESS_IS_BETTER, RowScores
from luthier.files import disk_errors, write_bytes
from luthier.pages import svg_address

SCORES: Mapping[str, str] = {
    "accuracy": "accuracy",
    "agreement": "agreement with the teacher",
    "cosine": "cosine with the teacher",
    "mean_absolute_error": "mean absolute error",
    "entity_f1": "entity F1",
    "span_f1": "F1 of the answer's tokens",
    "exact_match": "exact match",
    "cer": "character error rate",
    "psnr": "PSNR in dB",
}
"""Display names of additional scores of objectives."""
SHARES = SCORES.keys() - {"cosine", "mean_absolute_error", "psnr"}
"""Scores displayed in percent."""
OPTIMIZER = "optimizer.svg"
"""File with the curves of learning rates and gradient norms."""
DISTANCES: Mapping[str, str] = {"frechet_distance": "Fréchet distance"}
"""Display names of distances (lower is better)."""
FEW_ROWS = 30
"""Number of held-out rows below which row-level measurements are rough."""
STUDENT_T = (
    12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14,
    2.13, 2.12, 2.11, 2.10, 2.09, 2.09, 2.08, 2.07, 2.07, 2.06, 2.06, 2.06, 2.05, 2.05,
)  # fmt: skip
"""Two-sided 95 % quantiles of Student's t for 2, 3, … rows (Student 1908)."""
FALLEN = 0.2
"""Fall of the loss, as a share, if an untrained head has learned."""
HOLLOW = 0.95
"""Share of the chance-level loss from which a loss carries no information."""
_PARTS: Mapping[str, str] = {
    "reconstruction": "reconstruction (nats)",
    "kl": "KL divergence (nats)",
    "generator_loss": "loss of the generator",
    "discriminator_loss": "loss of the discriminator",
}
"""Display names of the parts of a loss: of a VAE, and of both players of a GAN."""
_REWARDS: Mapping[str, str] = {
    "reward": "mean reward",
    "completion_tokens": "tokens of a completion",
    "kl": "divergence (nats per token)",
}


def cost_of(measured: Mapping[str, Any], measure: str) -> float:
    """Return a cost to minimize: the loss (minus the reward), an error rate, or 1 minus a score.

    An error rate costs at most 1: at 1, nothing is right, and a higher rate is no worse.
    """
    if measure in ("loss", "reward"):
        return float(measured["loss"])
    value = float(measured[measure])
    return min(1.0, value) if measure in LESS_IS_BETTER else 1 - value


def deciding_measure(lines: Sequence[Mapping[str, Any]], measure: str) -> str:
    """Return the measure for decisions: the loss, if every measured error rate is 100 % or more."""
    unread = measure in LESS_IS_BETTER and all(cost_of(line, measure) == 1 for line in lines)
    return "loss" if unread else measure


def best_measurement(lines: Sequence[Mapping[str, Any]], measure: str) -> Mapping[str, Any]:
    """Return the measurement whose weights are stored, from the measurements of a run in order.

    1. Leave out hollow losses. Leave out the measurement of an untrained head, if a later loss is
       lower by a fifth or more.
    2. The best measurement has the lowest cost.
    3. Of all measurements within chance of the best, return the one with the lowest loss.
    """
    measure, first = deciding_measure(lines, measure), lines[0]
    able = [x for x in lines if x is first or measure != "loss" or not is_hollow(x, first)]
    lowest = min(line["loss"] for line in able)
    if first.get("untrained_head") and lowest <= (1 - FALLEN) * first["loss"]:
        able.remove(first)
    best = min(able, key=lambda line: (cost_of(line, measure), line["loss"]))
    return min((x for x in able if is_within_chance(x, best, measure)), key=itemgetter("loss"))


def is_within_chance(line: Mapping[str, Any], best: Mapping[str, Any], measure: str) -> bool:
    """Return true if ``line`` is at most by chance worse than ``best``.

    A score may be lower by one standard error. A loss of few rows may be higher by Student's 95 %
    interval of the difference; a loss of many rows may not be higher.
    """
    if measure in SCORES:
        error = best.get(f"{measure}_error", 0.0)
    else:
        few = 1 < _rows_noted(line, "loss") < FEW_ROWS
        error = chance_between(best, line, "loss") if few else 0.0
    return bool(cost_of(line, measure) <= cost_of(best, measure) + error)


def _rows_noted(line: Mapping[str, Any], measure: str) -> int:
    return len(line.get("rows", {}).get(measure, {}).get("parts", ()))


def chance_between(one: Mapping[str, Any], other: Mapping[str, Any], measure: str) -> float:
    """Return the chance difference between two measurements; 0 for means over many tokens.

    If both lines store row-level values, the differing rows determine the result.
    """
    count = _rows_noted(one, measure)
    if count and count == _rows_noted(other, measure):
        first, second = (RowScores.read(line["rows"][measure]) for line in (one, other))
        chance = CHANCE * first.difference_error(second)
        if measure == "loss" and 1 < count < FEW_ROWS:
            # The spread of few rows is uncertain and biased low: Student's t and n / (n - 1).
            chance *= STUDENT_T[count - 2] / CHANCE * math.sqrt(count / (count - 1))
        return chance
    error = f"{measure}_error"
    return CHANCE * math.hypot(*(line.get(error, 0.0) for line in (one, other)))


def is_hollow(line: Mapping[str, Any], first: Mapping[str, Any]) -> bool:
    """Return true if a lower loss carries no information.

    True for the loss of a model that distinguishes no rows, and for an accuracy clearly below the
    accuracy before training.
    """
    # Equal embeddings have the loss ln N. A run fell to this loss while the recall fell from 0.875
    # to 0.115 (docs/log/defaults.md).
    if line["loss"] > HOLLOW * line.get("chance_loss", math.inf):
        return True
    fallen = first.get("accuracy", 0.0) - line.get("accuracy", 0.0)
    return (
        fallen > 0
        and "accuracy" in line.get("rows", {})
        and fallen > chance_between(first, line, "accuracy")
    )


def without_rows(line: Mapping[str, Any]) -> dict[str, Any]:
    """Return a measurement without row-level values."""
    return {name: value for name, value in line.items() if name != "rows"}


def additional_metrics(measure: str) -> dict[str, str]:
    """Return the display names of the metrics shown in addition to ``measure``."""
    loss = {"loss": "loss"} if measure in SCORES else {}
    scores = {name: text for name, text in SCORES.items() if name != measure}
    return loss | scores | dict(DISTANCES)


class ShownReply(TypedDict):
    """Reply to a held-out row during training."""

    prompt: str
    """The last turn of the prompt."""
    wanted: str
    reply: str


class Reporter:
    """Receiver of a run's messages and metrics. The base class ignores everything; the CLI draws.

    Every method passes its call to :meth:`receive` unless overridden.
    """

    shows_replies: bool = False
    """True if :meth:`replies` is used: replies take about a second per measurement."""

    def stage(self, text: str) -> None:
        """Report the start of a part of the work."""
        self.receive("stage", text)

    def settings(self, defaults: Sequence[tuple[str, Any, str]]) -> None:
        """Report default settings: name, value, reason."""
        self.receive("settings", defaults)

    def note(self, text: str) -> None:
        """Report a note or a warning."""
        self.receive("note", text)

    def nothing_to_resume(self, model_id: str) -> None:
        """Report that the run to resume does not exist and starts now."""
        self.receive("nothing_to_resume", model_id)

    def progress(self, done: int, total: int, what: str) -> None:
        """Report ``done`` of ``total`` outside training; ``what`` names the unit."""
        self.receive("progress", done, total, what)

    def metrics(self, line: Mapping[str, Any], steps: int) -> None:
        """Report a new line of the metrics file; ``steps`` is the length of the run."""
        self.receive("metrics", line, steps)

    def replies(self, step: int, replies: Sequence[ShownReply]) -> None:
        """Report replies to held-out rows after the measurement of ``step``."""
        self.receive("replies", step, replies)

    def receive(self, method: str, *arguments: Any) -> None:
        """Handle the call of a method that the class does not override."""


class MetricsFile:
    """``metrics.jsonl``: one JSON object per line, appended during the run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines = 0

    def append(self, values: Mapping[str, Any]) -> int:
        """Append a line and return the number of lines."""
        with disk_errors(self.path.parent), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
        self.lines += 1
        return self.lines

    def truncate(self, lines: int) -> None:
        """Keep the first ``lines`` lines: a resumed run writes the later lines again."""
        text = self.path.read_bytes() if self.path.is_file() else b""
        write_bytes(self.path, b"".join(text.splitlines(keepends=True)[:lines]))
        self.lines = lines

    def read(self, rows: bool = False) -> list[dict[str, Any]]:
        """Return all complete lines; with row-level values if ``rows`` is set."""
        if not self.path.is_file():
            return []
        # An incomplete last line was cut by a kill or is being written.
        lines = self.path.read_bytes().split(b"\n")[:-1]
        values = map(json.loads, lines)
        return [line if rows else without_rows(line) for line in values]


def draw_curves(lines: Sequence[Mapping[str, Any]], folder: Path, title: str) -> list[str]:
    """Plot the metrics of a run into ``folder`` and return the file names.

    ``loss.svg`` and ``loss.png`` show the training and validation loss, with each score of
    :data:`SCORES` below. For rewards, ``reward.svg`` and ``reward.png`` show reward, length and
    divergence of the completions: a reward that rises while completions grow or leave the reference
    may be a grader's mistake. ``optimizer.svg`` shows learning rates, gradient norms and the share
    of clipped steps.
    """
    has_rewards = any("reward" in line for line in lines)
    beside = ({} if has_rewards else dict(_PARTS)) | {**SCORES, **DISTANCES}
    beside = {name: label for name, label in beside.items() if any(name in x for x in lines)}
    pictures = {"loss": {"loss": "loss", **beside}}
    if has_rewards:
        shown = {name: text for name, text in _REWARDS.items() if any(name in x for x in lines)}
        pictures["reward"] = shown
    for name, panels in pictures.items():
        path = folder / name
        figure = _draw_picture(lines, title, panels)
        save_figure(figure, path.with_suffix(".svg"), path.with_suffix(".png"))
    files = [f"{name}.{kind}" for name in pictures for kind in ("svg", "png")]
    if figure := _draw_optimizer(lines, title):
        save_figure(figure, folder / OPTIMIZER)
        files.append(OPTIMIZER)
    return files


def clipped_share(lines: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the share of steps with a clipped gradient; ``None`` without clipping."""
    clipped = [line["gradient_clipped"] for line in lines if "gradient_clipped" in line]
    return math.fsum(clipped) / len(clipped) if clipped else None


def curve_pictures(lines: Sequence[Mapping[str, Any]], title: str) -> list[tuple[str, str]]:
    """Return the addresses of the curves for light and for dark pages.

    The first curve shows the reward or loss, and the measure that decides; the second, the learning
    rates and the gradient norms.
    """
    main = "reward" if any("reward" in line for line in lines) else "loss"
    measure = next((line["measure"] for line in lines if "measure" in line), main)
    shown = {main: main} | ({measure: SCORES.get(measure, measure)} if measure != main else {})
    themes = []
    for colours in THEMES.values():
        addresses = []
        for figure in (_draw_picture(lines, title, shown), _draw_optimizer(lines, title)):
            if figure is None:
                continue
            colour_figure(figure, colours)
            addresses.append(svg_address(_picture(figure, "svg")))
        themes.append(addresses)
    light, dark = themes
    return [*zip(light, dark, strict=True)]


THEMES = {
    "": {
        "text": "#222222", "grid": "#d0d0d0", "point": "#2f5d9b", "front": "#c8553d",
        "right": "#2e7d4f", "page": "#ffffff",
    },
    "-dark": {
        "text": "#e6e6e6", "grid": "#4a4a4a", "point": "#8db4e8", "front": "#f0937d",
        "right": "#7fcf9f", "page": "#16181d",
    },
}  # fmt: skip
"""Colours by the suffix of a file. The background is transparent."""


def colour_figure(figure: Any, colours: Mapping[str, str]) -> None:
    """Apply the colours of text and lines for light or for dark pages."""
    figure.patch.set_alpha(0)
    for axes in figure.axes:
        axes.patch.set_alpha(0)
        axes.tick_params(colors=colours["text"], which="both")
        texts = [axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts]
        legend = axes.get_legend()
        for text in [*texts, *(legend.get_texts() if legend else ())]:
            text.set_color(colours["text"])
            text.set_bbox(None)
        axes.grid(color=colours["grid"])
        for spine in axes.spines.values():
            spine.set_color(colours["grid"])


def _draw_picture(lines: Sequence[Mapping[str, Any]], title: str, shown: Mapping[str, str]) -> Any:
    """Plot one panel per entry of ``shown``, with training, validation and the kept step."""
    figure, panels = new_figure(len(shown))
    held = [line for line in lines if line["event"] == "validation"]
    best = best_measurement(held, held[0].get("measure", "loss")) if held else None
    refits = [line for line in lines if line["event"] == "refit"]
    for axes, (name, label) in zip(panels, shown.items(), strict=True):
        _draw_train(axes, lines, name)
        # With rewards, the measured loss is minus the reward and does not belong to the loss curve.
        points = [x for x in held if name in x and not (name == "loss" and "reward" in x)]
        _draw_validation(axes, points, name, best)
        for refit in refits:
            label_of_refit = f"refit on all {refit['row_count']:,} rows"
            axes.axvline(refit["step"], color="#555555", linestyle="--", label=label_of_refit)
        axes.set(ylabel=label)
    panels[0].set(title=title)
    if panels[0].get_legend_handles_labels()[0]:  # a fitted model has no steps
        panels[0].legend(frameon=False)
    panels[-1].set(xlabel="optimizer step")
    panels[-1].xaxis.get_major_locator().set_params(integer=True)
    return figure


def _draw_optimizer(lines: Sequence[Mapping[str, Any]], title: str) -> Any | None:
    """Plot learning rates by group of layers, gradient norms, and the share of clipped steps."""
    train = [line for line in lines if line["event"] == "train" and "learning_rate" in line]
    if not train:
        return None
    shown = {"gradient_norm": "gradient norm", "gradient_clipped": "share of clipped steps"}
    shown = {name: label for name, label in shown.items() if name in train[0]}
    figure, panels = new_figure(1 + len(shown))
    steps = [line["step"] for line in train]
    groups = [*train[0].get("rates", ())]
    for place, group in enumerate(groups):
        shade = 0.25 + 0.75 * place / max(1, len(groups) - 1)
        rates = [line.get("rates", {}).get(group, math.nan) for line in train]
        panels[0].plot(steps, rates, color="#2f5d9b", alpha=shade, label=group)
    if groups:
        panels[0].legend(frameon=False, fontsize="x-small", ncols=1 + len(groups) // 5)
    else:
        panels[0].plot(steps, [line["learning_rate"] for line in train], color="#2f5d9b")
    panels[0].set(ylabel="learning rate", title=title)
    for axes, (name, label) in zip(panels[1:], shown.items(), strict=True):
        _draw_train(axes, train, name)
        axes.set(ylabel=label)
        if name == "gradient_clipped":
            axes.set(ylim=(-0.05, 1.05))
    panels[-1].set(xlabel="optimizer step")
    panels[-1].xaxis.get_major_locator().set_params(integer=True)
    return figure


def new_figure(panels: int = 1) -> tuple[Any, list[Any]]:
    """Return a matplotlib figure with vertically stacked panels and a shared horizontal axis."""
    # Without pyplot, the backend of a user's notebook stays unchanged.
    from matplotlib.figure import Figure

    size = (8, 4.5 if panels == 1 else 2.6 * panels)
    figure = Figure(figsize=size, layout="constrained")
    panel_list = [*figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]]
    for each in panel_list:
        each.grid(alpha=0.25)
    return figure, panel_list


def _draw_train(axes: Any, lines: Sequence[Mapping[str, Any]], name: str) -> None:
    train = [
        (line["step"], line[name]) for line in lines if line["event"] == "train" and name in line
    ]
    if train:
        steps, values = zip(*train, strict=True)
        axes.plot(steps, values, color="#b8c4d6", linewidth=1, label="training, each step")
        axes.plot(steps, smooth(values), color="#2f5d9b", linewidth=2, label="training, smoothed")


def _draw_validation(
    axes: Any, points: Sequence[Mapping[str, Any]], name: str, kept: Mapping[str, Any] | None
) -> None:
    """Plot the validation measurements, with a mark at the kept weights."""
    if not points or kept is None:
        return
    steps, values = [line["step"] for line in points], [line[name] for line in points]
    axes.plot(steps, values, "o-", color="#c8553d", linewidth=1.5, label="validation")
    axes.axvline(kept["step"], color="#c8553d", linewidth=1, linestyle=":")
    axes.margins(y=0.15)
    right = kept["step"] > steps[-1] / 2
    axes.annotate(
        f"kept {kept[name]:.3f}",
        (kept["step"], kept[name]),
        xytext=(-4 if right else 4, 8),
        textcoords="offset points",
        ha="right" if right else "left",
        bbox={"boxstyle": "round,pad=0.1", "color": "white", "alpha": 0.8},
    )


def save_figure(figure: Any, *paths: Path) -> None:
    """Write the figure to each path, in the format of the extension."""
    for path in paths:
        write_bytes(path, _picture(figure, path.suffix[1:]))


def _picture(figure: Any, kind: str) -> bytes:
    """Return the figure as a file. The same figure always gives the same bytes."""
    import matplotlib

    picture = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else {}
    with matplotlib.rc_context({"svg.hashsalt": "luthier"}):
        figure.savefig(picture, format=kind, dpi=130, metadata=metadata)
    return picture.getvalue()


def smooth(values: Sequence[float], weight: float = 0.8) -> list[float]:
    """Return the exponential moving average, corrected for the start."""
    smoothed: list[float] = []
    mean = 0.0
    for index, value in enumerate(values, start=1):
        mean = weight * mean + (1 - weight) * value
        # The mean starts at 0, so the first values are too small by 1 - w^n, as in Adam.
        smoothed.append(mean / (1 - weight**index))
    return smoothed
