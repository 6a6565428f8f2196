"""Data reports, cleanings and estimates, each computed by a CLI command in a child process.

A report needs a tokenizer, an estimate needs real training steps: both would block the server's
other requests. Few run at the same time, each with a time limit, and end with the connection.
"""

from __future__ import annotations

import json
import logging
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

from pydantic import Field

from luthier.data.files.read import read_records
from luthier.data.shapes import SHAPES
from luthier.formatting import column_options, map_code, one_line
from luthier.models import DEFAULT_BASE
from luthier.processes import Cancelled, python_command, run_cancellable
from luthier.server.http.messages import Fault
from luthier.server.http.routes import REPORT_SLOT
from luthier.server.jobs.data import base_reads_media, fetch_first_lines, fetch_rows, peek_rows
from luthier.server.jobs.processes import worker_environment
from luthier.server.jobs.submit import Submission, check_client_grader, recipe_of
from luthier.server.native.operations import (
    Call,
    Input,
    NativeCall,
    View,
    native_router,
    setting_name,
)
from luthier.server.stores.uploaded_files import file_address
from luthier.server.tables.custom_models import CustomModel
from luthier.types import map_texts

SECONDS = 600.0
"""Time limit of a report or estimate, in seconds."""
EXAMPLE = 80
"""Maximum number of characters of an example value."""
router = native_router()
_log = logging.getLogger("luthier.server")


class Preview(Input):
    """Data to preview."""

    training: str
    """Address of training data."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Column names of the data by key; an empty name ignores the key or column."""


class ColumnView(View):
    """A column of the data."""

    name: str
    example: str
    """Beginning of the first value."""


class PreviewView(View):
    """How the first rows are read."""

    columns: list[ColumnView]
    keys: list[str]
    """Keys that a column can be read as."""
    form: str | None
    """Form of the rows; missing if unknown."""
    base: str | None
    """Base model that fits the rows; missing if unknown."""
    base_reason: str
    problem: str | None
    """The first problem of the rows."""


class Inspection(Input):
    """Data for a report."""

    training: str
    """Address of training data."""
    validation: str | None = None
    """Address of validation data."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Column names of the data by key; an empty name ignores the key or column."""
    base: str | None = None
    """Base model that provides the tokenizer. The default follows from the rows (``report.base``).
    ``none`` counts no tokens, and so loads no model."""
    objective: str | None = None
    """Training objective. The default follows from the rows."""
    line: int | None = Field(default=None, ge=1)
    """Line or row number of a single row to check and show."""
    first_lines: bool = False
    """Check only the first 2 MB of a large file."""


class Cleaning(Input):
    """Fixes for data."""

    training: str
    """Address of the data: a single file."""
    validation: str | None = None
    """Address of validation data, for rules of leakage."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Column names of the data by key; an empty name ignores the key or column."""
    rules: tuple[str, ...] = Field(default=(), max_length=100)
    """Rules to fix, which the report marks as ``fixable``."""
    labels: dict[Annotated[str, Field(pattern="^[0-9]+$")], str] = Field(
        default_factory=dict, max_length=10_000
    )
    """Corrected label by line or row number."""


class CleaningView(View):
    """Cleaned data as a file of the account."""

    address: str
    """Address for the ``training`` of a job."""
    name: str
    rows_in: int
    rows_out: int
    changed: dict[str, int]
    """Number of changed rows by fix."""
    dropped: dict[str, int]
    """Number of dropped rows by rule."""


class ReportView(View):
    """Result of the data checks."""

    verdict: str
    """``passed``, ``warnings`` or ``refused``."""
    complete: bool
    """True if the report is about all rows."""
    report: dict[str, Any]


