"""``luthier predict``."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from luthier.cli.console import check_output, heavy_imports, print_json, print_text, print_written
from luthier.cli.options import Json
from luthier.errors import DataError, Problem, RecipeError, data_errors
from luthier.printable import printable_json

if TYPE_CHECKING:
    from luthier.types import Row


def predict(
    model: Annotated[str, typer.Argument(help="Custom model that gives labels.")],
    text: Annotated[str | None, typer.Argument(help="What to label.")] = None,
    input_: Annotated[
        Path | None, typer.Option("--input", help="JSONL of texts, or .txt with one a line.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="JSONL of texts and answers.")] = None,
    json_: Json = False,
) -> None:
    """Label, rate or tag one text, or a file of texts."""
    from luthier.files import write_bytes
    from luthier.serving.prediction import Predictor
    from luthier.store.models import find

    if (text is None) == (input_ is None):
        raise RecipeError("give one text, or --input FILE with many")
    if output is not None and input_ is None:
        raise RecipeError("--output goes with --input")
    check_output(output)
    rows = _read_inputs(input_) if input_ else [_row("the command line", 1, text or "")]
    with heavy_imports():
        from luthier.cli.progress import show_progress
        from luthier.sdk.model import row_input

        predictor = Predictor.open(find(model))
    started = time.monotonic()
    with show_progress(len(rows), "predict", json_) as done:
        answers = predictor.answers(rows, done)
    lines = "".join(
        json.dumps({**row_input(row), **answer}, ensure_ascii=False) + "\n"
        for row, answer in zip(rows, answers, strict=True)
    )
    if output is not None:
        write_bytes(output, lines.encode())
    if json_:
        seconds = time.monotonic() - started
        report: dict[str, Any] = {"model": model, "rows": len(rows), "seconds": seconds}
        print_json(report | ({"output": str(output)} if output else {"answers": answers}))
    elif input_ is None:
        print_text(_render(row_input(rows[0]), answers[0]), end="")
    elif output is None:
        sys.stdout.write(printable_json(lines))
    else:
        print_written(len(rows), "answers", output)


@data_errors("nothing was predicted")
def _read_inputs(source: Path) -> list[Row]:
    """Rows of a JSONL file with ``text``, ``tokens``, or ``prompt`` and ``completion``; or lines.

    Labels and other keys are passed over. Of plain text (``.txt``) each line is one text.
    """
    from luthier.data.read import read_records
    from luthier.data.shapes import PromptCompletion, TaggedWords

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
            rows.append(PromptCompletion(str(source), line, prompt, reply))
        elif (
            isinstance(tokens, list)
            and tokens
            and all(isinstance(t, str) and t.strip() for t in tokens)
        ):
            rows.append(TaggedWords(str(source), line, tuple(tokens), None))
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
    """A text that is not empty."""
    from luthier.data.shapes import RawText

    if not text.strip():
        raise RecipeError("the text is empty")
    return RawText(file, line, text)


def _render(given: dict[str, Any], answer: dict[str, Any]) -> str:
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
