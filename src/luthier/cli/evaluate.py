"""``luthier evaluate``."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from luthier.cli.console import check_output, heavy_imports, note, print_json, print_text, wrote
from luthier.cli.options import Columns, Json, LongRows
from luthier.errors import RecipeError, data_errors

if TYPE_CHECKING:
    from luthier.graders import Grader
    from luthier.store.models import StoredModel
    from luthier.types import Row


@data_errors("nothing was evaluated")
def evaluate(
    model: Annotated[str, typer.Argument(help="Model id, local directory or hub id.")],
    data: Annotated[
        str,
        typer.Argument(help="Prompts and replies, labelled texts, or raw text; file or folder."),
    ],
    grader: Annotated[
        list[str] | None,
        typer.Option(
            help="A grader's name, such as exact, or a TOML file of graders; again for more."
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME.FIELD=VALUE", help="A field of a grader, by its name."),
    ] = None,
    on_grader_error: Annotated[
        Literal["fail", "zero"],
        typer.Option(
            help="What a reply that cannot be graded does: fail, or score zero and be counted."
        ),
    ] = "fail",
    max_tokens: Annotated[int, typer.Option(help="Tokens of a reply at most.")] = 128,
    output: Annotated[Path | None, typer.Option(help="Write every answer as JSONL.")] = None,
    columns: Columns = None,
    long_rows: LongRows = "error",
    json_: Json = False,
) -> None:
    """Grade a model's replies to held-out rows, or its labels; perplexity where they are raw text."""
    from luthier.data.rows import load_rows
    from luthier.evaluation.evaluate import check, check_shapes
    from luthier.recipe import parse_columns
    from luthier.serving.grading import open_graders
    from luthier.serving.long_rows import long_rows_summary
    from luthier.store.models import find, objective_of

    graders = _parse_graders(grader or ["exact"], set_ or ())
    check_output(output)
    rows = load_rows(data, parse_columns(columns or ()))
    stored = find(model)
    objective = objective_of(stored)
    check_shapes(rows, objective)
    cut: Any = long_rows or "error"
    if objective.reads or (rows and rows[0].reply is not None):
        _evaluate_predictions(stored, data, rows, output, json_, cut)
        return
    if output is None and all(row.text is not None for row in rows):
        _evaluate_perplexity(stored, rows, json_)
        return
    check(rows, graders)
    with heavy_imports():
        from luthier.cli.progress import counting
        from luthier.serving.generation import Generator
        from luthier.serving.measuring import measure

        generator = Generator.open(stored)
    graders = open_graders(graders, len(rows), note)
    started = time.monotonic()
    with counting(len(rows), "evaluate", json_) as done:
        found = measure(generator, rows, graders, max_tokens, done, on_grader_error, cut)
    if text := long_rows_summary(found):
        note(text)
    seconds = time.monotonic() - started
    fields = ("prompt", "reply", "expected", "scores")
    answers = [{name: getattr(answer, name) for name in fields} for answer in found.answers]
    _write(answers, output)
    if json_:
        print_json({"model": model, **found.plain(), "seconds": seconds})
        return
    for name, score in found.scores.items():
        print_text(f"{name}: {score:.2%} of {found.rows} rows ({seconds:.0f} s)")
    for problem in found.problems[:5]:
        print_text(f"scored 0: {problem}")
    if found.problems:
        print_text(f"{len(found.problems)} replies could not be graded and score 0")
    if output is not None:
        wrote(len(answers), "answers", output)


def _parse_graders(names: Sequence[str], assignments: Sequence[str]) -> dict[str, Grader]:
    """Graders by name or from TOML files, with fields from ``NAME.FIELD=VALUE``."""
    from luthier.graders import Spec, graders_named, read_graders
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
    return graders_named(specs)


def _evaluate_predictions(
    stored: StoredModel,
    data: str,
    rows: Sequence[Row],
    output: Path | None,
    as_json: bool,
    long_rows: Literal["error", "drop", "truncate"],
) -> None:
    """Compare labels, ratings, tags or embeddings, or how judged answers are ranked, with the rows."""
    from luthier.cli.predict import input_of
    from luthier.cli.progress import counting
    from luthier.serving.long_rows import long_rows_summary
    from luthier.store.models import objective_of

    with heavy_imports():
        from luthier.serving.prediction import Predictor
        from luthier.serving.preferring import preference_scores

        predictor = Predictor.open(stored) if objective_of(stored).reads else None
    started = time.monotonic()
    with counting(len(rows), "evaluate", as_json) as done:
        if predictor is None:
            scored = preference_scores(stored, rows, done, long_rows)
        else:
            scored = predictor.scores(rows, done, long_rows)
    seconds = time.monotonic() - started
    answers = scored.answers
    if predictor is not None and rows[0].reply is None:
        answers = [
            {**input_of(row), "expected": _expected(row), **answer}
            for row, answer in zip(scored.measured.rows, answers, strict=True)
        ]
    _write(answers, output)
    found = scored.evaluation()
    if as_json:
        print_json({"model": stored.id, **found.plain(), "seconds": seconds})
        return
    for name, score in found.scores.items():
        print_text(f"{name}: {score:.4f}")
    for remark in found.remarks:
        print_text(remark)
    print_text(f"{found.rows:,} rows of {data} in {seconds:.0f} s")
    if text := long_rows_summary(found):
        note(text)
    if output is not None:
        wrote(len(answers), "answers", output)


def _expected(row: Row) -> Any:
    """What a row says that the model should have answered."""
    tags = None if row.tags is None else list(row.tags)
    values = (tags, row.rating, row.label, row.positive)
    return next((value for value in values if value is not None), None)


def _evaluate_perplexity(stored: StoredModel, rows: Sequence[Row], as_json: bool) -> None:
    """Raw text has no replies to grade: how well is each token predicted?"""
    from luthier.serving.measuring import perplexity

    started = time.monotonic()
    with heavy_imports():
        found = perplexity(stored, rows).plain()
    seconds = time.monotonic() - started
    if as_json:
        print_json({"model": stored.id, "rows": len(rows), **found, "seconds": seconds})
        return
    for name, score in found["scores"].items():
        print_text(f"{name}: {score:.4f}")
    print_text(f"{found['tokens']:,} tokens of {len(rows)} texts in {seconds:.0f} s")


def _write(answers: Sequence[dict[str, Any]], output: Path | None) -> None:
    from luthier.files import write_bytes

    if output is not None:
        lines = [json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers]
        write_bytes(output, "".join(lines).encode())
