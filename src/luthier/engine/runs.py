"""Run folders: the request, the result, and the lock of a run."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from operator import itemgetter
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from luthier.data.files.containers import Container, container_of
from luthier.data.files.sources import Source, stem_of
from luthier.engine.verdict import Refit, RunVerdict
from luthier.errors import RunConflict, line_field
from luthier.evaluation.baselines import Comparison, render
from luthier.evaluation.label_issues import LabelIssue, LabelIssueCounts
from luthier.files import (
    copy_lines,
    disk_errors,
    folder_size,
    is_locked,
    json_lines,
    lock,
    new_file,
    read_json,
    sweep,
    write_json,
)
from luthier.gate.batch_text import excerpt_of
from luthier.library.folders import (
    RUN_REQUEST,
    RUN_RESULT,
    base_folder,
    custom_folder,
    short_name,
    split_id,
    unfinished_run_ids,
    working_folders,
)
from luthier.models.manifest import MANIFEST
from luthier.pages import PAGE, Table, Tabular, png_address, summary_page
from luthier.recipe import NAME_PATTERN
from luthier.types import dotted_items

METRICS = "metrics.jsonl"
_FAILURE = "failure.json"
"""Reason for a failure that would repeat on resume."""
_LOCK = ".lock"
_LAUNCH = "launch.json"
"""Id of the current launch of several processes."""
SAMPLES = "samples.jsonl"
"""Text generated in training, with rewards."""
GRIDS = "grids"
"""Folder of generated sample images (:mod:`luthier.media.sample_grids`)."""
LABEL_ISSUES = "label_issues.jsonl"
"""Rows with possibly wrong labels."""
HELD_OUT, TEST = "held_out.json", "test.jsonl"
"""Line numbers excluded from training, by file; and a copy of the test rows."""
ACTIVATIONS, PRECOMPUTED = "activations.bin", "precomputed"
"""Precomputed values of the rows, by the frozen layers and by the objective."""
LOOK_SECONDS = 0.1
"""Interval between two attempts to acquire a lock, in seconds; longer than :func:`is_locked` holds
the lock."""
CHECKPOINTS = "checkpoints"
"""Folder of the checkpoints."""
REFIT = "refit"
"""Folder of the refit while the refit runs."""
AUGMENTED = "augmented.png"
"""Picture of rows before and after random changes."""
START, TOKENS = "start", "tokens"
"""Folders of a pre-training: the initial network, and the text as token ids."""


@dataclass(frozen=True, repr=False)
class Result(Tabular):
    """The result of a finished run."""

    model_id: str
    run_dir: str
    model_dir: str
    rows: int
    """Training rows, each counted once."""
    tokens: int
    """Training tokens over all epochs. Shared prefixes count in each row."""
    steps: int
    train_loss: float
    """Mean loss of the last step, in nats per learned token."""
    validation_loss: float | None
    """Validation loss of the kept weights; minus the reward for objectives with rewards."""
    seconds: float
    """Training time in seconds, over all starts of the run."""
    peak_memory_bytes: int
    trained_weights: int
    """Number of trained weights."""
    weights: int
    """Number of weights of the network."""
    saved_bytes: int
    """Size of the custom model's weights on disk, in bytes."""
    rows_seen: int = 0
    """Training rows, counted in each epoch; 0 in results of older runs."""
    verdict: RunVerdict | None = None
    """The verdict; ``None`` in results of older runs."""
    comparison: Comparison | None = None
    """Comparison with simple baselines on the validation rows, if baselines exist for the rows."""
    label_issues: LabelIssueCounts | None = None
    """Number of possibly wrong labels, if the run searched; :data:`LABEL_ISSUES` lists the rows."""
    refit: Refit | None = None
    """The refit, if the stored weights come from a refit. Steps, tokens and seconds include both
    trainings; measurements belong to the first training."""
    withheld: str | None = None
    """Reason for withholding the model, if the model has forgotten too much."""

    def summary(self) -> list[str]:
        """Return the model, the verdict and the comparison with baselines."""
        state = f"withheld ({self.withheld})" if self.withheld else "stored"
        lines = [
            f"{self.model_id} is {state}: {self.rows:,} rows, {self.steps:,} steps, "
            f"{self.seconds:.0f} s"
        ]
        if self.verdict is not None:
            lines += filter(None, [self.verdict.text, self.verdict.advice])
        if self.comparison is not None and self.comparison.verdict:
            lines.append(self.comparison.verdict)
        return [*lines, f'Use the model: luthier.load("{self.model_id}")']

    def to_rows(self) -> list[dict[str, Any]]:
        """Return the measurements of the run: ``step``, ``event`` (``train``, ``validation`` or
        ``refit``), ``loss`` and other metrics."""
        from luthier.engine.metrics import MetricsFile

        return [dict(line) for line in MetricsFile(Path(self.run_dir) / METRICS).read()]

    def html(self, layout: str = PAGE) -> str:
        """Return the verdict, the comparison and the curves of the run as a page or fragment."""
        from luthier.engine.metrics import MetricsFile, curve_pictures

        title, *lines = self.summary()
        tables = []
        if (found := self.comparison) is not None and found.tuned is not None:
            rows = [[self.model_id, render(found.measure, found.tuned)]]
            rows += [[each.name, render(found.measure, each.score)] for each in found.baselines]
            caption = f"{found.rows:,} held-out rows"
            tables.append(Table.of(caption, {"": "name", "score": "number"}, rows))
        folder = Path(self.run_dir)
        metrics = MetricsFile(folder / METRICS).read()
        pictures = curve_pictures(metrics, self.model_id) if metrics else []
        if (changed := folder / AUGMENTED).is_file():
            pictures.append((png_address(changed.read_bytes()),) * 2)
        facts = [
            ("loss", f"{self.train_loss:.3f}", "of the last step"),
            ("peak memory", f"{self.peak_memory_bytes / 1e9:.2f} GB", ""),
            ("trained weights", f"{self.trained_weights:,}", f"of {self.weights:,}"),
            ("stored", f"{self.saved_bytes / 1e6:,.1f} MB", ""),
        ]
        return summary_page(title, lines, layout, facts, tables, pictures=pictures)

    @staticmethod
    def parse(fields: Mapping[str, Any]) -> Result:
        """Parse the JSON form of ``asdict``."""
        return TypeAdapter(Result).validate_python(fields)


