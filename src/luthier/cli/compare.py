"""``luthier compare``: tuned models compared with prompting and baselines."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from luthier.cli.evaluate import (
    Graders,
    GraderSettings,
    OptionalJudge,
    resolve_graders,
    resolve_judge,
)
from luthier.cli.terminal.console import (
    check_figure,
    check_output,
    heavy_imports,
    print_tables,
    print_text,
    write_page,
)
from luthier.cli.terminal.options import Mapped, OptionalAtLeastOne, RowSource
from luthier.errors import RecipeError
from luthier.files import read_text

if TYPE_CHECKING:
    from luthier.engine.metrics import Reporter
    from luthier.workflows.compare import HeadToHead


def compare(
    data: RowSource,
    tuned: Annotated[Sequence[str], typer.Option("--tuned", metavar="ID")],
    *,
    base: str | None = None,
    train: str | Path | None = None,
    documents: Sequence[str | Path] = (),
    index: str | None = None,
    prompt: Sequence[Path] = (),
    rival: Sequence[str] = (),
    graders: Graders = None,
    grader_settings: GraderSettings = None,
    max_tokens: int = 64,
    prices: Path | None = None,
    encoder: str | None = None,
    judge: OptionalJudge = None,
    show: int = 0,
    seeds: int = 0,
    per_month: OptionalAtLeastOne = None,
    paraphrases: str | None = None,
    html: Path | None = None,
    figure: Path | None = None,
    attach: bool = False,
    columns: Mapped = None,
    reporter: Reporter | None = None,
) -> HeadToHead:
    """Compare tuned models with prompting and baselines.

    Args:
        data: Held-out rows: prompts and replies, or labels.
        tuned: Id of a tuned model; repeatable.
        base: Model without tuning; the base of the first by default.
        train: Rows for examples; the training rows by default.
        documents: Text, document or folder with the facts for replies; repeatable.
        index: Index whose search gives passages (luthier index add).
        prompt: Instructions, or a template with {column}; repeatable.
        rival: Model at an endpoint, https://host/v1#model; repeatable.
        graders: Grader such as exact, or a TOML file; the first decides.
        grader_settings: Setting of a grader, e.g. number.tolerance=0.01.
        max_tokens: Token limit of a reply.
        prices: Price table; prices.toml in LUTHIER_HOME by default.
        encoder: Model whose embeddings also select examples.
        judge: Judge of replies: model, https://host/v1#model or TOML.
        show: Number of rows to print with the replies, worst first.
        seeds: Replies sampled per row, to measure consistency.
        per_month: Answers a month, for monthly costs and the break-even.
        paraphrases: Column that paraphrases share, to measure consistency.
        html: Write the comparison as an HTML page.
        figure: Write bars with 95 % intervals as FILE.svg, light and dark.
        attach: Store the result with the models, for certificates.
        columns: Column of a key, e.g. prompt=question; repeatable.
        reporter: Receives progress; silent if not given.

    Returns:
        ``contenders``, best first, ``behind()`` with the differences, and ``verdict()``.

    Raises:
        RefusedInput: without a tuned model, or if a tenth of the rows are training rows.
    """
    check_output(html, data)
    check_figure(figure, data)
    with heavy_imports():
        from luthier.chat_models.base import ModelSpec, address_fields
        from luthier.chat_models.endpoint import EndpointModel
        from luthier.cli.documents import open_search
        from luthier.data.rows import load_rows
        from luthier.documents.readers import load_texts
        from luthier.engine.metrics import Reporter
        from luthier.evaluation.evaluate import load_graded, with_unread_columns
        from luthier.library.models import find
        from luthier.library.reports import check_attachable
        from luthier.workflows.compare import compare as run
        from luthier.workflows.estimate.budget import check_load, read_prices
        from luthier.workflows.evaluate import attach_report
        from luthier.workflows.prompting import records_of
        from luthier.workflows.training_overlap import (
            held_out_rows,
            overlap_remarks,
            training_sources,
        )

    reporter = reporter or Reporter()
    table = read_prices(prices)
    check_load(per_month, table)
    models = [find(each) for each in tuned]
    if not models:
        raise RecipeError("`tuned` needs at least one model id")
    for each in models if attach else ():
        check_attachable(each)
    chosen = resolve_graders(graders, grader_settings or {})
    rows = load_graded(data, columns, (chosen or {}).values())
    train_columns, sources = columns, [str(train)] if train is not None else []
    if train is None:
        sources, missing = training_sources(models[0])
        train_columns = (models[0].manifest.recipe or {}).get("data", {}).get("columns")
        if sources:
            names = ", ".join(sources)
            reporter.note(f"Examples: {names}, the training rows of {models[0].id}")
            if unlearned := held_out_rows(models[0], sources):
                reporter.note(
                    f"{unlearned:,} of these rows were held out of the training, and examples and "
                    "baselines know these rows"
                )
        if missing:
            reporter.note(
                f"warning: {', '.join(missing)}, training rows of {models[0].id}, are missing or "
                "changed: --train FILE gives the rows of examples and baselines"
            )
    learned = [
        row
        for source in sources
        for row in load_rows(source, train_columns, accepts_own_keys=train is None)
    ]
    if local := next((each for each in rival if "url" not in address_fields(each)), None):
        raise RecipeError(f"the rival {local} is no address. Write https://host/v1#model")
    prompts = {path.name: read_text(path).strip() for path in prompt}
    with open_search(index) as search_index, with_unread_columns(data, columns):
        found = run(
            rows,
            find(base or models[0].root),
            models,
            learned,
            load_texts(documents),
            chosen,
            max_tokens,
            table,
            None if encoder is None else find(encoder),
            None if judge is None else resolve_judge(judge),
            prompts,
            records_of(str(data)) if prompts or paraphrases else {},
            [EndpointModel(ModelSpec(model=each)) for each in rival],
            show,
            seeds,
            per_month or 0,
            paraphrases,
            search_index,
            reporter.note,
            lambda done, total: reporter.progress(done, total, "compare"),
        )
    for each in models[train is None :]:  # the rows of the first are compared before
        found.remarks.extend(overlap_remarks(each, data, rows))
    if "RAG" in found.best.technique:
        model, _, passages = found.best.name.partition(" with ")
        command = f"luthier chat {model} --index {index}"
        if passages != "the index":
            names = shlex.join(map(str, documents))
            command = (
                f"luthier index add {names} --name documents && luthier chat {model} --index "
                "documents"
            )
            found.remarks.append(
                "The search of an index also uses embeddings; `compare --index` measures the search"
            )
        found.remarks.append(f"Use the best contender: {command}")
    if attach:
        attach_report(models, "comparison", [data], found.plain(), reporter.note)
    if html is not None:
        from luthier.workflows.compare import comparison_page

        write_page(html, comparison_page(found, str(data)), reporter)
    if figure is not None:
        from luthier.workflows.figures import draw_bars

        bars = [
            (each.name, each.score.value, each.score.interval, each.is_tuned)
            for each in found.contenders
        ]
        draw_bars(figure, found.measure.replace("_", " "), bars)
        reporter.note(f"figure: {figure}")
    return found


def show_comparison(found: HeadToHead) -> None:
    """Print a line for each contender, best first, and the verdict."""
    print_tables(found.tables())
    print_text(found.notes(page=False))
    for remark in found.remarks:
        print_text(remark)
    for number, row in enumerate(found.shown, 1):
        print_text(f"row {number}: {row.prompt}")
        print_text(f"  expected: {row.expected}")
        for name, reply in row.replies.items():
            print_text(f"  {name}: {reply}")
    print_text(found.verdict())
