"""``luthier advise``: what to do with this data, computed and measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from luthier.cli.console import check_output, heavy_imports, new_console, print_json
from luthier.cli.options import (
    Adaptation,
    Base,
    Columns,
    Data,
    Documents,
    Json,
    Objective,
    Settings,
    Validation,
    read_recipe,
    recipe_options,
)

if TYPE_CHECKING:
    from luthier.workflows.advise.recommend import Advice


def advise(
    data: Data,
    validation: Validation = None,
    columns: Columns = None,
    base: Base = None,
    objective: Objective = None,
    adaptation: Adaptation = None,
    documents: Documents = None,
    goal: Annotated[
        Literal["quality", "cost", "latency", "knowledge", "style"],
        typer.Option(help="What matters most; knowledge is facts that stand in documents."),
    ] = "quality",
    max_minutes: Annotated[float | None, typer.Option(help="Training may take so long.")] = None,
    max_seconds: Annotated[float | None, typer.Option(help="An answer may take so long.")] = None,
    max_megabytes: Annotated[float | None, typer.Option(help="The model may be so large.")] = None,
    trial: Annotated[
        float, typer.Option(min=0, help="Seconds to train on trial; 0 trains nothing.")
    ] = 60.0,
    set_: Settings = None,
    recipe_file: Annotated[
        Path | None, typer.Option("--recipe", help="Write the recipe that is advised (TOML).")
    ] = None,
    json_: Json = False,
) -> None:
    """Recommend a technique, measured on your rows."""
    options = recipe_options(locals())
    from luthier.recipe import portable, to_toml
    from luthier.workflows.advise import tuning_command
    from luthier.workflows.advise.facts import Wishes

    recipe = read_recipe(data, options, set_)
    check_output(recipe_file)
    command = tuning_command(data, options, set_ or ())
    wishes = Wishes(goal, max_minutes, max_seconds, max_megabytes)
    with heavy_imports():
        from luthier.cli.progress import LiveReporter
        from luthier.workflows.advise import advise as run

        with LiveReporter() as reporter:
            found = run(recipe, command, documents or (), wishes, trial, reporter)
    if recipe_file is not None:
        from luthier.files import write_bytes

        reasons = "".join(f"# {reason}\n" for reason in found.recommendation.reasons)
        write_bytes(recipe_file, (reasons + to_toml(portable(recipe))).encode())
    if json_:
        print_json(found.plain())
    else:
        show(found)


def show(advice: Advice) -> None:
    """The comparison as tables, and the recommendation below."""
    from rich.table import Table

    out = new_console(highlight=False)
    facts = advice.facts
    evidence = facts.evidence
    if evidence is not None:
        tried = Table(
            title=f"Tried on {evidence.held} rows that nothing was learned from",
            title_justify="left", box=None, padding=(0, 2, 0, 0),
        )  # fmt: skip
        for name in ("", "right", "tokens read", "s an answer"):
            tried.add_column(name, justify="left" if not name else "right")
        for each in evidence.tried:
            tried.add_row(
                f"{each.technique}: {each.name}",
                f"{each.score:.0%}",
                f"{each.prompt_tokens:,.0f}",
                f"{each.seconds:.2f}",
            )
        out.print(tried)
        out.print()
    colours = {"yes": "green", "perhaps": "yellow", "no": "dim"}
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for judged in advice.judgements:
        colour = colours[judged.fit]
        measured = f"; tried: {judged.measured}" if judged.measured else ""
        table.add_row(
            f"[{colour}]{judged.technique}[/]", f"[{colour}]{judged.fit}[/]", judged.reason
        )
        table.add_row(
            "", "", f"[dim]needs {judged.needs}. Takes {judged.takes}; an answer: "
            f"{judged.each_answer}. Complexity {judged.complexity}, overfitting "
            f"{judged.overfitting}, forgetting {judged.forgetting}{measured}[/]",
        )  # fmt: skip
    out.print(table)
    chosen = advice.recommendation
    what = ", then ".join(chosen.techniques) or "mend the data first"
    what += "" if chosen.sure else ", as a first try"
    out.print(f"\n[bold]{what}[/bold]" + ("" if chosen.tune else "  (do not tune)"))
    for reason in chosen.reasons:
        out.print(f"  because {reason}", markup=False)
    for caution in chosen.cautions:
        out.print(f"  but {caution}", markup=False)
    for command in chosen.commands:
        out.print(f"  next    {command}", markup=False, soft_wrap=True)
