"""Commands for data sets: ``inspect``, ``clean``, ``convert`` and ``split``."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from luthier.cli.documents import open_retriever
from luthier.cli.terminal import console
from luthier.cli.terminal.bridge import FromText
from luthier.cli.terminal.console import (
    check_output,
    heavy_imports,
    new_console,
    note,
    print_text,
    write_page,
)
from luthier.cli.terminal.options import Mapped, OptionalAtLeastOne
from luthier.errors import RefusedInput
from luthier.formatting import one_line

if TYPE_CHECKING:
    from luthier.data.convert import Conversion
    from luthier.data.files.sources import Source
    from luthier.engine.metrics import Reporter
    from luthier.gate.check import Split
    from luthier.gate.clean import CleaningSummary
    from luthier.gate.report import Report
    from luthier.gate.scan import ScanProgress
    from luthier.media.cutting import Cut
    from luthier.workflows.hard_negatives import MinedNegatives

SHOWN_ROWS = 5
"""Rows of each split in the page and in JSON, by default."""
NoneAsText = Annotated[str | None, FromText(str, lambda text: None if text == "none" else text)]
Method = Annotated[str | Mapping[str, object] | None, FromText(str)]


def parse_severities(texts: list[str]) -> dict[str, str]:
    """Parse each ``RULE=SEVERITY`` of ``--severity``."""
    from luthier.gate.policy import parse_severity

    return {rule: value for text in texts for rule, value in parse_severity(text).items()}


Severities = Annotated[
    Mapping[str, str] | None,
    FromText(list[str], parse_severities),
    typer.Option(metavar="RULE=SEVERITY"),
]


def inspect(
    data: str | Path,
    *,
    validation: str | Path | None = None,
    test: str | Path | None = None,
    columns: Mapped = None,
    base: NoneAsText = "auto",
    objective: Method = None,
    chat_template: str | Path | None = None,
    rows: Annotated[int | None, typer.Option(min=0)] = None,
    html: Path | None = None,
    severity: Severities = None,
    policy: Path | None = None,
    skip: Sequence[str] = (),
    reporter: Reporter | None = None,
) -> Report:
    """Check data: errors, warnings, tokens and learned text.

    Exit codes: 0 passed, 1 warnings, 2 errors (`luthier tune` rejects the data, too).

    Args:
        data: Data file, folder, 'pattern*' or s3://.
        validation: Rows for validation.
        test: Rows for the final test.
        columns: Column of a key, e.g. prompt=question; repeatable.
        base: Model for counting tokens; none for no such checks.
        objective: Objective, e.g. dpo; chosen from the rows by default.
        chat_template: Chat template: chatml or a Jinja file.
        rows: Rows of each split to show; 1, or 5 in the page.
        html: Write the report as an HTML page.
        severity: off, note, warning or error for a rule; repeatable.
        policy: TOML file with severities and checks to skip.
        skip: Name of a check to leave out; repeatable.
        reporter: Receives progress; silent if not given.

    Returns:
        The report, with ``exit_code``, ``plain()`` and ``html()``. Invalid rows raise no error.

    Raises:
        RefusedInput: for an unknown base, objective, rule or check.
        DownloadError: for a base model that cannot be fetched.
    """
    check_output(html)
    with heavy_imports():
        from luthier.engine.metrics import Reporter
        from luthier.gate import inspect as gate

    reporter = reporter or Reporter()

    def move(at: ScanProgress) -> None:
        text = f"inspect, {at.rows:,} rows, {at.findings:,} findings (%)"
        reporter.progress(100 * at.done_bytes // max(1, at.total_bytes), 100, text)

    request = gate.InspectionRequest(
        str(data),
        None if validation is None else str(validation),
        None if test is None else str(test),
        columns,
        base,
        objective,
        SHOWN_ROWS if rows is None else rows,
        severity or {},
        policy,
        tuple(skip),
        None if chat_template is None else str(chat_template),
    )
    # A user's program may lack the main guard that new processes need.
    processes = os.cpu_count() if console.owns_process else 1
    report = gate.inspect(request, reporter.stage, move, processes or 1)
    if html is not None:
        write_page(html, report.html(), reporter)
    return report


def show_report(report: Report, rows: int | None) -> None:
    """Print the report on the data, with one row of each split by default."""
    from luthier.gate.report_text import print_report

    print_report(report, new_console(highlight=False), 1 if rows is None else rows)


def clean(
    source: str | Path,
    target: Path,
    *,
    normalize: bool = False,
    merge_labels: bool = False,
    redact: Sequence[str] = (),
    drop: Annotated[Sequence[str], typer.Option(metavar="RULE")] = (),
    dedupe: Literal["exact", "near"] | None = None,
    plan: Path | None = None,
    base: str | None = None,
    objective: str | None = None,
    validation: str | Path | None = None,
    test: str | Path | None = None,
    columns: Mapped = None,
    dry_run: bool = False,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> CleaningSummary:
    """Apply fixes to a data set and write a new data set.

    A log, ``TARGET.changes.jsonl``, lists each changed or removed row.

    Args:
        source: Data file, folder, 'pattern*' or s3://.
        target: New file, e.g. rows.jsonl, rows.csv or rows.jsonl.gz.
        normalize: Remove hidden characters; convert to LF and NFC.
        merge_labels: Merge labels that differ in case or marks only.
        redact: Pseudonyms for email, phone, card or all; repeatable.
        drop: Drop rows by rule, 'group.*' or unreadable; repeatable.
        dedupe: Keep the first of equal or similar rows.
        plan: TOML file with these options; options given here win.
        base: Model for rules such as row.too_long.
        objective: Objective, e.g. dpo; chosen from the rows by default.
        validation: Rows for validation, for leakage rules.
        test: Rows for the final test, for leakage rules.
        columns: Column of a key, e.g. prompt=question; repeatable.
        dry_run: Report the changes and write no file.
        overwrite: Replace existing files.
        reporter: Receives progress; silent if not given.

    Returns:
        Rows in and out, and the number of rows changed or dropped by each fix.

    Raises:
        RefusedInput: for invalid fixes, or rows that stay invalid.
    """
    from luthier.engine.metrics import Reporter
    from luthier.files import read_toml
    from luthier.gate.clean import clean as run
    from luthier.gate.clean_plan import CleaningPlan

    reporter = reporter or Reporter()
    given = {
        "normalize": normalize, "merge_labels": merge_labels, "redact": redact, "drop": drop,
        "dedupe": dedupe, "base": base, "objective": objective,
    }  # fmt: skip
    planned = {} if plan is None else read_toml(plan, "a cleaning plan")
    chosen = CleaningPlan.of(planned | {name: value for name, value in given.items() if value})
    held: dict[Split, Source] = {}
    if validation is not None:
        held["validation"] = str(validation)
    if test is not None:
        held["test"] = str(test)
    return run(
        str(source), Path(target), chosen, held, columns, overwrite, dry_run, reporter.stage,
        lambda read, size: reporter.progress(100 * read // max(1, size), 100, "clean (%)"),
    )  # fmt: skip


def show_cleaning(summary: CleaningSummary) -> None:
    """Print the number of rows that each fix changed or dropped."""
    from rich.table import Table

    from luthier.gate.pii import NOT_SEARCHED

    out = new_console(highlight=False)
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 2))
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row(f"{summary.rows_in:,}", f"rows read ({summary.form})")
    for rule, count in summary.dropped.items():
        table.add_row(f"{count:,}", f"dropped: {rule}")
    for name, count in summary.changed.items():
        did = ", ".join(f"{n:,} {what}" for what, n in summary.edits.get(name, {}).items())
        table.add_row(f"{count:,}", f"changed: {name} ({did})")
    written = "rows in the result (dry run)" if summary.dry_run else "rows written"
    table.add_row(f"{summary.rows_out:,}", written)
    out.print(table)
    if summary.redacts:
        out.print(NOT_SEARCHED, soft_wrap=True)
    if not summary.dry_run:
        out.print(f"{summary.target}; log of changes: {summary.changes}", soft_wrap=True)


def convert(
    source: str | Path,
    target: Path,
    *,
    to: str = "rows",
    format: Literal["jsonl", "json", "csv", "tsv", "parquet"] | None = None,
    columns: Mapped = None,
    drop_extra_keys: bool = False,
    mine_negatives: OptionalAtLeastOne = None,
    corpus: str | None = None,
    model: str | None = None,
    margin: Annotated[float, typer.Option(min=0, max=1)] = 0.05,
    index: str | None = None,
    seconds: float | None = None,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> Conversion | MinedNegatives | Cut:
    """Convert rows to a different format or file type.

    A field outside the target format is an error unless dropped. The formats are rows (the format
    of luthier), prompt-completion, chat, openai, bedrock, bedrock-conversation, sharegpt,
    alpaca and text. Hard negatives replace the negatives of rows with a query and a positive. With
    an index, questions with an answer become rows with passages, and cite the right passage. A
    target rows.zip receives clips of long recordings, or lines of pages with ALTO or PAGE XML.

    Args:
        source: Data file, folder, 'pattern*' or s3://.
        target: New file, e.g. rows.jsonl, rows.csv or rows.jsonl.gz.
        to: Format of the rows, e.g. chat or alpaca.
        format: File type, if not clear from the file name.
        columns: Column of a key, e.g. prompt=question; repeatable.
        drop_extra_keys: Drop keys outside the format.
        mine_negatives: Maximum number of hard negatives per row.
        corpus: File of documents to search for hard negatives.
        model: Embedding model that finds negatives; BM25 by default.
        margin: Share of the positive's score that is too close.
        index: Index of documents with passages for the questions.
        seconds: Length of the clips of long recordings; default 1.
        overwrite: Replace an existing file.
        reporter: Receives progress; silent if not given.

    Returns:
        The recognized format of the source, the number of rows, and extra keys kept or dropped;
        for hard negatives their number and that of the searched documents; for clips and lines
        their number, by label.

    Raises:
        RefusedInput: for an unknown format, or with each row that is not readable or storable.
    """
    if mine_negatives is not None:
        if to != "rows" or format not in (None, "jsonl") or drop_extra_keys:
            raise RefusedInput(
                "--mine-negatives writes rows as JSON Lines. Convert the rows in a second command"
            )
        check_output(target, str(source), corpus, overwrite=overwrite)
        with heavy_imports():
            from luthier.workflows.hard_negatives import mine_negatives as mine

        return mine(str(source), target, mine_negatives, corpus, model, margin, columns)
    if corpus is not None or model is not None:
        raise RefusedInput("--corpus and --model need --mine-negatives")
    from luthier.data.convert import convert as run
    from luthier.documents.readers import has_documents
    from luthier.engine.metrics import Reporter

    reporter = reporter or Reporter()
    if index is not None:
        if to != "rows" or target.suffix != ".jsonl":
            raise RefusedInput("--index writes rows as JSON Lines: name a file.jsonl, without --to")
        check_output(target, str(source), overwrite=overwrite)
        return _add_passages(source, target, index, columns, reporter)
    if target.suffix == ".zip":
        if to != "rows" or format or columns or drop_extra_keys:
            raise RefusedInput(
                "--to, --format, --map, --ignore and --drop-extra-keys are for rows. Remove them: "
                "a target .zip receives clips or lines"
            )
        check_output(target, *([source] if Path(source).is_file() else []), overwrite=overwrite)
        from luthier.media.cutting import cut

        return cut(source, target, seconds, lambda done: reporter.progress(done, 100, "cut (%)"))
    if seconds is not None:
        raise RefusedInput("`seconds` needs a target .zip, which receives the clips")
    if has_documents(source):
        check_output(target, str(source), overwrite=overwrite)
        return _convert_documents(Path(source), target, to)

    def move(read: int, size: int) -> None:
        reporter.progress(100 * read // max(1, size), 100, "convert (%)")

    return run(str(source), Path(target), to, format, columns, drop_extra_keys, overwrite, move)


def _convert_documents(source: Path, target: Path, to: str) -> Conversion:
    """Write a row with the text of each document."""
    from luthier.data.convert import Conversion
    from luthier.data.rows import Recognition
    from luthier.documents.readers import document_rows
    from luthier.files import json_lines, write_bytes

    if to != "text" or target.suffix != ".jsonl":
        raise RefusedInput("Documents become rows of text: name a file.jsonl and set `--to text`")
    rows = [*document_rows(source)]
    write_bytes(target, json_lines(rows).encode())
    found = Recognition(("documents",), "text", len(rows), len(rows))
    return Conversion(found, len(rows), "text", "jsonl", (), ())


def _add_passages(
    source: str | Path,
    target: Path,
    index: str,
    columns: Mapping[str, str] | None,
    reporter: Reporter,
) -> Conversion:
    """Write the questions of ``source`` with passages of an index."""
    from luthier.data.convert import Conversion
    from luthier.data.rows import RowReader
    from luthier.documents.cited_rows import draw_passages
    from luthier.files import json_lines, write_bytes

    reader = RowReader(str(source), columns)
    rows = reader.read_all()
    with open_retriever(index) as retriever:
        drawn = draw_passages(
            rows, retriever, lambda done, total: reporter.progress(done, total, "search")
        )
    if missed := len(rows) - len(drawn):
        reporter.note(f"{missed:,} of {len(rows):,} rows left out: no passage has the answer")
    if not drawn:
        raise RefusedInput(f"No passage of the index {index} has the answer of a row.")
    write_bytes(target, json_lines(row.record() for row in drawn).encode())
    return Conversion(reader.recognition, len(drawn), "passages", "jsonl", (), ())


def show_conversion(found: Conversion | MinedNegatives | Cut, target: Path, margin: float) -> None:
    """Print the formats and the number of rows, or the numbers of negatives, clips or lines."""
    from luthier.data.convert import Conversion
    from luthier.media.cutting import Cut

    if isinstance(found, Cut):
        _show_cut(found, target)
        return
    if not isinstance(found, Conversion):
        _show_mined(found, target, margin)
        return
    print_text(f"Source format: {found.recognized}")
    print_text(f"{found.rows:,} rows written to {target} ({found.format}, {found.form})")
    for names, what in ((found.kept, "extra keys kept"), (found.left_out, "extra keys dropped")):
        if names:
            print_text(f"{what}: {', '.join(map(one_line, names))}")
    if found.form == "passages":
        note(f"next: luthier tune {target} --base MODEL --name NAME")


def _show_cut(found: Cut, target: Path) -> None:
    from luthier.media.cutting import CLIP_SECONDS

    one = "recording" if found.kind == "clips" else "page"
    many = f"{found.sources:,} {one}{'s' * (found.sources != 1)}"
    print_text(f"{found.rows:,} {found.kind} of {many} written to {target}")
    if found.labels:
        print_text(", ".join(f"{one_line(name)} {count:,}" for name, count in found.labels.items()))
    if found.left_out:
        reason = (
            "a part of an event too small for its label" if found.kind == "clips"
            else "no transcription or no outline"
        )  # fmt: skip
        print_text(f"{found.left_out:,} {found.kind} left out: {reason}")
    if found.unlabelled:
        print_text(f"{found.unlabelled:,} recordings left out: no label track or selection table")
    if found.seconds != CLIP_SECONDS:
        note(f"`luthier tune` reads whole clips with --set data.max_seconds={found.seconds:g}")


def _show_mined(found: MinedNegatives, target: Path, margin: float) -> None:
    from luthier.evaluation.retrieval import MARGIN, MARGIN_REASON

    print_text(
        f"{found.negatives:,} negatives for {found.rows:,} rows, out of {found.documents:,} "
        f"documents, written to {target}"
    )
    if margin == MARGIN:
        note(MARGIN_REASON)


Share = Annotated[float, typer.Option(min=0, max=0.99)]


def split(
    source: Path,
    output: Annotated[Path, typer.Option("--output")],
    *,
    validation: Share = 0.1,
    test: Share = 0.1,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> dict[str, Any]:
    """Split a file into training and held-out rows.

    Labels keep their proportions, and near-duplicates stay on one side.

    Args:
        source: JSON Lines file.
        output: New folder for the files.
        validation: Share of the validation rows.
        test: Share of the test rows.
        seed: Random seed.

    Returns:
        The content of ``split.json``: file, rows, hash and labels of each split.

    Raises:
        RefusedInput: for unreadable rows, or shares without training rows.
        RunConflict: if the folder exists.
    """
    from luthier.gate.splits import split_file

    return split_file(Path(source), Path(output), {"validation": validation, "test": test}, seed)


def show_split(record: dict[str, Any], output: Path) -> None:
    """Print the files and the number of rows of each split."""
    for name, part in record["splits"].items():
        print_text(f"  {part['rows']:>9,} rows  {output / part['file']}  ({name})")
    kept = record["kept_together"]
    print_text(
        f"{kept['rows']:,} similar rows in {kept['groups']:,} groups, each within one split. "
        f"Labels per split: {output / 'split.json'}"
    )
