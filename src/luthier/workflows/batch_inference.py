"""Batch inference: several processes answer the rows of a file, on this machine or a cluster.

    source → shards of rows → processes with a loaded model → a file of each shard → output

Rows are streamed. Each process locks the next open shard (``flock``, which a killed process
releases) and writes the answers atomically into a folder next to the output. The name of a shard
includes a hash of its rows, the settings and the files of the model. So the same command resumes
after an interruption, and answers edited rows again. The output has the answers in the order of the
rows, with the same bytes for any number of processes on one kind of machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import luthier
from luthier.data.files.parsing import text_length
from luthier.data.files.sources import is_address
from luthier.data.inputs import Media
from luthier.data.shapes.media import MediaRow
from luthier.engine.metrics import Reporter
from luthier.engine.processes import PROCESS_BYTES, check_room
from luthier.engine.report_file import ReportFile
from luthier.errors import (
    MOST_PROBLEMS,
    BoundedProblems,
    DataError,
    DiskFull,
    Interrupted,
    LuthierError,
    Problem,
    RecipeError,
    RefusedInput,
    RowRefused,
    RunConflict,
)
from luthier.files import folder_size, lock, new_file, read_json, sweep, write_bytes, write_json
from luthier.library.models import StoredModel
from luthier.processes import on_stdin_end, python_command
from luthier.workflows.child_processes import (
    REPORTS,
    ChildProcess,
    ProcessRunner,
    Resources,
    run_processes,
)
from luthier.workflows.inference_tasks import (
    NUMBERS,
    Answer,
    InferenceTask,
    InputRow,
    parse_task,
)

CHECK_SECONDS = 1.0
"""Interval of checks for answered shards."""
SHARDS = ".{}.shards"
"""Name of the folder next to the output; hidden, so that a folder of data skips the folder."""
_REQUEST, _LOCK, _WORKER = "request.json", ".lock", "process-{}"
_ANSWERS, _PROBLEMS = ".answers", ".problems.json"
_PROCESS_FILES = ("/dev/std", "/dev/fd/", "/proc/")
"""Paths of files that differ between processes."""
SHARD_BYTES = 64 << 20
"""Maximum characters of a shard of several rows, because a process has a shard in memory."""
END_SECONDS = 15.0
"""Maximum seconds for a process to end after the last shard."""
NOTE_SECONDS = 10.0
"""Between two notes of how many rows are checked."""


class InferenceRunner(ProcessRunner):
    """Run the processes of a batch on this machine."""

    def plan_processes(self, processes: int | None, memory: int, shards: int) -> tuple[int, int]:
        """Return the number of processes, at most ``shards``, and the threads of each process.

        ``memory`` is the memory of a process in bytes.

        Raises:
            RecipeError: for more processes than this machine has memory for.
        """
        processes = processes or 1
        check_room(processes, max(memory, PROCESS_BYTES))
        processes = min(processes, shards)
        return processes, max(1, len(os.sched_getaffinity(0)) // processes)


@dataclass(frozen=True)
class FileAnswers:
    """Statistics of the answered rows of a file."""

    rows: int
    resumed_rows: int
    """Rows that an earlier, interrupted command had answered."""
    processes: int
    seconds: float
    counts: dict[str, int]
    """Counts of the task, over all rows."""


@dataclass(frozen=True)
class Shard:
    """Consecutive rows with the files of the answers."""

    folder: Path
    name: str
    """Number of the shard, and a hash of rows, settings and model."""
    rows: int
    digest: str
    """Hash of the rows."""

    @property
    def answers(self) -> Path:
        """File of the answers: a line of JSON with counts, then the text of the rows."""
        return self.folder / f"{self.name}{_ANSWERS}"

    @property
    def problems(self) -> Path:
        """File of the problems with unanswerable rows."""
        return self.folder / f"{self.name}{_PROBLEMS}"

    @property
    def lock(self) -> Path:
        """Lock file of the process that answers the shard."""
        return self.folder / f"{self.name}{_LOCK}"

    @property
    def is_done(self) -> bool:
        """True if the shard is answered or rejected."""
        return self.answers.exists() or self.problems.exists()

    @contextmanager
    def open_answers(self) -> Iterator[tuple[dict[str, int], BinaryIO]]:
        """Return the counts, and the file at the start of the answers."""
        with self.answers.open("rb") as file:
            yield json.loads(file.readline()), file


def shards_folder(output: Path) -> Path:
    """Return the folder of the answers of shards until ``output`` is complete."""
    return output.with_name(SHARDS.format(output.name))


def answer_file(
    task: InferenceTask,
    output: Path,
    processes: int | None = None,
    runner: InferenceRunner | None = None,
    reporter: Reporter | None = None,
) -> FileAnswers:
    """Answer the rows of ``task`` with ``processes`` of ``runner`` and write ``output``.

    ``reporter`` receives the number of answered rows and notes about restarted processes.

    Raises:
        DataError: for unreadable rows before any answer, or for unanswerable rows; the finished
            answers
            are kept for the next call.
        RunConflict: while a second command writes the same output.
        Interrupted: on Ctrl-C or SIGTERM; the same call resumes.
        LuthierError: if the processes end before all rows are answered.
    """
    runner, reporter = runner or InferenceRunner(), reporter or Reporter()
    started = time.monotonic()
    if task.source.startswith(_PROCESS_FILES):
        raise RecipeError(
            f"{task.source} differs between processes. Write the content to a file first."
        )
    output = output.absolute()
    # Before the folder of the shards is created, so that a refused command leaves no empty folders.
    new_parents = [parent for parent in output.parents if not parent.exists()]
    folder = _make_folder(output)
    with lock(folder / _LOCK) as acquired:
        if not acquired:
            raise RunConflict(f"A second command writes {output}. Wait, or name a new output.")
        try:
            models = task.needed_models()
            shards = [*_shards(task, models, folder, reporter)]
            # After the shards are known, because a refused input must not delete answers of an
            # earlier command.
            _clear(folder)
            resumed = sum(shard.rows for shard in shards if shard.is_done)
            rows = sum(shard.rows for shard in shards)
            if resumed:
                reporter.note(f"{resumed:,} of {rows:,} rows were answered by an earlier command")
            count = 0
            if not all(shard.is_done for shard in shards):
                count = _answer_shards(task, models, shards, processes, runner, reporter)
            _check_problems(shards)
            try:
                counts = _write_output(task, shards, output)
            except DiskFull as error:
                raise DiskFull(
                    f"{error}. All rows are answered. Free disk space and run the same command again."
                ) from error
        except LuthierError:
            if not any(folder.glob(f"*{_ANSWERS}")):
                shutil.rmtree(folder)
                for parent in new_parents:
                    with suppress(OSError):  # not empty any more
                        parent.rmdir()
            raise
        shutil.rmtree(folder)
    return FileAnswers(rows, resumed, count, time.monotonic() - started, counts)


def _make_folder(output: Path) -> Path:
    """Create the folder of the shards of ``output``, or return the folder of an earlier command.

    Raises:
        RecipeError: if the output is no regular file, or the folder has foreign files.
    """
    folder = shards_folder(output)
    if os.path.exists(output) and not os.path.isfile(output):
        raise RecipeError(f"{output} is not a regular file. Name a file for the answers.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        has_foreign_files = not (folder / _LOCK).exists() and any(folder.iterdir())
    except OSError as error:
        raise RecipeError(f"{output} cannot be written: {error.strerror}.") from error
    if has_foreign_files:
        raise RecipeError(f"{folder} has foreign files. Move the folder, or name a new output.")
    return folder


def _shards(
    task: InferenceTask, models: Sequence[StoredModel], folder: Path, reporter: Reporter
) -> Iterator[Shard]:
    """Check all rows of ``task`` and yield their shards.

    Raises:
        DataError: for unreadable rows, or rows that the task rejects.
    """
    # Everything that changes an answer, so that answers of other settings are never reused.
    settings = [luthier.__version__, task.settings(), [model.content_hash for model in models]]
    problems = BoundedProblems()
    checked, next_note = 0, time.monotonic() + NOTE_SECONDS
    for number, rows in enumerate(_cut(task, problems)):
        checked += len(rows)
        if time.monotonic() >= next_note:
            next_note = time.monotonic() + NOTE_SECONDS
            reporter.note(f"{checked:,} rows are checked")
        try:
            digest = _digest(task, rows)
        except DataError as error:
            for problem in error.problems:
                problems.append(problem)
            continue
        own = hashlib.sha256(json.dumps([settings, digest]).encode()).hexdigest()
        yield Shard(folder, f"{number:06}-{own[:32]}", len(rows), digest)
    problems.refuse()


def _cut(task: InferenceTask, problems: list[Problem]) -> Iterator[list[InputRow]]:
    """Yield the rows of ``task`` in shards; shards of long rows have fewer rows."""
    shard, size = list[InputRow](), 0
    for row in task.rows(problems):
        length = text_length([row.record, row.content])
        if shard and (len(shard) == task.shard_rows or size + length > SHARD_BYTES):
            yield shard
            shard, size = [], 0
        shard.append(row)
        size += length
    if shard:
        yield shard


def _digest(task: InferenceTask, rows: Sequence[InputRow]) -> str:
    """Return a SHA-256 of rows and of the versions of their images and audio files."""
    digest = hashlib.sha256()
    for row, record in zip(rows, task.records(rows), strict=True):
        media = row.content.media if isinstance(row.content, MediaRow) else None
        line = json.dumps([record, _version(media) if media else None], default=str)
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()


def _version(media: Media) -> object:
    try:
        return media.version() or media.digest()
    except RowRefused:
        return None  # reported when the row is answered


def _clear(folder: Path) -> None:
    """Remove the files of an earlier command, except answers."""
    sweep(folder)
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name.endswith(_PROBLEMS):
            path.unlink()


def _answer_shards(
    task: InferenceTask,
    models: Sequence[StoredModel],
    shards: Sequence[Shard],
    processes: int | None,
    runner: InferenceRunner,
    reporter: Reporter,
) -> int:
    """Run processes until all shards are done, and return the number of processes."""
    folder = shards[0].folder
    memory = sum(map(_memory_of, models))
    left = sum(not shard.is_done for shard in shards)
    requested, (processes, threads) = processes, runner.plan_processes(processes, memory, left)
    if requested and requested > processes:
        reporter.note(
            f"{processes} of {requested} processes start: one per {task.shard_rows:,} rows"
        )
    request = {
        "task": task.plain(),
        "directory": os.getcwd(),
        "threads": threads,
        "shards": [[shard.name, shard.rows, shard.digest] for shard in shards],
    }
    write_json(folder / _REQUEST, request)
    folders = dict.fromkeys(str(each) for model in models for each in _folders_of(model))
    source = [] if is_address(task.source) else [os.path.abspath(task.source)]
    files = [path for path in source if os.path.exists(path)]  # it may be a pattern
    resources = Resources(threads, memory, (*files, *folders))
    workers = []
    for name in map(_WORKER.format, range(1, processes + 1)):
        process = python_command("luthier.workflows.batch_inference", str(folder), name)
        on_restart = "continues with unanswered rows"
        workers.append(ChildProcess(runner, process, resources, folder / name, on_restart))
    progress = _Progress(shards, workers, reporter)
    try:
        codes = run_processes(workers, reporter, progress.ends, END_SECONDS)
    except Interrupted:
        progress.update()
        raise Interrupted(
            f"Stopped with {progress.answered_rows:,} of {progress.total:,} rows answered and stored. "
            "Run the same command again to resume."
        ) from None
    progress.update()
    failed = [
        f"{worker.work.name}: {worker.reason(code)}"
        for worker, code in zip(workers, codes, strict=True)
        if code
    ]
    if not progress.is_done:
        raise LuthierError(
            f"{progress.total - progress.answered_rows:,} of {progress.total:,} rows are not answered: "
            f"{failed[0] if failed else 'the processes ended'}. Fix the cause and run the same command "
            "again to resume."
        )
    for reason in failed:
        reporter.note(
            f"failed process, its rows were answered by the remaining processes: {reason}"
        )
    return processes


class _Progress(Reporter):
    """Counter of answered rows, with reports."""

    def __init__(
        self, shards: Sequence[Shard], workers: Sequence[ChildProcess], reporter: Reporter
    ) -> None:
        self._folder, self._workers, self._reporter = shards[0].folder, workers, reporter
        self._left, self._refused, self._next = list(shards), list[Shard](), 0.0
        self._begun: dict[str, int] = {}
        """Answered rows of unfinished shards, by name."""
        self.total = sum(shard.rows for shard in shards)
        self.update()

    @property
    def answered_rows(self) -> int:
        """Rows of the answered shards."""
        return self.total - sum(shard.rows for shard in (*self._left, *self._refused))

    @property
    def is_done(self) -> bool:
        """True if all shards are done, or the maximum number of shards is rejected."""
        return not self._left or len(self._refused) >= MOST_PROBLEMS

    def progress(self, done: int, total: int, what: str) -> None:
        """Store the report of a process about the shard ``what``."""
        self._begun[what] = done

    def ends(self) -> bool:
        """Return :attr:`is_done`, updated every :data:`CHECK_SECONDS`."""
        if time.monotonic() >= self._next:
            self.update()
        return self.is_done

    def update(self) -> None:
        """Check for finished shards."""
        self._next = time.monotonic() + CHECK_SECONDS
        names = set(os.listdir(self._folder))  # one call instead of two for each shard
        refused = [shard for shard in self._left if shard.problems.name in names]
        left = [
            shard
            for shard in self._left
            if shard.answers.name not in names and shard.problems.name not in names
        ]
        if len(left) < len(self._left):
            # Progress shows that restarts are no endless crashes.
            for worker in self._workers:
                worker.reset_starts()
        self._left, self._refused = left, self._refused + refused
        for worker in self._workers:
            worker.reports.forward(self)
        begun = sum(self._begun.get(shard.name, 0) for shard in left)
        self._reporter.progress(self.answered_rows + begun, self.total, "answer")


def _memory_of(model: StoredModel) -> int:
    """Estimate the memory of a process: twice the files of the model, while they are loaded."""
    return PROCESS_BYTES + 2 * sum(folder_size(f, ".safetensors") for f in _folders_of(model))


def _folders_of(model: StoredModel) -> list[Path]:
    return [model.folder, *(_folders_of(model.parent) if model.parent else [])]


def _check_problems(shards: Sequence[Shard]) -> None:
    problems = list[Problem]()
    for shard in shards:
        if shard.problems.exists() and len(problems) < MOST_PROBLEMS:
            problems += [Problem.from_dict(each) for each in read_json(shard.problems)]
    if problems:
        answered = sum(shard.rows for shard in shards if shard.answers.exists())
        advice = (
            f"{answered:,} rows are answered. Fix the listed rows and run the same command again."
        )
        raise DataError(problems, capped=len(problems) >= MOST_PROBLEMS, advice=advice)


def _write_output(task: InferenceTask, shards: Sequence[Shard], output: Path) -> dict[str, int]:
    totals = Counter[str]()
    rows = sum(shard.rows for shard in shards)
    with ExitStack() as stack:
        file, target = stack.enter_context(new_file(output)), None
        for shard in shards:
            with shard.open_answers() as (counts, answers):
                if target is None:
                    width = counts.get(NUMBERS, 0) // shard.rows
                    target = stack.enter_context(task.open_output(file, output, rows, width))
                totals.update(counts)
                shutil.copyfileobj(answers, target, 1 << 20)
    return dict(totals)


def main(folder: Path, name: str) -> None:
    """Answer shards of the request in ``folder``, as the process ``name``."""
    on_stdin_end(lambda: os._exit(0))
    request = read_json(folder / _REQUEST)
    if os.path.isdir(request["directory"]):
        os.chdir(request["directory"])
    import torch

    torch.set_num_threads(request["threads"])
    if torch.cuda.is_available():
        number = int(name.rpartition("-")[2]) - 1
        torch.cuda.set_device(number % torch.cuda.device_count())
    task = parse_task(request["task"])
    shards = [Shard(folder, *each) for each in request["shards"]]
    answer, reporter = task.open(), ReportFile(folder / name / REPORTS)
    while left := [shard for shard in shards if not shard.is_done]:
        # Remaining shards are locked by processes that may be killed.
        if any(_is_free(shard) for shard in left):
            _answer_free(task, shards[: shards.index(left[-1]) + 1], answer, reporter)
        else:
            time.sleep(CHECK_SECONDS)


def _is_free(shard: Shard) -> bool:
    with lock(shard.lock) as acquired:
        return acquired and not shard.is_done


def _answer_free(
    task: InferenceTask, shards: Sequence[Shard], answer: Answer, reporter: Reporter
) -> None:
    """Answer open, unlocked shards; ``shards`` starts with the first shard."""
    cut = _cut(task, [])
    for shard in shards:
        rows = next(cut, [])
        if shard.is_done:
            continue
        with lock(shard.lock) as acquired:
            if not acquired:
                continue
            if not shard.is_done:
                if len(rows) != shard.rows or _digest(task, rows) != shard.digest:
                    raise RefusedInput(
                        f"{task.source} changed during the command. Run the same command again, and "
                        "leave the file unchanged."
                    )
                _answer(shard, rows, answer, reporter)
            shard.lock.unlink()


def _answer(shard: Shard, rows: Sequence[InputRow], answer: Answer, reporter: Reporter) -> None:
    next_report = time.monotonic() + CHECK_SECONDS

    def report(done: int) -> None:
        nonlocal next_report
        if time.monotonic() >= next_report:
            next_report = time.monotonic() + CHECK_SECONDS
            reporter.progress(done, shard.rows, shard.name)

    try:
        shard_answer = answer(rows, report)
    except DataError as error:
        write_json(shard.problems, [problem.to_dict() for problem in error.problems])
        return
    write_bytes(shard.answers, json.dumps(shard_answer.counts).encode() + b"\n" + shard_answer.data)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), sys.argv[2])
    except LuthierError as error:
        sys.exit(" ".join(str(error).split()))  # the parent shows the last line
