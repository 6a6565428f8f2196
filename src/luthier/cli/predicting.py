"""``luthier predict``, and ``luthier evaluate`` for models that read."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.cli.console import (
    check_output,
    counting,
    heavy_imports,
    note,
    print_json,
    print_text,
    wrote,
)
from luthier.errors import DataError, Problem, RecipeError, data_errors
from luthier.printable import printable_json
from luthier.types import Row

if TYPE_CHECKING:
    from luthier.evaluation.evaluate import Evaluation
    from luthier.serving.long_rows import LongRows
    from luthier.store.models import StoredModel


def predict(
    model_id: str, text: str | None, source: Path | None, target: Path | None, as_json: bool
) -> None:
    """Label one text, or a file of them."""
    from luthier.files import write_bytes
    from luthier.serving.prediction import Predictor
    from luthier.store.models import find

    if (text is None) == (source is None):
        raise RecipeError("give one text, or --input FILE with many")
    if target is not None and source is None:
        raise RecipeError("--output goes with --input")
    check_output(target)
    rows = read_inputs(source) if source else [_row("the command line", 1, text or "")]
    with heavy_imports():
        predictor = Predictor.open(find(model_id))
    started = time.monotonic()
    with counting(len(rows), "predict", as_json) as done:
        answers = predictor.answers(rows, done)
    lines = [
        json.dumps({**_given(row), **answer}, ensure_ascii=False) + "\n"
        for row, answer in zip(rows, answers, strict=True)
    ]
    if target is not None:
        write_bytes(target, "".join(lines).encode())
    if as_json:
        seconds = time.monotonic() - started
        report: dict[str, Any] = {"model": model_id, "rows": len(rows), "seconds": seconds}
        print_json(report | ({"output": str(target)} if target else {"answers": answers}))
    elif source is None:
        print_text(_shown(_given(rows[0]), answers[0]), end="")
    elif target is None:
        sys.stdout.write(printable_json("".join(lines)))
    else:
        wrote(len(lines), "answers", target)


def evaluate(
    stored: StoredModel,
    data: str,
    rows: Sequence[Row],
    target: Path | None,
    as_json: bool,
    long_rows: LongRows,
) -> None:
    """Compare a model's labels, ratings, tags or preferences with those of held-out rows."""
    from luthier.serving.prediction import Predictor

    with heavy_imports():
        predictor = Predictor.open(stored)
    started = time.monotonic()
    with counting(len(rows), "evaluate", as_json) as done:
        found = predictor.scores(rows, done, long_rows)
    answers = found.answers
    if not rows or rows[0].reply is None:
        answers = [
            {**_given(row), "expected": _truth(row), **answer}
            for row, answer in zip(found.measured.rows, answers, strict=True)
        ]
    seconds = time.monotonic() - started
    _report(stored, data, found.evaluation(), answers, target, seconds, as_json)


def prefer(
    stored: StoredModel,
    data: str,
    rows: Sequence[Row],
    target: Path | None,
    as_json: bool,
    long_rows: LongRows,
) -> None:
    """How often a model that writes ranks held-out answers as people did."""
    from luthier.serving.preferring import preference_scores

    started = time.monotonic()
    with heavy_imports(), counting(len(rows), "evaluate", as_json) as done:
        found = preference_scores(stored, rows, done, long_rows)
    seconds = time.monotonic() - started
    _report(stored, data, found.evaluation(), found.answers, target, seconds, as_json)


def _report(
    stored: StoredModel,
    data: str,
    found: Evaluation,
    answers: Sequence[dict[str, Any]],
    target: Path | None,
    seconds: float,
    as_json: bool,
) -> None:
    """Write the answers, print the scores."""
    from luthier.files import write_bytes
    from luthier.serving.long_rows import long_rows_summary

    if target is not None:
        lines = [json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers]
        write_bytes(target, "".join(lines).encode())
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
    if target is not None:
        wrote(len(answers), "answers", target)


@data_errors("nothing was predicted")
def read_inputs(source: Path) -> list[Row]:
    """Rows of a JSONL file with ``text``, ``tokens``, or ``prompt`` and ``completion``; or lines.

    Labels and other keys are passed over. Of plain text (``.txt``) each line is one text.
    """
    from luthier.data.read import read_records

    problems: list[Problem] = []
    rows: list[Row] = []
    for line, record in read_records(source, problems):
        if source.suffix.lower() == ".txt":
            texts = enumerate(str(record["text"]).splitlines(), line)
            rows += [_row(str(source), number, text) for number, text in texts if text.strip()]
            continue
        text, tokens = record.get("text"), record.get("tokens")
        prompt, reply = record.get("prompt"), record.get("completion")
        if isinstance(text, str) and text.strip():
            rows.append(_row(str(source), line, text))
        elif isinstance(prompt, str) and prompt.strip() and isinstance(reply, str):
            rows.append(Row(str(source), line, prompt=prompt, completion=reply))
        elif (
            isinstance(tokens, list)
            and tokens
            and all(isinstance(t, str) and t.strip() for t in tokens)
        ):
            rows.append(Row(str(source), line, text=" ".join(tokens), tokens=tuple(tokens)))
        else:
            problems.append(
                Problem(
                    str(source),
                    line,
                    "text.missing",
                    "the row has neither a text under `text`, nor a list of words under `tokens`, "
                    "nor a prompt with a completion.",
                    'Write {"text": "…"} on each line.',
                )
            )
    if problems:
        raise DataError(problems)
    return rows


def _row(file: str, line: int, text: str) -> Row:
    """A text, also as words for models that tag them."""
    if not text.strip():
        raise RecipeError("the text is empty")
    return Row(file, line, text=text, tokens=tuple(text.split()))


def _given(row: Row) -> dict[str, Any]:
    if row.prompt is not None:
        return {"prompt": row.prompt, "completion": row.completion}
    return {"tokens": list(row.tokens or ())} if row.text is None else {"text": row.text}


def _truth(row: Row) -> Any:
    tags = None if row.tags is None else list(row.tags)
    given = (tags, row.rating, row.label, row.positive)
    return next((truth for truth in given if truth is not None), None)


def _shown(given: dict[str, Any], answer: dict[str, Any]) -> str:
    """One answer for a person: the label with the likeliest others, the rating, or tagged words."""
    if "tags" in answer:
        words = zip(given["text"].split(), answer["tags"], strict=True)
        return " ".join(w if tag == "O" else f"{w}[{tag}]" for w, tag in words) + "\n"
    if "embedding" in answer:
        return json.dumps(answer["embedding"]) + "\n"
    if "reward" in answer:
        return f"{answer['reward']:.3f}\n"
    if "rating" in answer:
        return f"{answer['rating']:.3f}\n"
    best = sorted(answer["scores"].items(), key=lambda item: -item[1])[:5]
    return "".join(f"{p:6.1%}  {name}\n" for name, p in best)
