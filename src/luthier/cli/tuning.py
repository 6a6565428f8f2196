"""``luthier tune``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.cli.comparing import print_comparison
from luthier.cli.console import LiveReporter, heavy_imports, print_json, validation_result

if TYPE_CHECKING:
    from luthier.engine.runs import Result
    from luthier.recipe import Recipe


@dataclass(frozen=True)
class Limits:
    """What a run may take, and whether to say first what it will."""

    estimate: bool = False
    max_minutes: float | None = None
    max_cost: float | None = None
    prices: Path | None = None

    def check(self, recipe: Recipe, as_json: bool) -> dict[str, Any] | None:
        """Estimate the job, if that was asked for or is needed, and refuse it beyond the limits."""
        if not self.estimate and self.max_minutes is None and self.max_cost is None:
            return None
        from luthier.cli import estimating
        from luthier.planning.prices import read_prices

        prices = read_prices(self.prices)
        found = estimating.estimated(recipe, as_json)
        if not as_json:
            estimating.show(found, prices)
        from luthier.planning.deadline import check_limits

        check_limits(found, self.max_minutes, self.max_cost, prices)
        return estimating.as_plain(found, prices)


def tune(
    data: str,
    flags: Mapping[str, Any],
    settings: Sequence[str],
    resume: bool,
    as_json: bool,
    limits: Limits = Limits(),
) -> None:
    """Build the recipe, run it, print the result."""
    from luthier.engine.dataset import check_sources

    recipe = recipe_of(data, flags, settings)
    check_sources(recipe.data, recipe.objective)
    estimate = None if resume else limits.check(recipe, as_json)
    # Loads torch, which takes seconds: only for a recipe that parses, and data that is there.
    with heavy_imports():
        from luthier.engine.train import train

    with closing(LiveReporter(quiet=as_json)) as reporter:
        result = train(recipe, resume, reporter)
    if as_json:
        print_json(asdict(result) | ({"estimate": estimate} if estimate else {}))
    else:
        print_result(result)


def recipe_of(data: str, flags: Mapping[str, Any], settings: Sequence[str]) -> Recipe:
    """The recipe of a data file or a TOML file, with flags and ``--set`` applied in this order."""
    from luthier.recipe import Recipe

    return Recipe.parse(fields_of(data, flags, settings))


def fields_of(data: str, flags: Mapping[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """The same as plain values, for recipes that have further fields."""
    from luthier.recipe import assign, parse_columns, parse_mix, read_toml, set_field

    fields = read_toml(Path(data)) if data.endswith(".toml") else {"data": {"train": data}}
    for key, value in flags.items():
        if value is not None:
            given = [parse_mix(text) for text in value] if key == "data.mix" else value
            given = parse_columns(value) if key == "data.columns" else given
            assign(fields, key.split("."), given)
    for setting in settings:
        set_field(fields, setting)
    return fields


def print_result(result: Result) -> None:
    """What a finished run came to, and what to type next."""
    from luthier.cli.console import new_console
    from luthier.store.models import find, objective_of

    objective = objective_of(find(result.model_id))
    # The picture of the loss has the scores, too; that of rewards is one of its own.
    held, curve = "", "reward" if objective.measure == "reward" else "loss"
    verdict = result.verdict
    if verdict is not None and (shown := validation_result(objective.measure, verdict.kept)):
        held = f", validation {shown}"
    out = new_console(highlight=False)
    out.print(f"\n[bold green]{result.model_id}[/bold green] is stored and verified")
    steps = "1 step" if result.steps == 1 else f"{result.steps:,} steps"
    out.print(
        f"  {steps}, {result.tokens:,} tokens in {result.seconds:.0f} s; "
        f"loss {result.train_loss:.4f}{held}; peak memory {result.peak_memory_bytes / 1e9:.2f} GB",
        soft_wrap=True,
    )
    out.print(
        f"  {result.trained_weights:,} of {result.weights:,} weights "
        f"({result.trained_weights / result.weights:.2%}) were trained, stored in "
        f"{result.saved_bytes / 1e6:,.2f} MB",
        soft_wrap=True,
    )
    print_comparison(out, result.comparison)
    print_verdict(result)
    out.print(f"  {curve} curve  {result.run_dir}/{curve}.png", soft_wrap=True)
    verb = "chat {}" if objective.task == "causal_lm" else "tune DATA --base {}"
    verb = 'predict {} "some text"' if objective.reads else verb
    out.print(f"  use it      luthier {verb.format(result.model_id)}", soft_wrap=True)


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
    """Whether the run learned, and what to change in a further one."""
    from luthier.cli.console import new_console
    from luthier.setting_names import option, with_setting_names

    if (verdict := result.verdict) is None:
        return
    out = new_console(highlight=False)
    style = _STYLES[verdict.outcome]
    out.print(f"  {verdict.text}", style=style, markup=False, soft_wrap=True)
    if verdict.advice:
        advice = with_setting_names(verdict.advice, option)
        out.print(f"  {advice}", markup=False, soft_wrap=True)
