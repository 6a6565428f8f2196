"""``luthier evaluate`` and ``luthier judge``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from luthier.cli.terminal.bridge import FromText
from luthier.cli.terminal.console import (
    check_figure,
    check_output,
    heavy_imports,
    print_tables,
    print_text,
    print_written,
    write_page,
)
from luthier.cli.terminal.options import Mapped, ModelSource, RowSource, parse_settings
from luthier.errors import RecipeError

if TYPE_CHECKING:
    from luthier.engine.metrics import Reporter
    from luthier.evaluation.evaluate import Evaluation
    from luthier.evaluation.judges import JudgeAgreement
    from luthier.graders import Grader, Ruler, Spec

SHOWN_LABELS = 20
"""Maximum number of labels with a table in the terminal; the page and JSON have all."""
Graders = Annotated[
    "Sequence[Spec] | Mapping[str, Spec] | None",
    FromText(list[str]),
    typer.Option("--grader", metavar="NAME"),
]
GraderSettings = Annotated[
    Mapping[str, Any] | None,
    FromText(list[str], parse_settings),
    typer.Option("--set", metavar="NAME.FIELD=VALUE"),
]
JudgeSource = Annotated["Spec", FromText(str)]
OptionalJudge = Annotated["Spec | None", FromText(str)]


def evaluate(
    model: ModelSource,
    data: RowSource,
    *,
    graders: Graders = None,
    grader_settings: GraderSettings = None,
    on_grader_error: Literal["fail", "zero"] = "fail",
    max_tokens: int = 128,
    output: Path | None = None,
    turns: Literal["last", "calls", "all"] = "last",
    slices: Annotated[Sequence[str], typer.Option("--slice", metavar="NAME")] = (),
    html: Path | None = None,
    figure: Path | None = None,
    attach: bool = False,
    columns: Mapped = None,
    long_rows: Literal["error", "drop", "truncate"] | None = None,
    corpus: Path | None = None,
    qrels: Path | None = None,
    reranker: str | None = None,
    reporter: Reporter | None = None,
) -> Evaluation:
    """Evaluate a model on held-out rows.

    Replies are graded, labels are scored, and raw text gives a perplexity. Rows with judged replies
    measure how often the model ranks the replies as people did. With --corpus, an embedding model
    or a reranker searches the documents, compared with BM25. The same call after an interruption
    continues.

    Args:
        model: Model id, local directory or hub id.
        data: Held-out rows: file or folder.
        graders: Grader such as exact, or a TOML file; repeatable.
        grader_settings: Setting of a grader, e.g. number.tolerance=0.01.
        on_grader_error: Effect of a reply without a grade.
        max_tokens: Token limit of a reply.
        output: Write replies to this file (JSONL).
        turns: Replies of a conversation to generate.
        slices: Score slices: label, length, language or a column.
        html: Write an HTML report with slices and the worst rows.
        figure: Write bars with 95 % intervals as FILE.svg, light and dark.
        attach: Store the result with the model, for the certificate.
        columns: Column of a key, e.g. prompt=question; repeatable.
        long_rows: How to handle rows longer than the context.
        corpus: Documents to search, e.g. BEIR's corpus.jsonl.
        qrels: Relevant documents of the queries (BEIR or TREC).
        reranker: Reranker for the first documents of the search.
        reporter: Receives progress; silent if not given.

    Returns:
        Scores by the names of the graders, with errors and intervals, and each reply.

    Raises:
        RefusedInput: before generation, for invalid rows or graders.
        GradingFailed: with ``fail``, for a reply that a grader cannot grade.
    """
    check_output(output, data)
    check_output(html, data)
    check_figure(figure, data)
    with heavy_imports():
        from luthier.cli.model import Model
        from luthier.engine.metrics import Reporter
        from luthier.workflows.evaluate import evaluate as run

    reporter = reporter or Reporter()
    found = run(
        model.stored if isinstance(model, Model) else model,
        data,
        resolve_graders(graders, grader_settings or {}),
        max_tokens,
        on_grader_error,
        reporter.note,
        long_rows,
        turns=turns,
        columns=columns,
        slices=slices,
        on_progress=lambda done, total: reporter.progress(done, total, "evaluate"),
        attach=attach,
        opened=model.opened if isinstance(model, Model) else None,
        corpus=corpus,
        qrels=qrels,
        reranker=reranker,
    )
    if output is not None:
        from luthier.files import write_bytes

        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in found.records]
        write_bytes(output, "".join(lines).encode())
    if html is not None:
        from luthier.evaluation.report_page import page

        found = _with_pictures(found)
        write_page(html, page(found, str(model), str(data)), reporter)
    if figure is not None:
        from luthier.workflows.figures import draw_bars

        bars = [
            (name.replace("_", " "), found.scores[name], interval, True)
            for name, interval in found.intervals.items()
        ]
        draw_bars(figure, "", bars)
        reporter.note(f"figure: {figure}")
    if text := found.long_rows_text:
        reporter.note(text)
    if graders and not found.is_graded:
        reporter.note("graders ignored: these rows need no replies")
    return found


def _with_pictures(found: Evaluation) -> Evaluation:
    """Return the evaluation with thumbnails of the worst images."""
    from luthier.data.shapes.media import MediaRow
    from luthier.evaluation.report_page import MOST_WORST
    from luthier.media.image_grid import thumbnail

    worst = ((number, found.rows[number]) for number in found.worst(MOST_WORST))
    return replace(found, pictures={
        number: thumbnail(row.media) for number, row in worst
        if isinstance(row, MediaRow) and row.media.kind == "image"
    })  # fmt: skip


def show_evaluation(found: Evaluation, data: str | Path, output: Path | None) -> None:
    """Print scores, ways to search, slices and replies without a grade."""
    from luthier.evaluation.report_page import label_table, part_tables

    spent = f" of {len(found.rows):,} rows ({found.seconds:.0f} s)" if found.is_graded else ""
    for name, score in found.scores.items():
        style = ".2%" if found.row_scores[name].is_share else ".4f"
        error = f" ± {found.errors[name]:{style}}" if name in found.errors else ""
        print_text(f"{name}: {score:{style}}{error}{spent}")
    if found.errors:
        name, (low, high) = next(iter(found.intervals.items()))
        style = ".1%" if found.row_scores[name].is_share else ".3g"
        print_text(
            f"± one standard error; 95 % interval of {name}: {low:{style}} to {high:{style}}"
        )
    for remark in found.remarks:
        print_text(remark)
    counts = found.label_counts
    if counts is not None and len(counts.labels) <= SHOWN_LABELS:
        print_tables([label_table(counts)])
    print_tables(part_tables(found))
    if found.tokens:
        print_text(f"{found.tokens:,} tokens of {len(found.rows)} rows in {found.seconds:.0f} s")
    elif not found.is_graded:
        print_text(f"{len(found.rows):,} rows of {data} in {found.seconds:.0f} s")
    for problem in found.problems[:5]:
        print_text(f"score 0: {problem}")
    if found.problems:
        print_text(f"{len(found.problems)} replies without a grade have score 0")
    if output is not None:
        print_written(len(found.records), "replies", output)


def judge(
    data: RowSource,
    judge: JudgeSource,
    *,
    human: str = "chosen",
    columns: Mapped = None,
    reporter: Reporter | None = None,
) -> JudgeAgreement:
    """Measure how far a judge agrees with people.

    The judge compares the chosen with the rejected reply, or the best with the worst ranked reply.

    Args:
        data: Rows with replies that people chose or ranked.
        judge: Model, https://host/v1#model, or a TOML file.
        human: Column of the replies that people chose or ranked.
        columns: Column of a key, e.g. prompt=question; repeatable.
        reporter: Receives progress; silent if not given.

    Returns:
        Agreement, consistency and biases of the judge, and ``verdict()``.

    Raises:
        RefusedInput: for rows without two compared replies.
    """
    with heavy_imports():
        from luthier.data.rows import load_rows
        from luthier.data.shapes.preferences import Preference, RankedReplies
        from luthier.engine.metrics import Reporter
        from luthier.evaluation.judges import check_pairs, measure_agreement
        from luthier.workflows.evaluate import open_graders

    reporter = reporter or Reporter()
    names = dict(columns or {})
    if human not in (*Preference.keys, *RankedReplies.keys, *names.values()):
        names["chosen"] = human
    pairs = check_pairs(load_rows(data, names))
    # The judge sees each pair in both orders.
    ruler = open_graders({"judge": resolve_judge(judge)}, 2 * len(pairs), reporter.note)["judge"]
    return measure_agreement(
        ruler, pairs, lambda done: reporter.progress(done, len(pairs), "judge")
    )


def show_agreement(found: JudgeAgreement) -> None:
    """Print the verdict on the judge."""
    print_text(found.verdict())
    if found.unread:
        print_text(f"{found.unread:,} verdicts without scores count one half")


def resolve_judge(judge: Spec) -> Ruler:
    """Return the judge for a model id, a TOML file or a table.

    Raises:
        RecipeError: for a grader that does not compare replies.
    """
    from luthier.graders import Ruler

    if isinstance(judge, str) and not judge.endswith(".toml"):
        judge = {"method": "ruler", "model": judge}
    found = resolve_graders([judge], {}) or {}
    (ruler, *others) = found.values()
    if others or not isinstance(ruler, Ruler):
        raise RecipeError("the judge must be a model or a single grader of method ruler")
    return ruler


def resolve_graders(
    graders: Sequence[Spec] | Mapping[str, Spec] | None, settings: Mapping[str, Any]
) -> dict[str, Grader] | None:
    """Return graders by name, with ``settings`` such as ``number.tolerance``; ``None`` for the
    default.

    Raises:
        RecipeError: for an unknown grader or setting.
    """
    from luthier.graders import parse_graders, read_graders
    from luthier.recipe import assign

    if graders is None and not settings:
        return None
    specs: dict[str, Any] = {}
    if isinstance(graders, Mapping):
        specs |= graders
    else:
        for each in graders or ["exact"]:
            if isinstance(each, str):
                specs |= read_graders(Path(each)) if each.endswith(".toml") else {each: each}
            else:
                specs |= parse_graders([each])
    for key, value in settings.items():
        name = key.partition(".")[0]
        if name not in specs:
            raise RecipeError(
                f"{key}: no grader has the name {name}. Graders: {', '.join(specs)}", setting=key
            )
        assign(specs, key.split("."), value)
    return parse_graders(specs)