class Planned(Input):
    """Data and settings of a job to estimate."""

    training: str
    """Address of training data."""
    validation: tuple[str, ...] = Field(default=(), max_length=10)
    base: str = DEFAULT_BASE
    customization_type: Literal[
        "FINE_TUNING", "REINFORCEMENT_FINE_TUNING", "CONTINUED_PRE_TRAINING"
    ] = "FINE_TUNING"
    """Type of customization. Distillation is not supported: the cost depends on the teacher."""
    grader: dict[str, Any] | None = None
    """Grader of reinforcement fine-tuning: ``method`` and fields of a grader."""
    settings: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Recipe fields by group."""


class EstimateView(View):
    """Estimated cost of a job on this machine."""

    estimate: dict[str, Any]
    """Tokens, steps, seconds, memory and disk, each with an interval."""


@router.post("/previews")
def preview_data(call: NativeCall, body: Preview) -> PreviewView:
    """Show the columns of data, whether the first rows can be read, and the base model for them."""
    from luthier.gate.inspect import default_base

    peeked = peek_rows(call.context.locations, call.account, body.training, body.columns)
    first: dict[str, Any] = {}
    for record in peeked.records:
        first |= {name: value for name, value in record.items() if name not in first}
    keys = [key for kind in SHAPES.values() for needed in kind.complete for key in sorted(needed)]
    problems = [map_code(each.message, setting_name) for each in peeked.problems]
    base, reason = default_base(peeked.rows) if peeked.rows else (None, "")
    return PreviewView(
        columns=[
            ColumnView(name=name, example=one_line(str(value))[:EXAMPLE])
            for name, value in first.items()
        ],
        keys=[*dict.fromkeys(keys)],
        form=peeked.form,
        base=base,
        base_reason=reason,
        problem=next(iter(problems), None),
    )


@router.post("/inspections", dependencies=[REPORT_SLOT])
def inspect_data(call: NativeCall, body: Inspection) -> ReportView:
    """Check data for training, and report problems of each row."""
    base = body.base
    if base is not None and base != "none":
        base = _stored_id(call, base)
    with TemporaryDirectory(prefix="luthier-report-") as name:
        folder = Path(name)
        media = base in (None, "none") or base_reads_media(base)
        first = body.first_lines and fetch_first_lines(
            call.context.locations, call.account, body.training, folder / "first"
        )
        addresses = {str(first): body.training} if first else {}
        rows = first or _fetch(
            call, body.training, folder / "training", addresses, media, body.columns
        )
        if body.line is not None:
            rows = _single_row(rows, body.line, folder / "row.jsonl")
            addresses[str(rows)] = body.training
        command = ["inspect", str(rows)] + ([] if base is None else ["--base", base])
        if body.validation is not None:
            validation = _fetch(
                call, body.validation, folder / "validation", addresses, media, body.columns
            )
            command += ["--validation", str(validation)]
        if body.objective is not None:
            command += ["--objective", body.objective]
        command += column_options(body.columns)
        report = _run_command(command, addresses, (0, 1, 2))
    return ReportView(verdict=report["verdict"], complete=not first, report=report)


@router.post("/cleanings", status_code=201, dependencies=[REPORT_SLOT])
def clean_data(call: NativeCall, body: Cleaning) -> CleaningView:
    """Fix data, and store the result as a new file of the account."""
    from luthier.gate.report import FIXES, cleaning_options, target_of
    from luthier.recipe import to_toml

    call.record("file")
    if unknown := [rule for rule in body.rules if rule not in FIXES]:
        raise Fault("Validation", f"No automatic fix for {', '.join(unknown)}.", parameter="rules")
    with TemporaryDirectory(prefix="luthier-report-") as name:
        folder = Path(name)
        addresses: dict[str, str] = {}
        rows = _fetch(call, body.training, folder / "training", addresses)
        if rows.is_dir():
            text = f"{body.training} has several files. Clean each file."
            raise Fault("Validation", text, parameter="training")
        # A file that was cleaned before keeps its name, with the next number.
        cleaned = re.sub(r"-clean(-\d+)?-clean\.", "-clean.", Path(target_of(str(rows))).name)
        target = folder / call.context.locations.uploads.free_name(call.account, cleaned)
        addresses[str(target)] = target.name
        command = ["clean", str(rows), str(target), *column_options(body.columns)]
        for name, values in cleaning_options(body.rules).items():
            command += [word for each in values for word in (name, each) if word]
        if body.labels:
            plan = folder / "plan.toml"
            plan.write_text(to_toml({"relabel": body.labels}), encoding="utf-8")
            command += ["--plan", str(plan)]
        if body.validation is not None:
            held = _fetch(call, body.validation, folder / "validation", addresses)
            command += ["--validation", str(held)]
        summary = _run_command(command, addresses, (0,))
        file = call.context.locations.uploads.add(
            call.account, [target.read_bytes()], target.name, "fine-tune"
        )
    call.record_created(f"file/{file.id}")
    fields = {name: summary[name] for name in ("rows_in", "rows_out", "changed", "dropped")}
    return CleaningView(address=file_address(file.id), name=file.name, **fields)


@router.post("/estimates", dependencies=[REPORT_SLOT])
def estimate_job(call: NativeCall, body: Planned) -> EstimateView:
    """Estimate the cost of a job from a few training steps on the job's rows."""
    from luthier.recipe import to_toml

    grader = check_client_grader(body.grader) if body.grader else None
    base = call.context.base(call.account, body.base)
    submission = Submission(
        account=call.account,
        api="native",
        job_name="estimate",
        model_name="estimate",
        customization_type=body.customization_type,
        base=base,
        training=[body.training],
        validators=list(body.validation),
        settings=body.settings,
        grader=grader,
        hold_out=call.context.hold_out,
    )
    fields = recipe_of(submission, "estimate").plain()
    columns = fields["data"].get("columns")
    with TemporaryDirectory(prefix="luthier-report-") as name:
        folder = Path(name)
        media = base_reads_media(_stored_id(call, body.base))
        addresses: dict[str, str] = {}
        rows = _fetch(call, body.training, folder / "training", addresses, media, columns)
        validation = _fetch_held_out(
            call, body.validation, folder / "held", addresses, media, columns
        )
        fields["data"]["train"] = str(rows)
        if validation is not None:
            fields["data"]["validation"] = str(validation)
        recipe = folder / "recipe.toml"
        recipe.write_text(to_toml(fields), encoding="utf-8")
        estimate = _run_command(["estimate", str(recipe)], addresses, (0,))
    return EstimateView(estimate=estimate)


