"""``luthier predict``."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier import __version__
from luthier.cli.inference.batch_inference import RowAnswers, RowProcesses, answer_rows
from luthier.cli.terminal.console import (
    check_json_lines,
    check_output,
    heavy_imports,
    is_standard_output,
    print_text,
    print_written,
    write_json,
    write_page,
)
from luthier.cli.terminal.options import Mapped, OptionalAtLeastOne, RayAddress
from luthier.errors import RecipeError, check_at_least_one
from luthier.pages import PAGE, Table, Tabular, render_page, shorten, summary_page

if TYPE_CHECKING:
    from luthier.engine.metrics import Reporter
    from luthier.tasks import Task

MARKED_ROWS = 500
"""Maximum number of rows in a page of marked entities."""
SHOWN_ALARMS = 20
"""Maximum number of printed alarms."""
SHOWN = 5
"""Maximum number of printed classes, or of printed numbers of an embedding."""


@dataclass(frozen=True, repr=False)
class Predictions(Tabular):
    """Predictions for a text or for rows, with the model's task and decision threshold."""

    answers: RowAnswers
    task: Task
    threshold: float | None

    def summary(self) -> list[str]:
        """Return the number of rows and the first rows."""
        lines = [shorten("  ".join(filter(None, pair))) for pair in self._first(3)]
        return [*self._title(), *lines]

    def html(self, layout: str = PAGE) -> str:
        """Return a table of the first rows as a page or fragment."""
        title, *lines = self._title()
        table = Table.of("First rows", {"prediction": "text", "row": "text"}, self._first(10))
        return summary_page(title, lines, layout, tables=[table] if table.rows else [])

    def _title(self) -> list[str]:
        answers = self.answers
        place = [] if answers.output is None else [f"written to {answers.output}"]
        count = f"{answers.rows:,} row{'s' * (answers.rows != 1)}"
        return [f"Predictions of {answers.model} for {count}", *place]

    def _first(self, count: int) -> list[tuple[str, str]]:
        """Return the likeliest prediction and the first text of the first rows."""
        found = list[tuple[str, str]]()
        for line in self.answers.lines.splitlines()[:count]:
            row = json.loads(line)
            shown = self.task.show(row.pop("predicted"), self.threshold, 1).strip()
            found.append((shown, next((v for v in row.values() if isinstance(v, str)), "")))
        return found

    def to_rows(self) -> list[dict[str, Any]]:
        """Return each row with ``predicted``, also from the file of the result."""
        from luthier.data.files.read import read_records

        if (output := self.answers.output) is not None:
            return [dict(record) for _, record in read_records(output, [])]
        found: list[dict[str, Any]] = self.answers.plain()["answers"]
        return found

    def plain(self) -> dict[str, Any]:
        """Return the predictions or their file, and the alarms of a series, as JSON values."""
        return self.answers.plain()


