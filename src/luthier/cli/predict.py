"""``luthier predict``."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from luthier.cli.console import (
    check_json_lines,
    check_output,
    heavy_imports,
    is_standard_output,
    note,
    print_json,
    print_text,
    print_written,
    write_json,
)
from luthier.cli.options import Columns, InferenceProcesses, Json, Overwrite, RayAddress, RayGpus
from luthier.errors import RecipeError

if TYPE_CHECKING:
    from luthier.data.parsing import Record
    from luthier.library.models import StoredModel
    from luthier.types import Row

SHOWN = 5
"""Classes, or numbers of an embedding, that a terminal shows of each text."""


def predict(
    model: Annotated[
        str,
        typer.Argument(
            help="Model that gives labels, ratings, tags, embeddings or text of sounds and images."
        ),
    ],
    text: Annotated[
        str | None,
        typer.Argument(help="What to read: a text, or the path of an image or a sound."),
    ] = None,
    input_: Annotated[
        str | None,
        typer.Option(
            "--input",
            help="Many: a file of rows in any form (of .txt each line is one), a folder or archive of "
            "images or sounds, a CSV of times and values.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="JSONL of the same rows, each with `predicted`; - for standard output."),
    ] = None,
    columns: Columns = None,
    top: Annotated[
        int | None,
        typer.Option(min=1, help="Likeliest classes to show; 5 in a terminal, all in files."),
    ] = None,
    overwrite: Overwrite = False,
    processes: InferenceProcesses = None,
    ray_address: RayAddress = None,
    ray_gpus: RayGpus = 0.0,
    json_: Json = False,
) -> None:
    """Predict labels, ratings, tags or transcriptions.

    Rows of a file keep all their fields.
    """
    with heavy_imports(model):
        from luthier.cli.batch_inference import BatchInference
        from luthier.data.rows import PREDICTED, input_row, load_inputs
        from luthier.data.writers import json_records, write_packed
        from luthier.inference.prediction import Predictor
        from luthier.library.models import check_active, find
        from luthier.objectives.base import threshold_of
        from luthier.recipe import parse_columns
        from luthier.workflows.inference_tasks import PredictTask, anomaly_counts, prediction_lines

    shows_all = is_standard_output(output)
    output = None if shows_all else output
    if (text is None) == (input_ is None):
        raise RecipeError("give one text, or --input FILE with many")
    if input_ is None and (output is not None or columns):
        raise RecipeError(f"--{'map' if output is None else 'output'} goes with --input")
    if text is not None and not text.strip():
        raise RecipeError("the text is empty")
    if text is not None and _holds_rows(text):
        raise RecipeError(
            f"{text} is a file or folder of rows: give it as --input {shlex.quote(text)}"
        )
    check_json_lines(output)
    check_output(output, input_, overwrite=overwrite)
    batch = BatchInference.of_options(input_, output, processes, ray_address, ray_gpus)
    if batch is not None:
        stored = check_active(find(model, is_able=Predictor.is_able))
        objective = Predictor.check(stored)
        _note_left_out_classes(stored)
        own = parse_columns(columns)
        task = PredictTask(model=stored.id, source=str(input_), columns=own, top=top)
        found, report = batch.answer(task)
        if json_:
            print_json(report)
        else:
            _print_written(found.rows, found.counts, batch.output, threshold_of(objective))
        return
    rows: list[tuple[Record, Row]]
    if input_ is None:
        rows = [({}, input_row(text or "", "the command line"))]
    else:
        rows = load_inputs(input_, parse_columns(columns), PREDICTED)
    records = json_records(rows)
    with heavy_imports():
        from luthier.cli.progress import show_progress

        stored = check_active(find(model, is_able=Predictor.is_able))
        predictor = Predictor.open(stored)
    _note_left_out_classes(stored)
    in_terminal = output is None and not shows_all and (text or sys.stdout.isatty())
    if top is None and not json_ and in_terminal:
        top = SHOWN
    threshold = threshold_of(predictor.objective)
    started = time.monotonic()
    with show_progress(len(rows), "predict") as done:
        answers = predictor.answers([row for _, row in rows], done, top)
    lines = prediction_lines(records, answers)
    if output is not None:
        write_packed(output, lines.encode())
    if json_:
        seconds = time.monotonic() - started
        report = {"model": model, "rows": len(rows), "seconds": seconds}
        print_json(report | ({"output": str(output)} if output else {"answers": answers}))
    elif text is not None:
        print_text(_render(answers[0], threshold), end="")
    elif output is None:
        write_json(lines)
    else:
        _print_written(len(rows), anomaly_counts(answers), output, threshold)


def _note_left_out_classes(stored: StoredModel) -> None:
    from luthier.library.models import leaves_classes_out

    if leaves_classes_out(stored):
        note(f"the classes of {stored.id} are left out, as no job of luthier made them: what follows "
             "is the embedding of each row")  # fmt: skip


def _print_written(
    rows: int, counts: Mapping[str, int], output: Path, threshold: float | None
) -> None:
    """Say where the rows are, and how many are anomalous where the model says that."""
    print_written(rows, "rows", output)
    if counts["verdicts"]:
        text = f"{counts['anomalous']:,} of them are anomalous (a score above {threshold:.3f})"
        if short := counts["not_judged"]:
            text += f"; {short:,} have too few values before them to be judged"
        print_text(text)


def _holds_rows(text: str) -> bool:
    """Whether ``text`` is the path of something that holds more than one row."""
    from luthier.data.inputs import is_media

    try:
        path = Path(text)
        return path.is_dir() or (path.is_file() and not is_media(path.name))
    except (OSError, ValueError):  # a text longer than a name can be, or with a NUL
        return False


def _render(answer: dict[str, Any], threshold: float | None) -> str:
    """One answer for a person: the likeliest labels, the rating, or entities and where they stand."""
    if "tags" in answer:
        found = [
            f"{e['label']}: {json.dumps(e['text'], ensure_ascii=False)} [{e['start']}:{e['end']}]\n"
            for e in answer["entities"]
        ]
        return "".join(found) or "(no entities)\n"
    if "text" in answer:
        return f"{answer['text'] or '(nothing was read)'}\n"
    if "embedding" in answer:
        if not sys.stdout.isatty():
            return json.dumps(answer["embedding"]) + "\n"
        numbers = ", ".join(f"{x:.3f}" for x in answer["embedding"][:SHOWN])
        return f"{len(answer['embedding'])} numbers: {numbers}, … (--json prints all)\n"
    if "reward" in answer:
        return f"{answer['reward']:.3f}\n"
    if "rating" in answer:
        return f"{answer['rating']:.3f}\n"
    if "score" in answer:
        verdicts = {name: answer[name] for name in ("anomalous", "similar") if name in answer}
        said = [
            f"{name if value else f'not {name}'} ({'above' if value else 'not above'} {threshold:.3f})"
            for name, value in verdicts.items()
        ]
        return "  ".join([f"{answer['score']:.3f}", *said]) + "\n"
    return "".join(f"{p:6.1%}  {name}\n" for name, p in answer["scores"].items())