class Run:
    """A run in ``runs/<base>/<name>``. A trial run has another folder and stores no model."""

    def __init__(self, base: str, name: str, rehearsal: Path | None = None) -> None:
        self.base, self.name = base, name
        self.model_id = f"{short_name(base)}:{name}"
        self.folder = rehearsal or working_folders(self.model_id)[0]
        self.model_folder = rehearsal / "model" if rehearsal else custom_folder(base, name)

    def begin(self, request: Mapping[str, Any], resume: bool, launch: str = "") -> Result | None:
        """Claim the name for ``request``; return the result if the run has finished already.

        Without ``resume``, the name must be free. With ``resume``, an unfinished run must have the
        same request; a missing run starts. ``launch`` is the id of the launch that works on the
        run.
        """
        begun = (self.folder / RUN_REQUEST).is_file()
        if not (begun and resume):
            self.check_free()
            # The launch id is written first: after a kill, a launch must recognize its unfinished
            # run.
            self._record_launch(launch)
            write_json(self.folder / RUN_REQUEST, dict(request))
            return None
        request_file = self.folder / RUN_REQUEST
        same_request(read_json(request_file), request, self.model_id)
        (self.folder / _FAILURE).unlink(missing_ok=True)
        self._record_launch(launch)
        return Result.parse(read_json(self.folder / RUN_RESULT)) if self.has_ended() else None

    def has_ended(self) -> bool:
        """Return true if the run has a result and the model exists."""
        # The model appears before the result, so a kill in between leaves an unfinished run.
        return (self.model_folder / MANIFEST).is_file() and (self.folder / RUN_RESULT).is_file()

    def is_unfinished(self) -> bool:
        """Return true if the run has begun and not ended."""
        # The model is not checked, because a finished run's model may be on another machine.
        return (self.folder / RUN_REQUEST).is_file() and not (self.folder / RUN_RESULT).is_file()

    def failure(self) -> str:
        """Return the reason for a failure that would repeat on resume; empty without a failure."""
        path = self.folder / _FAILURE
        return str(read_json(path)).rstrip(".") if path.is_file() else ""

    def is_worked_on(self) -> bool:
        """Return true if a process works on the run."""
        return is_locked(self.folder / _LOCK)

    def started_at(self) -> datetime:
        """Return the start time of an unfinished run, UTC."""
        # The request is written once, at the start.
        return datetime.fromtimestamp((self.folder / RUN_REQUEST).stat().st_mtime, UTC)

    def check_free(self) -> None:
        """Raise :class:`RunConflict` if a model or a run with the name exists."""
        stored = (self.model_folder / MANIFEST).is_file()
        if (self.folder / RUN_REQUEST).is_file():
            run, fix = "an unfinished run", "Resume the run with `resume`, or choose"
            if stored:
                run, fix = "a finished run", "For its result, set `resume`. Otherwise choose"
            elif reason := self.failure():
                run, fix = f"a run that would fail again ({reason})", "Choose"
            raise RunConflict(
                f"{run} {self.model_id} exists already. {fix} another `name`, or remove the model "
                f"first: `luthier models remove {self.model_id}`",
                rule="run.name_taken",
            )
        if stored:
            raise RunConflict(
                f"a model {self.model_id} exists already. Choose another `name`",
                rule="run.name_taken",
            )

    def _record_launch(self, launch: str) -> None:
        if launch:
            write_json(self.folder / _LAUNCH, launch)

    def read_launch(self) -> str | None:
        """Return the id of the last launch of the run, if any."""
        path = self.folder / _LAUNCH
        return read_json(path) if path.is_file() else None

    def read_request(self) -> dict[str, Any]:
        """Return the request of the run; empty if the run has not begun."""
        path = self.folder / RUN_REQUEST
        return dict(read_json(path)) if path.is_file() else {}

    def request_value(self, field: str) -> Any:
        """Return a field of the run's request; ``None`` if the run has not begun."""
        return self.read_request().get(field)

    def record_held_out(self, lines: Mapping[str, Mapping[str, Sequence[int]]]) -> None:
        """Record the held-out line numbers by split and file, and copy the test rows."""
        if not lines:
            (self.folder / HELD_OUT).unlink(missing_ok=True)
            return
        write_json(self.folder / HELD_OUT, lines)
        test = {Path(file): each for file, each in lines.get("test", {}).items()}
        if test and all(container_of(file) == Container("jsonl") for file in test):
            with disk_errors(self.folder), new_file(self.folder / TEST) as target:
                for file, each in test.items():
                    copy_lines(file, each, target)

    def write_label_issues(self, issues: Sequence[LabelIssue]) -> None:
        """Record the rows with possibly wrong labels, each with a masked excerpt."""
        records = [
            {
                "file": each.row.file,
                **line_field(each.row.line),
                "label": each.row.labels[0],
                "likely_label": each.likely_label,
                "probability": round(each.probability, 4),
                "text": excerpt_of(each.row),
            }
            for each in issues
        ]
        self.write_label_issue_records(records)

    def write_label_issue_records(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Write ``records`` to :data:`LABEL_ISSUES`; delete the file if ``records`` is empty."""
        if not records:
            (self.folder / LABEL_ISSUES).unlink(missing_ok=True)
            return
        with disk_errors(self.folder), new_file(self.folder / LABEL_ISSUES) as target:
            target.write(json_lines(records).encode())

    def read_label_issues(self) -> list[dict[str, Any]]:
        """Return the records of :data:`LABEL_ISSUES`; empty if the file does not exist."""
        path = self.folder / LABEL_ISSUES
        if not path.is_file():
            return []
        # Not `splitlines`, which also splits at U+2028 within JSON strings.
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]

    def record_failure(self, reason: str) -> None:
        """Record the reason for a failure that would repeat on resume."""
        write_json(self.folder / _FAILURE, reason)

    def finish(self, result: Result) -> None:
        """Record the result, which marks the run as finished, and delete the working files."""
        # The result comes first: a kill during the deletion leaves a finished run.
        write_json(self.folder / RUN_RESULT, asdict(result))
        self.drop_working_files()

    def drop_working_files(self) -> None:
        """Delete the files that only a resume needs."""
        for name in (CHECKPOINTS, PRECOMPUTED, REFIT, START, TOKENS):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        (self.folder / ACTIVATIONS).unlink(missing_ok=True)

    @contextmanager
    def lock(self, wait_seconds: float = 0.0) -> Iterator[None]:
        """Acquire the lock of the run; see :func:`lock_folder`."""
        with lock_folder(self.folder, self.model_id, wait_seconds):
            # Under the lock only, because a sweep would also delete the files of a running writer.
            sweep(self.folder)
            sweep(self.model_folder.parent, self.name)
            yield

    def drop_if_empty(self) -> None:
        """Delete a run that was rejected before the start."""
        if not (self.folder / RUN_REQUEST).exists():
            shutil.rmtree(self.folder, ignore_errors=True)

    def checkpoint_bytes(self) -> int:
        """Return the size of the checkpoints, including the refit, in bytes."""
        return sum(folder_size(each / CHECKPOINTS) for each in (self.folder, self.folder / REFIT))

    def has_metrics(self) -> bool:
        """Return true if the run has measured or trained."""
        return (self.folder / METRICS).exists()

    def drop_if_untrained(self) -> None:
        """Delete a run that was rejected before any measurement or training."""
        if not self.has_metrics():
            shutil.rmtree(self.folder, ignore_errors=True)


class BaseRun(Run):
    """The run of a new base model, in ``pretraining/<name>``."""

    def __init__(self, name: str) -> None:
        self.base, self.name, self.model_id = name, name, name
        (self.folder,) = working_folders(name)
        self.model_folder = base_folder(name)


def run_of(model_id: str) -> Run:
    """Return the run of the model with this id. The run may not exist yet."""
    base, name = split_id(model_id)
    return Run(base, name) if name else BaseRun(base)


def unfinished_runs() -> list[Run]:
    """Return interrupted or diverged runs, oldest first.

    Excludes runs with an active process, and runs of jobs, which the service resumes.
    """
    started_runs: list[tuple[datetime, Run]] = []
    for run in map(run_of, unfinished_run_ids()):
        with suppress(FileNotFoundError):  # removed meanwhile
            started_runs += [] if run.is_worked_on() else [(run.started_at(), run)]
    return [run for _, run in sorted(started_runs, key=itemgetter(0))]


def automatic_name(
    base: str, data: Source, resume: bool, parent: Path | None = None, launch: str = ""
) -> str:
    """Return a run name from the data file's name and the first free number.

    With ``resume``, return the name with the highest existing number, so that a repeated command
    resumes. Runs of ``launch`` take precedence. ``parent`` is the folder with the names; default:
    the folder of the runs.
    """
    import re

    stem = re.sub(r"[^a-z0-9._-]+", "-", stem_of(data).lower()).strip("-._")[:50] or "model"
    parent = parent or Run(base, stem).folder.parent
    if resume:
        matches = [
            re.fullmatch(rf"{re.escape(stem)}-([0-9]+)", folder.name)
            for folder in parent.glob(f"{stem}-*")
        ]
        if numbers := [int(match[1]) for match in matches if match]:
            launch_numbers = [
                number
                for number in numbers
                if launch and Run(base, f"{stem}-{number}").read_launch() == launch
            ]
            return f"{stem}-{max(launch_numbers or numbers)}"
    number = 1
    while True:
        name = f"{stem}-{number}"
        assert NAME_PATTERN.fullmatch(name)
        run = Run(base, name)
        if not any(path.exists() for path in (parent / name, run.folder, run.model_folder)):
            return name
        number += 1


@contextmanager
def lock_folder(folder: Path, what: str, wait_seconds: float = 0.0) -> Iterator[None]:
    """Acquire the lock of ``folder``: a single process at a time may work on ``what``.

    Raises:
        RunConflict: if the lock is not free within ``wait_seconds``. At least two attempts are
            made.
    """
    # `is_locked` holds the lock for an instant, so one failed attempt does not prove an owner.
    deadline = time.monotonic() + max(wait_seconds, LOOK_SECONDS)
    while True:
        with lock(folder / _LOCK) as free:
            if free:
                yield
                return
        if time.monotonic() >= deadline:
            raise RunConflict(f"another process is working on {what}", rule="run.in_use")
        time.sleep(LOOK_SECONDS)


def is_resumed(path: Path, request: Mapping[str, Any], what: str, resume: bool) -> bool:
    """Return true if ``what``, such as ``search x``, has begun with the request in ``path``.

    Raises:
        RunConflict: if ``what`` has begun without ``resume``, or ``request`` differs.
    """
    if not path.is_file():
        return False
    if not resume:
        raise RunConflict(
            f"a {what} exists already. Resume with --resume, choose another --name, or remove "
            f"{path.parent}"
        )
    same_request(read_json(path), request, f"the {what}")
    return True


def same_request(before: Mapping[str, Any], now: Mapping[str, Any], what: str) -> None:
    """Raise :class:`RunConflict` if two requests differ; ``data`` has the SHA-256 of each source."""
    old, new = dict(dotted_items(before)), dict(dotted_items(now))
    changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    sources = [key for key in changed if key.startswith("data.") and key in old and key in new]
    if changed and sources == changed:
        names = ", ".join(key.removeprefix("data.") for key in sources)
        raise RunConflict(
            f"{what} cannot be resumed: the data changed ({names}). Restore the files and repeat "
            "the command, or choose another --name"
        )
    if changed:
        shown = "; ".join(
            f"{key} changed from {_describe_value(old.get(key))} to {_describe_value(new.get(key))}"
            for key in changed[:3]
        )
        raise RunConflict(
            f"{what} cannot be resumed: {shown}. Repeat the first command, or choose another --name",
            rule="run.changed",
        )


def _describe_value(value: Any) -> str:
    return "unset" if value is None else str(value)
