"""``luthier compare``: tuned models beside what needs no training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from luthier.cli.console import (
    check_output,
    new_table,
    note,
    print_json,
    print_table,
    print_text,
    write_page,
)
from luthier.cli.evaluate import parse_grader_options, parse_judge_option
from luthier.cli.options import (
    Attach,
    Columns,
    Documents,
    Graders,
    GraderSettings,
    Html,
    Json,
    MaxTokens,
    Prices,
)

if TYPE_CHECKING:
    from luthier.workflows.compare import HeadToHead


def compare(
    data: Annotated[
        str,
        typer.Argument(help="Rows that nothing was learned from: prompts and replies, or labels."),
    ],
    tuned: Annotated[list[str], typer.Option(help="A tuned model's id; again for more.")],
    base: Annotated[
        str | None,
        typer.Option(help="What is asked without training; by default the tuned model's."),
    ] = None,
    train: Annotated[
        str | None,
        typer.Option(help="Rows that examples are taken from; by default those of the tuning."),
    ] = None,
    documents: Documents = None,
    grader: Graders = None,
    set_: GraderSettings = None,
    max_tokens: MaxTokens = 64,
    prices: Prices = None,
    encoder: Annotated[
        str | None,
        typer.Option(help="Model with embeddings, by which examples and passages are found, too."),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(help="Who prefers replies: a model, https://host/v1#model, or a TOML file."),
    ] = None,
    html: Html = None,
    attach: Attach = False,
    columns: Columns = None,
    json_: Json = False,
) -> None:
    """Compare tuned models with prompting and baselines."""
    from luthier.cli.progress import show_progress
    from luthier.recipe import parse_columns
    from luthier.sdk.evaluation import compare as run

    check_output(html, data)
    graders = parse_grader_options(grader, set_ or ()) if grader else None
    with show_progress(0, "compare") as done:
        found = run(
            data, tuned, base, train, documents or (), graders, max_tokens, prices, note,
            judge=None if judge is None else parse_judge_option(judge),
            encoder=encoder, columns=parse_columns(columns), on_progress=done, attach=attach,
        )  # fmt: skip
    if html is not None:
        from luthier.workflows.compare_page import page

        write_page(html, page(found, data))
    if json_:
        print_json({"data": data, **found.plain()})
    else:
        show(found)


def show(found: HeadToHead) -> None:
    """A line for each, the best first, and the verdict below."""
    from rich.text import Text

    print_text(f"{found.measure.replace('_', ' ')} on {found.rows:,} rows")
    style = ".1%" if found.best.score.is_share else ".3g"
    priced = [] if found.prices is None else [f"{found.prices.currency}/1,000"]
    numbers = ("score ±", "to the best ±", "tokens", "ms", "MB", *priced)
    table, behind = new_table("", *numbers, numbers=numbers), found.behind()
    for each in found.contenders:
        difference = ""
        if each.name in behind:
            apart = behind[each.name]
            mark = "" if apart.significant else " *"
            difference = f"{apart.value:+{style}} {apart.error:{style}}{mark}"
        cells: list[str | Text] = [
            Text(each.name, "bold" if each.is_tuned else ""),
            f"{each.score.value:{style}} {each.score.error:{style}}", difference,
            "" if each.prompt_tokens is None else f"{each.prompt_tokens:,.0f}",
            f"{1000 * each.seconds:,.1f}",
            f"{each.memory_bytes / 1e6:,.0f}" if each.memory_bytes else "",
        ]  # fmt: skip
        cost = found.cost_per_thousand(each)
        table.add_row(*cells, *([] if cost is None else [f"{cost:.3g}"]))
    print_table(table)
    costs = "" if found.prices is None else f"; cost of 1,000 answers in {found.prices.currency}"
    print_text(
        f"± one standard error; tokens read and milliseconds for an answer, memory at its peak{costs}; "
        "* may be chance"
    )
    for remark in found.remarks:
        print_text(remark)
    print_text(found.verdict())
