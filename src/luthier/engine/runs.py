"""The folder of one run: what was asked, what came out, and who works on it now."""

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

from luthier.data.containers import Container, container_of
from luthier.data.sources import Source, stem_of
from luthier.engine.verdict import Refit, RunVerdict
from luthier.errors import RunConflict
from luthier.evaluation.baselines import Comparison
from luthier.evaluation.label_issues import LabelIssue, LabelIssueCounts
from luthier.files import (
    copy_lines,
    disk_errors,
    folder_size,
    is_locked,
    json_lines,
    lock,
    luthier_home,
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
from luthier.recipe import NAME_PATTERN
from luthier.types import dotted_items

METRICS = "metrics.jsonl"
_FAILURE = "failure.json"
"""Why a run ended that would end so again."""
_LOCK = ".lock"
_LAUNCH = "launch.json"
"""Which launch of several processes works on the run, where one does that has an id."""
SAMPLES = "samples.jsonl"
"""Texts that the network wrote in training, with what they were worth."""
GRIDS = "grids"
"""Folder of pictures of what a model made as training went (:mod:`luthier.media.sample_grids`)."""
LABEL_ISSUES = "label_issues.jsonl"
"""Rows whose label is worth a look, if the run found any."""
HELD_OUT, TEST = "held_out.json", "test.jsonl"
"""Lines of the training file that were not learned from; the lines kept for a test, as they are."""
ACTIVATIONS, PRECOMPUTED = "activations.bin", "precomputed"
"""What was computed ahead for the rows: by the frozen layers, by the objective."""
LOOK_SECONDS = 0.1
"""Between two tries of a lock that is held: longer than anybody looks at it (:func:`is_locked`)."""
CHECKPOINTS = "checkpoints"
"""The folder of those that a run goes on from."""
REFIT = "refit"
"""The folder of training once more, on all rows, while that goes on."""
START, TOKENS = "start", "tokens"
"""Of a pre-training: the network before its first step, and the text as token ids."""


@dataclass(frozen=True)
class Result:
    """What a finished run gives back."""

    model_id: str
    run_dir: str
    model_dir: str
    rows: int
    """Rows trained on, each counted once."""
    tokens: int
    """Tokens trained on over all epochs, shared prefixes counted in each row."""
    steps: int
    train_loss: float
    """Mean loss of the last step, in nats per learned token."""
    validation_loss: float | None
    """Loss of the kept weights on the validation rows; minus the reward where that is measured."""
    seconds: float
    """Time spent in training steps, over all starts of the run."""
    peak_memory_bytes: int
    trained_weights: int
    """How many weights moved."""
    weights: int
    """How many there are in all."""
    saved_bytes: int
    """Size of the custom model's weights on disk."""
    rows_seen: int = 0
    """Rows trained on, each as often as it was; results of older runs have none."""
    verdict: RunVerdict | None = None
    """Whether it learned; results of older runs have none."""
    comparison: Comparison | None = None
    """The model beside simple baselines on the validation rows, where some go with such rows."""
    label_issues: LabelIssueCounts | None = None
    """Number of labels worth a look, if the run looked for them; :data:`LABEL_ISSUES` of the run lists
    the rows."""
    refit: Refit | None = None
    """The second training, on all rows, where it made the stored weights. Steps, tokens and seconds
    are those of both trainings, what was measured is of the first."""
    withheld: str | None = None
    """Reason why the model may not be used, if it forgot too much."""

    @staticmethod
    def parse(fields: Mapping[str, Any]) -> Result:
        """From what ``asdict`` gave, as JSON brings it back."""
        return TypeAdapter(Result).validate_python(fields)


class Run:
    """One run in ``runs/<base>/<name>``; a rehearsal has a folder elsewhere, and makes no model."""

    def __init__(self, base: str, name: str, rehearsal: Path | None = None) -> None:
        self.base, self.name = base, name
        self.model_id = f"{short_name(base)}:{name}"
        self.folder = rehearsal or working_folders(self.model_id)[0]
        self.model_folder = rehearsal / "model" if rehearsal else custom_folder(base, name)

    def begin(self, request: Mapping[str, Any], resume: bool, launch: str = "") -> Result | None:
        """Claim the name for ``request``; the result, where the run is already done.

        Without ``resume`` the name must be free. With it, an unfinished run must have been asked
        for in the same words; where there is none, the run simply starts. ``launch`` is the id of the
        launch whose processes work on it from now on.
        """
        begun = (self.folder / RUN_REQUEST).is_file()
        if not (begun and resume):
            self.check_free()
            self._record_launch(launch)
            write_json(self.folder / RUN_REQUEST, dict(request))
            return None
        asked = self.folder / RUN_REQUEST
        same_request(read_json(asked), request, self.model_id)
        (self.folder / _FAILURE).unlink(missing_ok=True)
        self._record_launch(launch)
        return Result.parse(read_json(self.folder / RUN_RESULT)) if self.has_ended() else None

    def has_ended(self) -> bool:
        """Whether it has a result, and its model is there."""
        return (self.model_folder / MANIFEST).is_file() and (self.folder / RUN_RESULT).is_file()

    def is_unfinished(self) -> bool:
        """Whether it began and has not ended, whether a process works on it or not."""
        # Its model may lie on another machine by now.
        return (self.folder / RUN_REQUEST).is_file() and not (self.folder / RUN_RESULT).is_file()

    def failure(self) -> str:
        """Why it ended, where going on would end the same way; else empty."""
        path = self.folder / _FAILURE
        return str(read_json(path)).rstrip(".") if path.is_file() else ""

    def is_worked_on(self) -> bool:
        """Whether a process works on it now."""
        return is_locked(self.folder / _LOCK)

    def started_at(self) -> datetime:
        """When it began, UTC; of one that is unfinished."""
        return datetime.fromtimestamp((self.folder / RUN_REQUEST).stat().st_mtime, UTC)

    def check_free(self) -> None:
        """Raise :class:`RunConflict` where a model or a run has the name already."""
        stored = (self.model_folder / MANIFEST).is_file()
        if (self.folder / RUN_REQUEST).is_file():
            run = "a finished run" if stored else "an unfinished run"
            advice = "Choose" if stored else "Go on with it by --resume, choose"
            why = ""
            if not stored and (reason := self.failure()):
                run, advice = "a run", "Choose"
                why = f", and going on would end as it did: {reason}"
            raise RunConflict(
                f"there is {run} {self.model_id} already{why}. {advice} another --name, or remove it "
                f"with `luthier models remove {self.model_id}`",
                rule="run.name_taken",
            )
        if stored:
            raise RunConflict(
                f"there is a model {self.model_id} already; choose another --name",
                rule="run.name_taken",
            )

    def _record_launch(self, launch: str) -> None:
        if launch:
            write_json(self.folder / _LAUNCH, launch)

    def read_launch(self) -> str | None:
        """The id of the launch that worked on it last; ``None`` where it had none."""
        path = self.folder / _LAUNCH
        return read_json(path) if path.is_file() else None

    def read_request(self) -> dict[str, Any]:
        """Return the request that this run began with; empty if it has not begun."""
        path = self.folder / RUN_REQUEST
        return dict(read_json(path)) if path.is_file() else {}

    def request_value(self, field: str) -> Any:
        """Return a field of the request this run began with; ``None`` if it has not begun."""
        return self.read_request().get(field)

    def hold_out(self, lines: Mapping[str, Mapping[str, Sequence[int]]]) -> None:
        """Record which lines of which files are not learned from, by split; copy those of the test."""
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
        """Record the rows whose label is worth a look, each with the masked beginning of its text."""
        records = [
            {
                "file": each.row.file,
                "line": each.row.line,
                "label": each.row.labels[0],
                "likely_label": each.likely_label,
                "probability": round(each.probability, 4),
                "text": excerpt_of(each.row),
            }
            for each in issues
        ]
        self.write_label_issue_records(records)

    def write_label_issue_records(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Replace :data:`LABEL_ISSUES` by ``records``; delete the file if there are none."""
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
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]

    def record_failure(self, reason: str) -> None:
        """Record why the run ended, where going on would end the same way."""
        write_json(self.folder / _FAILURE, reason)

    def finish(self, result: Result) -> None:
        """Record the result; only now is the run done. Its checkpoints are no longer needed."""
        write_json(self.folder / RUN_RESULT, asdict(result))
        self.drop_working_files()

    def drop_working_files(self) -> None:
        """Free the disk of what only a resume would need."""
        for name in (CHECKPOINTS, PRECOMPUTED, REFIT, START, TOKENS):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        (self.folder / ACTIVATIONS).unlink(missing_ok=True)

    @contextmanager
    def lock(self, wait_seconds: float = 0.0) -> Iterator[None]:
        """Keep a second process from working on the same run; see :func:`lock_folder`."""
        with lock_folder(self.folder, self.model_id, wait_seconds):
            sweep(self.folder)
            sweep(self.model_folder.parent, self.name)
            yield

    def drop_if_empty(self) -> None:
        """Forget a run that was refused before it began."""
        if not (self.folder / RUN_REQUEST).exists():
            shutil.rmtree(self.folder, ignore_errors=True)

    def checkpoint_bytes(self) -> int:
        """What the checkpoints of this run take of the disk, those of its refit among them."""
        return sum(folder_size(each / CHECKPOINTS) for each in (self.folder, self.folder / REFIT))

    def has_metrics(self) -> bool:
        """Whether it measured or trained anything yet."""
        return (self.folder / METRICS).exists()

    def drop_if_untrained(self) -> None:
        """Forget a run that was refused before it measured or trained anything."""
        if not self.has_metrics():
            shutil.rmtree(self.folder, ignore_errors=True)


class BaseRun(Run):
    """The run of a new base model, in ``pretraining/<name>``."""

    def __init__(self, name: str) -> None:
        self.base, self.name, self.model_id = name, name, name
        (self.folder,) = working_folders(name)
        self.model_folder = base_folder(name)


def run_of(model_id: str) -> Run:
    """The run that makes the model of this id, whether there is one or not."""
    base, name = split_id(model_id)
    return Run(base, name) if name else BaseRun(base)


def unfinished_runs() -> list[Run]:
    """Runs that were interrupted, or diverged (:meth:`Run.failure`), the oldest first.

    Left out are those that a process works on, and those of jobs, which the service itself resumes.
    """
    found: list[tuple[datetime, Run]] = []
    for run in map(run_of, unfinished_run_ids()):
        with suppress(FileNotFoundError):  # removed meanwhile
            found += [] if run.is_worked_on() else [(run.started_at(), run)]
    return [run for _, run in sorted(found, key=itemgetter(0))]


def runs_from(base: str) -> list[Run]:
    """Runs that began from a base model and have not ended, worked on or interrupted, of jobs too."""
    folders = (path.parent for path in (luthier_home() / "runs" / base).glob(f"*/{RUN_REQUEST}"))
    runs = (Run(base, folder.name) for folder in sorted(folders))
    return [run for run in runs if run.is_unfinished()]


def automatic_name(
    base: str, data: Source, resume: bool, parent: Path | None = None, launch: str = ""
) -> str:
    """A name for a run that was given none: the data file's, with the first free number.

    With ``resume`` it is the last one that was given out, so that the same command goes on; that of the
    last run on which the processes of ``launch`` worked comes before it, where there is one.
    ``parent`` is the folder whose names are looked at: that of the runs, if not another.
    """
    import re

    stem = re.sub(r"[^a-z0-9._-]+", "-", stem_of(data).lower()).strip("-._")[:50] or "model"
    parent = parent or Run(base, stem).folder.parent
    if resume:
        matches = [
            re.fullmatch(rf"{re.escape(stem)}-([0-9]+)", folder.name)
            for folder in parent.glob(f"{stem}-*")
        ]
        if taken := [int(match[1]) for match in matches if match]:
            own = [
                number
                for number in taken
                if launch and Run(base, f"{stem}-{number}").read_launch() == launch
            ]
            return f"{stem}-{max(own or taken)}"
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
    """Keep a second process from working on ``what``, which has ``folder``.

    Raises:
        RunConflict: where one does so for longer than ``wait_seconds``; after a second try at least.
    """
    # Who only looks whether somebody works on it has the lock for an instant: one try would not do.
    deadline = time.monotonic() + max(wait_seconds, LOOK_SECONDS)
    while True:
        with lock(folder / _LOCK) as free:
            if free:
                yield
                return
        if time.monotonic() >= deadline:
            raise RunConflict(f"another process is working on {what} now", rule="run.in_use")
        time.sleep(LOOK_SECONDS)


def is_resumed(path: Path, request: Mapping[str, Any], what: str, resume: bool) -> bool:
    """Whether ``what``, such as ``search x``, began with the request in ``path``.

    Raises:
        RunConflict: where it did and is not to be resumed, or ``request`` asks for something else.
    """
    if not path.is_file():
        return False
    if not resume:
        raise RunConflict(
            f"there is a {what} already. --resume goes on with it; choose another --name, or remove "
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
            f"{what} cannot be resumed: its data changed ({names}). Restore the files and repeat the "
            "command, or choose another --name to train on the new data"
        )
    if changed:
        shown = "; ".join(
            f"{key} was {_describe_value(old.get(key))} and is {_describe_value(new.get(key))} now"
            for key in changed[:3]
        )
        raise RunConflict(
            f"{what} cannot be resumed: {shown}. Repeat the first command, or choose another --name",
            rule="run.changed",
        )


def _describe_value(value: Any) -> str:
    return "not given" if value is None else str(value)
