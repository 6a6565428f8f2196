"""``luthier evaluate``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from luthier.cli.console import (
    check_output,
    note,
    print_json,
    print_text,
    print_written,
    write_page,
)
from luthier.cli.options import (
    Attach,
    Columns,
    Graders,
    GraderSettings,
    Json,
    LongRows,
    MaxTokens,
)
from luthier.errors import RecipeError
from luthier.escaping import one_line

if TYPE_CHECKING:
    from luthier.evaluation.evaluate import Evaluation
    from luthier.graders import Grader, Spec


def evaluate(
    model: Annotated[
        str, typer.Argument(help="Model id, local directory or hub id; with --judge the rows.")
    ],
    data: Annotated[
        str | None,
        typer.Argument(help="Prompts and replies, labelled texts, or raw text; file or folder."),
    ] = None,
    grader: Graders = None,
    set_: GraderSettings = None,
    on_grader_error: Annotated[
        Literal["fail", "zero"],
        typer.Option(
            help="What a reply that cannot be graded does: fail, or score zero and be counted."
        ),
    ] = "fail",
    max_tokens: MaxTokens = 128,
    output: Annotated[Path | None, typer.Option(help="Write every answer as JSONL.")] = None,
    turns: Annotated[
        Literal["last", "calls", "all"],
        typer.Option(
            help="Replies of a conversation to ask for: the last, each that calls tools, or all."
        ),
    ] = "last",
    slice_: Annotated[
        list[str] | None,
        typer.Option(
            "--slice",
            metavar="<label|length|language|COLUMN>",
            help="Scores of parts of the rows, too; again for more.",
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(help="Write slices, labels, certainty and the worst rows as one HTML page."),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(help="Compare a judge with people: a model, https://host/v1#model, or TOML."),
    ] = None,
    human: Annotated[
        str | None,
        typer.Option(metavar="COLUMN", help="Column of the replies that people chose or ranked."),
    ] = None,
    attach: Attach = False,
    columns: Columns = None,
    long_rows: LongRows = "error",
    json_: Json = False,
) -> None:
    """Evaluate a model on held-out rows.

    Replies are graded, labels are scored, and raw text gives a perplexity.
    """
    from luthier.cli.progress import show_progress
    from luthier.recipe import parse_columns
    from luthier.sdk.evaluation import evaluate as run

    if judge is not None or human is not None:
        if judge is None or human is None:
            raise RecipeError(
                "a judge is compared with people: give both --judge and --human COLUMN"
            )
        if data is not None or any((grader, set_, output, slice_, html, attach)):
            raise RecipeError(
                "--judge compares replies that stand in the rows: give the rows alone, without a "
                "model, graders or outputs"
            )
        _evaluate_judge(model, judge, human, columns, json_)
        return
    if data is None:
        raise RecipeError(f"give rows to evaluate {model} on: luthier evaluate {model} ROWS")
    graders = parse_grader_options(grader or ["exact"], set_ or ()) if grader or set_ else None
    check_output(output, data)
    check_output(html, data)
    with show_progress(0, "evaluate") as done:
        found = run(
            model,
            data,
            graders,
            max_tokens,
            on_grader_error,
            note,
            long_rows or "error",
            turns=turns,
            columns=parse_columns(columns),
            slices=slice_ or (),
            on_progress=done,
            attach=attach,
        )
    if output is not None:
        from luthier.files import write_bytes

        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in found.records]
        write_bytes(output, "".join(lines).encode())
    if html is not None:
        from luthier.evaluation.report_page import page

        write_page(html, page(found, model, data))
    if text := found.long_rows_text:
        note(text)
    if json_:
        print_json({"model": model, **found.plain(), "seconds": found.seconds})
        return
    if grader and not found.is_graded:
        note("the graders were not used: they grade replies, and this is measured otherwise")
    spent = f" of {len(found.rows):,} rows ({found.seconds:.0f} s)" if found.is_graded else ""
    for name, score in found.scores.items():
        style = ".2%" if found.row_scores[name].is_share else ".4f"
        error = f" ± {found.errors[name]:{style}}" if name in found.errors else ""
        print_text(f"{name}: {score:{style}}{error}{spent}")
    if found.errors:
        name, (low, high) = next(iter(found.intervals.items()))
        style = ".1%" if found.row_scores[name].is_share else ".3g"
        print_text(
            f"± is one standard error; with 95 % confidence {name} is between {low:{style}} and "
            f"{high:{style}}"
        )
    for remark in found.remarks:
        print_text(remark)
    _print_slices(found)
    if found.tokens:
        print_text(f"{found.tokens:,} tokens of {len(found.rows)} texts in {found.seconds:.0f} s")
    elif not found.is_graded:
        print_text(f"{len(found.rows):,} rows of {data} in {found.seconds:.0f} s")
    for problem in found.problems[:5]:
        print_text(f"scored 0: {problem}")
    if found.problems:
        print_text(f"{len(found.problems)} replies could not be graded and score 0")
    if output is not None:
        print_written(len(found.records), "answers", output)


def _print_slices(found: Evaluation) -> None:
    """A line a slice: its first score, and whether it is unlike that of the other rows."""
    names = [one_line(each.value) for each in found.slices]
    width = min(40, max(map(len, names), default=0))
    by = ""
    for label, each in zip(names, found.slices, strict=True):
        if each.by != by:
            by = each.by
            print_text(f"by {by}:")
        name, score = next(iter(each.scores.items()))
        low, high = each.interval
        apart = "  unlike the others, by more than chance" if each.stands_out else ""
        style = ".1%" if found.row_scores[name].is_share else ".3f"
        rows = f"{each.rows:>6,} row{' ' if each.rows == 1 else 's'}"
        interval = f"({low:{style}} to {high:{style}})"
        print_text(f"  {label:<{width}}  {rows}  {name} {score:{style}} {interval}{apart}")


def _evaluate_judge(
    rows: str, judge: str, human: str, columns: list[str] | None, as_json: bool
) -> None:
    """Print how far a judge agrees with people."""
    from luthier.cli.progress import show_progress
    from luthier.recipe import parse_columns
    from luthier.sdk.evaluation import judge_agreement

    spec = parse_judge_option(judge)
    with show_progress(0, "judge") as done:
        found = judge_agreement(
            rows, spec, human, note, columns=parse_columns(columns), on_progress=done
        )
    if as_json:
        print_json({"data": rows, **found.plain()})
        return
    print_text(found.verdict())
    if found.unread:
        print_text(f"{found.unread:,} verdicts had no scores and count one half")


def parse_judge_option(value: str) -> Spec:
    """A model that judges, or the grader of a TOML file.

    Raises:
        RecipeError: for a file with more graders than one.
    """
    if not value.endswith(".toml"):
        return value
    graders = list(parse_grader_options([value], ()).values())
    if len(graders) != 1:
        raise RecipeError(f"{value} has {len(graders)} graders; the judge is one, of method ruler")
    return graders[0]


def parse_grader_options(names: Sequence[str], assignments: Sequence[str]) -> dict[str, Grader]:
    """Graders by name or from TOML files, with fields from ``NAME.FIELD=VALUE``."""
    from luthier.graders import parse_graders, read_graders
    from luthier.recipe import set_field

    specs: dict[str, Spec] = {}
    for name in names:
        specs |= read_graders(Path(name)) if name.endswith(".toml") else {name: name}
    for assignment in assignments:
        if assignment.partition("=")[0].partition(".")[0].strip() not in specs:
            raise RecipeError(
                f"--set takes GRADER.FIELD=VALUE of one of {', '.join(specs)}; got {assignment!r}"
            )
        set_field(specs, assignment)
    return parse_graders(specs)