def predict(
    model: str,
    text: str | None = None,
    *,
    input: str | None = None,
    output: Path | None = None,
    columns: Mapped = None,
    top: OptionalAtLeastOne = None,
    least_certain: OptionalAtLeastOne = None,
    explain: bool = False,
    html: Path | None = None,
    overwrite: bool = False,
    processes: OptionalAtLeastOne = None,
    ray_address: RayAddress = None,
    ray_gpus: float = 0.0,
    reporter: Reporter | None = None,
) -> Predictions:
    """Predict labels, ratings, tags or transcriptions.

    Rows of a file keep all their fields, and ``predicted`` is added. With --processes or --ray-address,
    several processes share the rows, and the same command resumes after an interruption.

    Args:
        model: Id of a classifier, tagger, encoder or reader.
        text: A text, or the path of an image or audio file.
        input: File of rows, media folder or time series, not a text.
        output: File for the result (JSONL); standard output by default.
        columns: Column of a key, e.g. prompt=question; repeatable.
        top: Number of classes; 5 for a text, all for a file by default.
        least_certain: Number of rows to label next: the least certain only.
        explain: Add the contribution of each word or image cell.
        html: Page with marked entities; with --explain, words or parts.
        overwrite: Replace an existing file.
        processes: Processes that share the rows of a file.
        ray_address: Head of a Ray cluster that runs the processes.
        ray_gpus: GPUs that each process reserves on a node.
        reporter: Receives progress; silent if not given.

    Returns:
        The predictions, or the file with the predictions.

    Raises:
        RefusedInput: for unreadable rows, or a model that generates text or images.
    """
    with heavy_imports():
        from luthier.data.inputs import is_media
        from luthier.data.prompts import input_row
        from luthier.engine.metrics import Reporter
        from luthier.inference.prediction import Predictor
        from luthier.library.models import check_active, find, ignores_classes
        from luthier.workflows.inference_tasks import PredictTask, predict_rows, prediction_lines

    reporter = reporter or Reporter()
    output = None if is_standard_output(output) else output
    if (text is None) == (input is None):
        raise RecipeError("a text is missing: name a text or --input FILE, not both")
    if input is None and (output is not None or columns):
        raise RecipeError(f"--{'map' if output is None else 'output'} needs --input")
    if text is not None and not text.strip():
        raise RecipeError("the text is empty")
    if text is not None and _holds_rows(text):
        raise RecipeError(f"{text} is a file or folder of rows. Use --input {shlex.quote(text)}")
    if html is not None and output is not None:
        raise RecipeError("`html` excludes `output`")
    check_at_least_one(top=top, least_certain=least_certain)
    others = {"top": top, "explain": explain, "processes": processes, "ray_address": ray_address}
    if least_certain is not None and (input is None or any(others.values())):
        raise RecipeError(f"`least_certain` needs `input`, and excludes {', '.join(others)}")
    check_json_lines(output)
    check_output(html, input)
    check_output(output, input, overwrite=overwrite)
    shared = RowProcesses(processes, ray_address, ray_gpus)
    is_shared = shared.check(input, output)
    stored = check_active(find(model, is_able=Predictor.is_able))
    objective = Predictor.check(stored)
    is_tagger = objective.task.head == "token_classification"
    if html is not None and not (explain or is_tagger):
        raise RecipeError("`html` marks entities, and needs `explain` for other models")
    if text and is_media(text) and stored.chat.reads != "text" and not Path(text).is_file():
        raise RecipeError(f"There is no file {text}. Check the path for a spelling mistake.")
    threshold = objective.decision_threshold
    if ignores_classes(stored):
        reporter.note(f"{stored.id} has classes of its pre-training only: the output is embeddings")
    work = PredictTask(
        model=stored.id, source=str(input), columns=columns or {}, top=top, explain=explain,
        pictures=html is not None,
    )  # fmt: skip
    if is_shared and output is not None:
        return Predictions(shared.answer(work, output, reporter), objective.task, threshold)
    with heavy_imports():
        if least_certain is not None:
            answers = _least_certain(answer_rows(work, None, reporter), least_certain, output)
        elif input is not None:
            answers = answer_rows(work, output, reporter)
        else:
            row = input_row(text or "", "the command line")
            predictor = Predictor.open(stored, precise=explain)
            found = predict_rows(
                predictor, [row], lambda count: None, top, explain, html is not None
            )
            answers = RowAnswers(
                stored.id,
                1,
                0.0,
                None,
                prediction_lines([{}], found),
            )
    if html is not None:
        page = _explanation_page(answers) if explain else _entity_page(answers, columns or {})
        write_page(html, page, reporter)
    return Predictions(answers, objective.task, threshold)


def _least_certain(answers: RowAnswers, count: int, output: Path | None) -> RowAnswers:
    """Return the ``count`` least certain rows, the least certain first.

    Raises:
        RecipeError: for predictions without scores of labels.
    """
    from luthier.data.files.writers import write_packed
    from luthier.evaluation.labels import certainty
    from luthier.files import json_lines

    rows = [json.loads(line) for line in answers.lines.splitlines()]
    if any(len(row["predicted"].get("scores", ())) < 2 for row in rows):
        raise RecipeError(f"{answers.model} has no scores of several labels. Use a classifier")
    chosen = sorted(rows, key=lambda row: certainty(row["predicted"]))[:count]
    answers = replace(answers, rows=len(chosen), output=output, lines=json_lines(chosen))
    if output is not None:
        write_packed(output, answers.lines.encode())
    return answers


def _entity_page(answers: RowAnswers, columns: Mapping[str, str]) -> str:
    """Return a page with the first sentences and their marked entities."""
    from luthier.evaluation.report_page import MARKS, mark_entities

    rows = [json.loads(line) for line in answers.lines.splitlines()]
    marked = []
    for row in rows[:MARKED_ROWS]:
        found = row["predicted"]
        has_tokens = columns.get("tokens", "tokens") in row
        wanted = row.get(columns.get("tags", "tags")) if has_tokens else None
        marked.append([mark_entities(found["tokens"], found["tags"], wanted)])
    table = Table.of("Sentences", {MARKS: "marked"}, marked, len(rows) - len(marked))
    return summary_page(f"Entities found by {answers.model}", [], PAGE, tables=[table])


