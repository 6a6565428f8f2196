"""``luthier models samples``: text that a model generated during training with rewards or a teacher.

A rising reward means a better model, or a grader with a loophole. Signs of a loophole are the texts
with the highest rewards, a correlation of reward and length, and a steadily growing divergence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from luthier.cli.terminal.console import new_console
from luthier.errors import RecipeError
from luthier.formatting import printable

Line = dict[str, Any]
PARTS = 4
"""Number of consecutive parts of a run with a mean each."""
_TREND = {
    "reward": "reward",
    "completion_tokens": "tokens",
    "answer_tokens": "tokens",
    "answers_ended": "completed",
    "truncated": "truncated",
    "equal_groups": "equal groups",
    "kl": "kl",
}

_NUMBERS = {"reward": ".3f", "step": "d", "line": "d", "tokens": "d", "kl": ".2f"}


@dataclass(frozen=True)
class TrainingSamples:
    """Sampled texts of a run with rewards, and means over the run."""

    samples: list[Line]
    trend: list[Line]
    reward_length_correlation: float | None


def samples(
    run: str,
    *,
    count: Annotated[int, typer.Option(min=1)] = 20,
    last: Annotated[int, typer.Option(min=1)] = 20,
    worst_first: bool = False,
    full: bool = False,
) -> TrainingSamples:
    """Show text sampled during training.

    Args:
        run: Model id, or folder of the run.
        count: Number of texts.
        last: Number of last steps with these texts.
        worst_first: Sort by reward, lowest first.
        full: Print whole texts.

    Returns:
        The texts, the means of consecutive parts of the run, and the correlation of reward and length.

    Raises:
        RecipeError: for an unknown run, or a run without samples.
    """
    from luthier.engine.metrics import MetricsFile
    from luthier.engine.runs import METRICS, SAMPLES
    from luthier.files import luthier_home
    from luthier.library.folders import id_of, working_folders

    folder = next(iter(working_folders(run) if ":" in run else ()), Path(run))
    if not folder.is_dir():
        from luthier.library.suggestions import suggest_models

        runs = [id_of(each) for each in luthier_home().glob("runs/*/*/")]
        raise RecipeError(
            f"no run {run!r} exists. {suggest_models(run, sorted(runs))} Or name the folder of a run."
        )
    records = MetricsFile(folder / SAMPLES).read()
    if not records:
        raise RecipeError(
            f"{run} has no samples. Only grpo, ppo and on_policy_distillation store samples"
        )
    lines = [line for line in MetricsFile(folder / METRICS).read() if line["event"] == "train"]
    newest = records[-1]["step"]
    recent = [record for record in records if record["step"] > newest - last]
    key = "reward" if all("reward" in record for record in recent) else "step"
    recent.sort(key=lambda record: record[key], reverse=not worst_first)
    return TrainingSamples(recent[:count], trend_of(lines), length_correlation(recent))


def trend_of(lines: Sequence[Line]) -> list[Line]:
    """Return means over consecutive parts of a run."""
    import statistics

    size = max(1, -(-len(lines) // PARTS))
    parts = [lines[start : start + size] for start in range(0, len(lines), size)]
    return [
        {"steps": f"{part[0]['step']}-{part[-1]['step']}"}
        | {
            name: statistics.fmean(line[name] for line in part)
            for name in _TREND
            if all(name in line for line in part)
        }
        for part in parts
    ]


def length_correlation(records: Sequence[Line]) -> float | None:
    """Return the correlation of reward and length; ``None`` if reward or length is constant."""
    import statistics

    if not all("reward" in record for record in records):
        return None
    rewards, lengths = ([float(r[name]) for r in records] for name in ("reward", "tokens"))
    if len(set(rewards)) < 2 or len(set(lengths)) < 2:
        return None
    return statistics.correlation(rewards, lengths)


def show_samples(found: TrainingSamples, full: bool) -> None:
    """Print the texts and the means over the run."""
    from rich.table import Table
    from rich.text import Text

    records, trend = found.samples, found.trend
    correlation = found.reward_length_correlation

    out = new_console(highlight=False)
    table = Table(box=None, expand=True)
    numbers = [name for name in _NUMBERS if any(name in record for record in records)]
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("prompt", "completion"):
        table.add_column(name, no_wrap=not full, overflow="fold" if full else "ellipsis", ratio=1)
    for record in records:
        texts = [
            # Escaped first: escapes change the column width.
            printable(record[name] if full else " ".join(record[name].split()))
            for name in ("prompt", "completion")
        ]
        cells = ("" if record[n] is None else format(record[n], _NUMBERS[n]) for n in numbers)
        table.add_row(*cells, *map(Text, texts))
    out.print(table)
    names = [name for name in _TREND if all(name in part for part in trend)]
    course = Table("steps", *(_TREND[name] for name in names), box=None, title_justify="left")
    for part in trend:
        course.add_row(part["steps"], *(f"{part[name]:.3f}" for name in names))
    out.print()
    out.print(course)
    if correlation is not None:
        out.print(f"\nCorrelation of reward and length: {correlation:+.2f}")
