"""``luthier samples``: what a model wrote while it learned from rewards, or from a teacher.

Rewards that rise can mean a better model or a grader that was talked round. The texts with the highest
rewards tell; so does a reward that goes with length, and a divergence that grows without an end.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from luthier.cli.console import new_console, print_json
from luthier.cli.options import Json
from luthier.errors import RecipeError
from luthier.escaping import printable

Line = dict[str, Any]
PARTS = 4
"""Parts of a run whose means are shown one below the other."""
_TREND = {
    "reward": "reward",
    "completion_tokens": "tokens",
    "answer_tokens": "tokens",
    "answers_ended": "ended",
    "truncated": "cut short",
    "equal_groups": "equal groups",
    "kl": "kl",
}

_NUMBERS = {"reward": ".3f", "step": "d", "line": "d", "tokens": "d", "kl": ".2f"}


def samples(
    run: Annotated[str, typer.Argument(help="Custom model or its run: base:name, or a folder.")],
    count: Annotated[int, typer.Option(min=1, help="Texts to show.")] = 20,
    last: Annotated[int, typer.Option(min=1, help="Only of so many last steps.")] = 20,
    worst_first: Annotated[bool, typer.Option("--worst-first", help="The worst first.")] = False,
    full: Annotated[
        bool, typer.Option("--full", help="Whole texts, not their beginnings.")
    ] = False,
    json_: Json = False,
) -> None:
    """Show text sampled during training."""
    from luthier.engine.metrics import MetricsFile
    from luthier.engine.runs import METRICS, SAMPLES
    from luthier.files import luthier_home
    from luthier.library.folders import id_of, working_folders

    folder = next(iter(working_folders(run) if ":" in run else ()), Path(run))
    if not folder.is_dir():
        from luthier.library.models import suggest_models

        runs = [id_of(each) for each in luthier_home().glob("runs/*/*/")]
        raise RecipeError(
            f"there is no run {run!r}. {suggest_models(run, sorted(runs))} "
            "The folder of a run works too."
        )
    records = MetricsFile(folder / SAMPLES).read()
    if not records:
        raise RecipeError(
            f"{run} has no samples: they are kept by objectives that learn from what the model writes "
            "(grpo, ppo, on_policy_distillation)"
        )
    lines = [line for line in MetricsFile(folder / METRICS).read() if line["event"] == "train"]
    newest = records[-1]["step"]
    recent = [record for record in records if record["step"] > newest - last]
    # Where nothing was rewarded, the newest come first.
    rewarded = all("reward" in record for record in recent)
    recent.sort(
        key=lambda record: record["reward" if rewarded else "step"], reverse=not worst_first
    )
    trend, correlation = trend_of(lines), length_correlation(recent)
    if json_:
        report = {"samples": recent[:count], "trend": trend}
        print_json(report | {"reward_length_correlation": correlation})
        return
    _print(recent[:count], trend, correlation, full)


def trend_of(lines: Sequence[Line]) -> list[Line]:
    """Means over consecutive parts of a run."""
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
    """Correlation of reward and length; none where one of them is always the same."""
    import statistics

    if not all("reward" in record for record in records):
        return None
    rewards, lengths = ([float(r[name]) for r in records] for name in ("reward", "tokens"))
    if len(set(rewards)) < 2 or len(set(lengths)) < 2:
        return None
    return statistics.correlation(rewards, lengths)


def _print(
    records: Sequence[Line], trend: Sequence[Line], correlation: float | None, full: bool
) -> None:
    from rich.table import Table
    from rich.text import Text

    out = new_console(highlight=False)
    table = Table(box=None, expand=True)
    numbers = [name for name in _NUMBERS if any(name in record for record in records)]
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("prompt", "completion"):
        table.add_column(name, no_wrap=not full, overflow="fold" if full else "ellipsis", ratio=1)
    for record in records:
        texts = [
            # Escaped before the width of a column is found.
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
        out.print(
            f"\nReward and length of these texts go together with a correlation of {correlation:+.2f}."
        )
