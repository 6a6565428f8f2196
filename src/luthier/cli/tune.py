"""``luthier tune``."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from luthier.cli.terminal.console import heavy_imports, new_console
from luthier.cli.terminal.options import AtLeastOne, DataSource, TuningFields, tuning_recipe

if TYPE_CHECKING:
    from luthier.engine.metrics import Reporter
    from luthier.engine.runs import Result
    from luthier.evaluation.baselines import Comparison

Limit = Annotated[float | None, typer.Option(min=0)]


def tune(
    data: DataSource,
    *,
    resume: bool = False,
    processes: AtLeastOne = 1,
    max_minutes: Limit = None,
    max_cost: Limit = None,
    prices: Path | None = None,
    check_forgetting: bool = False,
    accept_forgetting: bool = False,
    reporter: Reporter | None = None,
    **fields: TuningFields,
) -> Result:
    """Tune a model on your data.

    Args:
        data: Data file, folder, documents, s3:// or recipe (.toml).
        resume: Resume an interrupted run.
        processes: Processes of this machine that share each step.
        max_minutes: Reject a run that is estimated to take longer.
        max_cost: Reject a run that is estimated to cost more.
        prices: Price table; prices.toml in LUTHIER_HOME by default.
        check_forgetting: Withhold a model that forgot too much.
        accept_forgetting: Activate the model outside these limits, too.
        reporter: Receives progress; silent if not given.
        **fields: Fields of the recipe, such as ``base="..."``, ``name="..."``, ``epochs=3`` or
            ``adaptation__rank=8``, with ``__`` for the dot.

    Returns:
        Model id, folders, losses, time and memory of the run.

    Raises:
        RefusedInput: before training, for invalid data or settings.
    """
    if check_forgetting:
        fields = {"forgetting": {}, **fields}
    if accept_forgetting:
        fields = {**fields, "forgetting.accept": True}
    from luthier.documents.readers import as_rows

    recipe = tuning_recipe(as_rows(data), fields)
    from luthier.engine.dataset import OpenedData
    from luthier.engine.metrics import Reporter

    reporter = reporter or Reporter()
    opened = OpenedData(recipe.data, recipe.objective)
    opened.check()
    # A resumed run has passed the limits already, and its estimate would be of a whole run.
    if not resume and (max_minutes is not None or max_cost is not None):
        from luthier.workflows.estimate.budget import check_limits, read_prices
        from luthier.workflows.estimate.estimate import estimate

        table = read_prices(prices)
        check_limits(estimate(recipe, reporter), max_minutes, max_cost, table)
    # Importing torch takes seconds: only after the checks of recipe and data.
    with heavy_imports():
        from luthier.workflows.tuning import tune as run

    return run(recipe, resume, reporter, processes, opened)


def print_result(result: Result) -> None:
    """Print the result of a run and the next command."""
    from luthier.data.inputs import PLURAL
    from luthier.engine.metrics import OPTIMIZER, MetricsFile, clipped_share
    from luthier.engine.runs import AUGMENTED, GRIDS, METRICS
    from luthier.library.models import find

    stored = find(result.model_id)
    objective, chat = stored.objective, stored.chat
    # loss.png includes the scores; rewards have their own plot.
    curve = "reward" if objective.measure == "reward" else "loss"
    held = ""
    if result.verdict is not None:
        refit_rows = 0 if result.refit is None else result.refit.rows
        held = validation_result(
            objective.measure, result.verdict.kept, refit_rows, beside_loss=True
        )
    out = new_console(highlight=False, soft_wrap=True)
    withheld = stored.manifest.withheld
    state = "[bold red]withheld[/bold red]" if withheld else "verified"
    if result.verdict is not None and result.verdict.unchanged:
        state += ", but [bold red]the weights are unchanged[/bold red]"
    out.print(f"\n[bold green]{result.model_id}[/bold green] is stored and {state}")
    if withheld:
        out.print(f"  {withheld}", markup=False)
    if result.comparison is not None and result.comparison.loses:
        out.print(f"  {result.comparison.verdict}", style="bold yellow", markup=False)
        options = result.comparison.kept_by
        if options and stored.objective.method == "classification":
            data = (stored.manifest.recipe or {})["data"]["train"]
            files = shlex.join([data] if isinstance(data, str) else data)
            out.print(f"  keep the baseline: luthier tune {files} {options}", markup=False)
    steps = "1 step" if result.steps == 1 else f"{result.steps:,} steps"
    if result.verdict is not None and result.verdict.stopped_early:
        steps += " (stopped early)"
    if result.refit is not None and result.refit.steps:
        steps += f", {result.refit.steps:,} in the refit on all rows"
    read = f"{result.rows_seen:,} {PLURAL[chat.reads]}"
    if chat.reads == "text":
        read = f"{result.tokens:,} tokens"
    done = f"{steps}, {read}" if result.steps else "fitted"
    memory = f"peak memory {result.peak_memory_bytes / 1e9:.2f} GB"
    figures = [f"{done} in {result.seconds:.0f} s", loss_figures(result, held), memory]
    out.print(f"  {'; '.join(filter(None, figures))}")
    out.print(
        f"  {result.trained_weights:,} of {result.weights:,} weights trained "
        f"({result.trained_weights / result.weights:.2%}), {result.saved_bytes / 1e6:,.2f} MB stored"
    )
    print_comparison(result.comparison, is_refit=result.refit is not None)
    print_label_issues(result)
    print_verdict(result)
    if result.steps:
        out.print(f"  {curve} curve  {result.run_dir}/{curve}.png")
    metrics = MetricsFile(Path(result.run_dir) / METRICS).read()
    if (clipped := clipped_share(metrics)) is not None:
        out.print(
            f"  rate, norm  {result.run_dir}/{OPTIMIZER} ({clipped:.0%} of the steps are clipped)"
        )
    if (Path(result.run_dir) / AUGMENTED).is_file():
        out.print(f"  changes     {result.run_dir}/{AUGMENTED}")
    if (Path(result.run_dir) / GRIDS).is_dir():
        out.print(f"  samples     {result.run_dir}/{GRIDS}/")
    use = objective.task.command(result.model_id, chat)
    if withheld:
        use = f"models accept {result.model_id}"
    out.print(f"  use it      luthier {use}")


def loss_figures(result: Result, held: str) -> str:
    """Return the losses of a run as text, all of the same weights.

    ``held`` contains the validation measurements of the stored weights. The training loss belongs
    to the last step, so the text omits the training loss if earlier weights were stored.
    """
    verdict = result.verdict
    is_last = verdict is None or (result.refit is None and verdict.kept_step == result.steps)
    is_shown = result.steps and (is_last or not held)
    figures = [f"training loss {result.train_loss:.4f}"] if is_shown else []
    return ", ".join(figures + ([f"validation {held}"] if held else []))


def validation_result(
    measure: str, kept: Mapping[str, float], refit_rows: int = 0, beside_loss: bool = False
) -> str:
    """Return the validation measurements of the stored weights as text, or an empty text.

    ``refit_rows`` is the number of rows of a refit, whose weights are stored instead.
    ``beside_loss`` adds the loss of the same weights.
    """
    from luthier.engine.metrics import SCORES, SHARES

    if measure not in kept:
        return ""
    style = ".1%" if measure in SHARES else ".4f"
    before = f" before the refit on all {refit_rows:,} rows" if refit_rows else ""
    loss = (
        f", loss {kept['loss']:.4f}" if beside_loss and measure != "loss" and "loss" in kept else ""
    )
    return f"{SCORES.get(measure, measure)} {kept[measure]:{style}}{loss}{before}"


def print_comparison(found: Comparison | None, is_refit: bool = False) -> None:
    """Print the model compared with simple baselines and the verdict. The best is first, if the rows
    rank them. A better baseline is the first line of the result.

    ``is_refit`` marks a measurement of weights before the refit.
    """
    if found is None or found.tuned is None:
        return
    from luthier.evaluation.baselines import render

    out = new_console(highlight=False)
    out.print(f"  on {found.rows:,} held-out rows, compared with simple baselines:")
    name = "the training before the refit" if is_refit else "this model"
    lines = [(name, found.tuned, 0.0)]
    lines += [(each.name, each.score, each.seconds) for each in found.baselines]
    gains = {each.name: found.gain(each) for each in found.baselines}
    if found.ranks:
        lines.sort(key=lambda line: gains.get(line[0], 0.0))
    for name, score, seconds in lines:
        spent = f"  ({seconds:.1f} s)" if name in gains else ""
        style = "" if name in gains else "bold"
        out.print(f"    {render(found.measure, score):24} {name}{spent}", style=style, markup=False)
    for name in found.left_out:
        out.print(f"    not measured (time limit): {name}", markup=False)
    if found.verdict and not found.loses:
        out.print(f"  {found.verdict}", style="bold yellow", markup=False, soft_wrap=True)


MOST_SHOWN = 5
"""Maximum number of printed rows with a label issue."""


def print_label_issues(result: Result) -> None:
    """Print the number of possible label errors, the first errors, and the file with all errors."""
    from luthier.engine.runs import LABEL_ISSUES
    from luthier.errors import location_text, read_line_field
    from luthier.formatting import one_line

    path = Path(result.run_dir) / LABEL_ISSUES
    if result.label_issues is None or not result.label_issues.issues or not path.is_file():
        return
    count, rows = result.label_issues.issues, result.label_issues.rows
    what = "1 possible label error" if count == 1 else f"{count:,} possible label errors"
    out = new_console(highlight=False, markup=False, soft_wrap=True)
    shown = ":" if count <= MOST_SHOWN else f"; the first {MOST_SHOWN}:"
    out.print(f"  {what} in {rows:,} rows{shown}", style="bold yellow")
    for line in path.read_text(encoding="utf-8").split("\n")[: min(count, MOST_SHOWN)]:
        each = json.loads(line)
        where = location_text(Path(each["file"]).name, read_line_field(each))
        text = f'{where}  "{each["label"]}" looks like '
        text += f'"{each["likely_label"]}": {each["text"]}'
        out.print(f"    {one_line(text)}")
    out.print(f"  {'label issue ' if count == 1 else 'label issues'} {path}")
    out.print(
        "    Labels of held-out rows can be wrong, too. Check the rows, or try `--set "
        "data.label_issues=leave_out`"
    )


_STYLES = {
    "learned": "bold green",
    "still_improving": "bold green",
    "overfitted": "bold yellow",
    "declined": "bold yellow",
    "hardly_learned": "bold yellow",
    "worse": "bold red",
    "unmeasured": "yellow",
}


def print_verdict(result: Result) -> None:
    """Print whether the model learned, and advice for the next run."""
    from luthier.formatting import command_option, map_code

    if (verdict := result.verdict) is None:
        return
    out = new_console(highlight=False, markup=False, soft_wrap=True)
    out.print(f"  {verdict.text}", style=_STYLES[verdict.outcome])
    if verdict.advice:
        out.print(f"  {map_code(verdict.advice, command_option)}")