def _explanation_page(answers: RowAnswers) -> str:
    """Return the page of explained predictions."""
    found = [json.loads(line)["predicted"] for line in answers.lines.splitlines()]
    return render_page(
        "luthier.workflows", "explanation.html", PAGE, version=__version__,
        model=answers.model, rows=[_mark_words(each) for each in found],
    )  # fmt: skip


def _mark_words(predicted: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return label and probability, and the words with a strength from -4 to 4, or a heat map."""
    found = predicted["explanation"]
    words, label = found.get("words", ()), found["label"]
    most = max((abs(each["contribution"]) for each in words), default=0.0) or 1.0
    marks = [(e["word"], round(4 * e["contribution"] / most), e["contribution"]) for e in words]
    return {"label": label, "share": predicted["scores"].get(label, 0.0), "words": marks,
            "picture": found.get("picture")}  # fmt: skip


def show_predictions(
    found: Predictions, text: str | None, top: int | None, html: Path | None
) -> None:
    """Print the prediction for a text, the rows, or the name of their file."""
    answers, threshold = found.answers, found.threshold
    if text is not None:
        predicted = json.loads(answers.lines)["predicted"]
        if found.task.embeds and not sys.stdout.isatty():
            print_text(json.dumps(predicted["embedding"]))
        else:
            print_text(found.task.show(predicted, threshold, top or SHOWN))
        if explained := predicted.get("explanation"):
            _print_explanation(explained)
    elif answers.output is None and html is None:
        write_json(answers.lines)
    elif answers.output is None:
        print_text(f"{answers.rows:,} rows of {answers.model}")
    else:
        print_written(answers.rows, "rows", answers.output)
        if answers.counts["verdicts"]:
            above = (
                f"{answers.counts['anomalous']:,} rows are anomalous (score above {threshold:.3f})"
            )
            short = answers.counts["not_judged"]
            print_text(above + (f"; {short:,} rows have too short a history" if short else ""))
            _print_alarms(answers)


def _print_alarms(answers: RowAnswers) -> None:
    """Print the first alarms of a time series."""
    from luthier.evaluation.alarms import LEVELS_DIFFER

    alarms = answers.alarms or ()
    several = len({alarm.file for alarm in alarms}) > 1
    for alarm in alarms[:SHOWN_ALARMS]:
        place = f"{alarm.file}: " if several else ""
        rows = f"{alarm.rows:,} row{'s' * (alarm.rows > 1)}"
        score = f"highest score {alarm.highest_score:.3f}"
        column = "" if alarm.column is None else f" in {alarm.column}"
        print_text(f"{place}alarm {alarm.begin} to {alarm.end}: {rows}, {score}{column}")
    if len(alarms) > SHOWN_ALARMS:
        print_text(f"… and {len(alarms) - SHOWN_ALARMS:,} more alarms")
    judged = answers.counts["verdicts"] - answers.counts["not_judged"]
    if alarms and 2 * answers.counts["anomalous"] > judged:
        print_text(LEVELS_DIFFER.capitalize())


def _print_explanation(explained: Mapping[str, Any]) -> None:
    """Print the words by contribution, or the cells of an image as a map."""
    if "cells" in explained:
        print_text(f"contribution of each part to {explained['label']}, from - to +:")
        most = max(abs(value) for row in explained["cells"] for value in row) or 1.0
        for row in explained["cells"]:
            places = (round(3 + 3 * value / most) for value in row)
            print_text("  " + "".join(2 * _SHADES[place] for place in places))
        return
    print_text(f"contribution of each word to {explained['label']}:")
    for each in sorted(explained["words"], key=lambda each: -abs(each["contribution"])):
        print_text(f"  {each['contribution']:+.3f}  {each['word']}")


_SHADES = "=-. :*#"
"""Marks of cells, from cells that lower the score to cells that raise the score."""


def _holds_rows(text: str) -> bool:
    """Return whether ``text`` is the path of a file or folder with rows."""
    from luthier.data.inputs import conversion_fix, is_media

    try:
        path = Path(text)
        is_input = is_media(path.name) or conversion_fix([path.name])
        return path.is_dir() or (path.is_file() and not is_input)
    except (OSError, ValueError):  # too long for a file name, or with a NUL
        return False
