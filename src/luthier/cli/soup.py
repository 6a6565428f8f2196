"""``luthier soup``: weights between a tuned model and its base, or the mean of several."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from luthier.cli.console import heavy_imports, new_table, print_json, print_table, print_text
from luthier.cli.evaluate import parse_grader_options
from luthier.cli.options import Graders, GraderSettings, Json, MaxTokens, Name

if TYPE_CHECKING:
    from luthier.evaluation.significance import Score
    from luthier.workflows.soup import Soup


def soup(
    models: Annotated[list[str], typer.Argument(help="Tuned models of one base.")],
    alpha: Annotated[
        float | None,
        typer.Option(help="Share of what was tuned, up to 1; by the curve when not given, or 0.5."),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Held-out rows; with them the curve is measured.")
    ] = None,
    general: Annotated[
        str | None, typer.Option(help="Rows of what should not be forgotten, raw text say.")
    ] = None,
    method: Annotated[
        Literal["uniform", "greedy"],
        typer.Option(help="The mean of all, or of those without which held-out rows lose."),
    ] = "uniform",
    grader: Graders = None,
    set_: GraderSettings = None,
    max_tokens: MaxTokens = 128,
    name: Name = None,
    json_: Json = False,
) -> None:
    """Average a tuned model with its base, so that it forgets less, or several tuned models."""
    with heavy_imports():
        from luthier.cli.progress import LiveReporter
        from luthier.sdk.training import soup as run

    graders = parse_grader_options(grader or ["exact"], set_ or ())
    with LiveReporter() as reporter:
        found = run(
            models, alpha=alpha, data=data, general=general, method=method, graders=graders,
            max_tokens=max_tokens, name=name, reporter=reporter,
        )  # fmt: skip
    if json_:
        print_json(found.plain())
        return
    _show_curve(found)
    if found.left_out:
        print_text(f"left out, as the mean is worse with them: {', '.join(found.left_out)}")
    if found.head_of_tuned:
        print_text(
            f"{found.base} has no {', '.join(found.head_of_tuned)}: at every alpha they are those of "
            "the tuned model"
        )
    if found.suggested is not None:
        print_text(
            f"suggested alpha: {found.suggested:g}, {found.reason}. It was chosen on these rows, so "
            "measure it on others"
        )
    if found.model_id is None:
        same = found.base if found.alpha == 0 else found.ingredients[0]
        print_text(f"that is {same} itself, so nothing was stored; --alpha stores another point")
        return
    what = "an adapter" if found.saved == "adapter" else "a whole network"
    print_text(
        f"{found.model_id} is stored and verified: alpha {found.alpha:g}, {what} of "
        f"{found.saved_bytes / 1e6:,.1f} MB"
    )


def _show_curve(found: Soup) -> None:
    """A line for each point: the score with its interval, and the same on general rows."""
    if not found.curve:
        return
    names = [found.measure] + (
        [f"{found.general_measure} (general)"] if found.general_measure else []
    )
    table = new_table("alpha", *(each.replace("_", " ") for each in names), "", numbers=("alpha",))
    for point in found.curve:
        scores = [point.score] + ([] if point.general is None else [point.general])
        mark = "the base" if point.alpha == 0 else "tuned" if point.alpha == 1 else ""
        suggested = "suggested" if point.alpha == found.suggested else ""
        note = ", ".join(filter(None, [mark, suggested]))
        table.add_row(f"{point.alpha:g}", *map(_with_interval, scores), note)
    print_table(table)


def _with_interval(score: Score) -> str:
    style = ".1%" if score.is_share else ".3f"
    low, high = score.interval
    return f"{score.value:{style}} ({low:{style}} to {high:{style}})"