def _stored_id(call: Call, identifier: str) -> str:
    model = call.context.base(call.account, identifier)
    return str(model.stored_id) if isinstance(model, CustomModel) else model.base


def _fetch_held_out(
    call: Call,
    sources: Sequence[str],
    folder: Path,
    addresses: dict[str, str],
    media: bool,
    columns: Mapping[str, str] | None,
) -> Path | None:
    """Fetch validation data below ``folder``, and add the address of each path to ``addresses``."""
    if not sources:
        return None
    folder.mkdir()
    files = [
        _fetch(call, address, folder / f"{number:02d}", addresses, media, columns)
        for number, address in enumerate(sources)
    ]
    # After the files in the folder, because the replacement of paths follows this order.
    addresses[str(folder)] = ", ".join(sources)
    return files[0] if len(files) == 1 else folder


def _single_row(file: Path, line: int, target: Path) -> Path:
    """Write one row of a file to ``target``, a file of JSON Lines."""
    found = (record for number, record in read_records(file, [], whole=False) if number == line)
    record = None if file.is_dir() else next(found, None)
    if record is None:
        raise Fault("Validation", f"The file has no row {line}.", parameter="line")
    target.write_text(json.dumps(record, ensure_ascii=False, default=str), encoding="utf-8")
    return target


def _fetch(
    call: Call,
    address: str,
    folder: Path,
    addresses: dict[str, str],
    media: bool = False,
    columns: Mapping[str, str] | None = None,
) -> Path:
    """Fetch rows below ``folder``, and add the address of each path to ``addresses``."""
    path, found = fetch_rows(call.context.locations, call.account, address, folder, media, columns)
    addresses |= found
    return path


def _run_command(command: list[str], addresses: dict[str, str], codes: tuple[int, ...]) -> Any:
    """Return the JSON output of a command, with paths and settings renamed for the client."""
    arguments = python_command("luthier", *command, "--json")
    try:
        process = run_cancellable(arguments, SECONDS, worker_environment())
    except Cancelled as error:
        raise Fault("ServiceUnavailable", str(error)) from error  # no client reads the response
    except subprocess.TimeoutExpired as error:
        text = f"The command takes more than {SECONDS:.0f} seconds. Use fewer rows."
        raise Fault("Validation", text) from error
    out = process.stdout.strip()
    if not out or process.returncode < 0:
        _log.error("%s failed (%d): %s", command[0], process.returncode, process.stderr[-4000:])
        text = f"The command `{command[0]}` failed on the server. Its log has the reason."
        raise Fault("InternalServer", text)
    for path, address in addresses.items():
        # Replace the JSON encoding of the path, without quotes.
        out = out.replace(json.dumps(path)[1:-1], json.dumps(address, ensure_ascii=False)[1:-1])
    output = json.loads(out)
    if process.returncode not in codes or "error" in output:
        message = output.get("error", {}).get("message") or "The command fails without a message."
        raise Fault("Validation", map_code(message, setting_name)[-4000:])
    return map_texts(output, lambda text: map_code(text, setting_name))
