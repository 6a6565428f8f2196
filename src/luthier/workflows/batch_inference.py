"""Batch inference: the rows of a file answered by several processes, here or on a cluster.

    source → shards of rows → processes with the model loaded once → a file for each shard → output

The rows are read one after the other and never all held, by this process to check them and by each
of the others to answer its shards. A process takes the next shard that nobody holds or has answered
(``flock``, so that what a killed one held is free again), and writes its answers whole or not at
all, into a folder beside the output. A shard is named by the hash of what decides its answers: the
rows, the settings and the files of the model. So the same command goes on where it was cut short.
Of a row that was edited its shard is answered anew; of one that was put in or taken out, all behind
it, too. The output is put together from the shards in the order of the rows, to the bytes of any
other number of processes on machines of one kind: processors and graphics cards round in different
ways.
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import luthier
from luthier.cancellation import on_stdin_end
from luthier.child_python import python_command
from luthier.data.inputs import Media
from luthier.data.parsing import text_length
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
from luthier.library.models import StoredModel, content_hash
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
    ShardAnswer,
    parse_task,
)

LOOK_SECONDS = 1.0
"""Between two looks at which shards are answered."""
SHARDS = ".{}.shards"
"""Name of the folder beside the output; a folder that is read as data passes over hidden names."""
_REQUEST, _LOCK, _WORKER = "request.json", ".lock", "process-{}"
_ANSWERS, _PROBLEMS = ".answers", ".problems.json"
_NO_PLACE = ("/dev/", "/proc/")
"""Where names of files mean other ones in another process."""
SHARD_BYTES = 64 << 20
"""Characters of the texts of a shard of several rows: a process holds one shard."""
END_SECONDS = 15.0
"""In which a process ends that nobody needs any more; it has nothing to store."""
CHECK_SECONDS = 10.0
"""Between two notes of how many rows are checked."""


class InferenceRunner(ProcessRunner):
    """Where the processes of a batch run: on this machine, as its children."""

    def plan_processes(self, processes: int | None, memory: int, shards: int) -> tuple[int, int]:
        """How many processes there are, ``processes`` where it is given, and the threads of each.

        ``memory`` is what one takes, in bytes. There are no more than ``shards``.

        Raises:
            RecipeError: for more than this machine's memory has room for.
        """
        processes = processes or 1
        check_room(processes, max(memory, PROCESS_BYTES))
        processes = min(processes, shards)
        return processes, max(1, len(os.sched_getaffinity(0)) // processes)


@dataclass(frozen=True)
class FileAnswers:
    """How the rows of a file were answered."""

    rows: int
    resumed_rows: int
    """Of them those that had been answered by an earlier command that was cut short."""
    processes: int
    seconds: float
    counts: dict[str, int]
    """What the task counted, over all rows."""


@dataclass(frozen=True)
class Shard:
    """Rows that follow each other, and the files of their answers."""

    folder: Path
    name: str
    """Its number, and the hash of what decides its answers."""
    rows: int
    digest: str
    """Hash of what the rows say."""

    @property
    def answers(self) -> Path:
        """Path of the answers: a line of JSON with counts, then the text for the rows."""
        return self.folder / f"{self.name}{_ANSWERS}"

    @property
    def problems(self) -> Path:
        """Why its rows cannot be answered."""
        return self.folder / f"{self.name}{_PROBLEMS}"

    @property
    def lock(self) -> Path:
        """Held by the process that answers it."""
        return self.folder / f"{self.name}{_LOCK}"

    @property
    def is_done(self) -> bool:
        """Whether it needs no more work of this command."""
        return self.answers.exists() or self.problems.exists()

    def store(self, answered: ShardAnswer) -> None:
        """Write its answers."""
        write_bytes(self.answers, json.dumps(answered.counts).encode() + b"\n" + answered.data)

    @contextmanager
    def open_answers(self) -> Iterator[tuple[dict[str, int], BinaryIO]]:
        """What was counted, and a file of which what is written for the rows is still to be
        read."""
        with self.answers.open("rb") as file:
            yield json.loads(file.readline()), file


def shards_folder(output: Path) -> Path:
    """Where the answers to the shards of ``output`` lie until it is whole."""
    return output.with_name(SHARDS.format(output.name))


def _make_folder(output: Path) -> Path:
    """The folder of the shards of ``output``, made or left by an earlier command.

    Raises:
        RecipeError: if the output is no plain file, or the folder has other files.
    """
    folder = shards_folder(output)
    if os.path.exists(output) and not os.path.isfile(output):
        raise RecipeError(f"{output} is no plain file: name one for the answers")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        foreign = not (folder / _LOCK).exists() and any(folder.iterdir())
    except OSError as error:
        raise RecipeError(
            f"{output} cannot be written: its folder takes no new ones ({error.strerror})"
        ) from error
    if foreign:
        raise RecipeError(
            f"{folder} holds files of something else: move it away, or name another output"
        )
    return folder


def answer_file(
    task: InferenceTask,
    output: Path,
    processes: int | None = None,
    runner: InferenceRunner | None = None,
    reporter: Reporter | None = None,
) -> FileAnswers:
    """Answer the rows of ``task`` by so many processes of ``runner`` and write them to ``output``.

    ``reporter`` hears how many rows are answered (``progress``), and of processes that are started
    again.

    Raises:
        DataError: naming every row that cannot be read, before anything is answered, or that cannot
        be
            answered; the answers to the others are kept for the next call.
        RunConflict: another command answers rows for the same output now.
        Interrupted: on Ctrl-C or SIGTERM; the same call goes on.
        LuthierError: where the processes ended before all rows were answered.
    """
    runner, reporter = runner or InferenceRunner(), reporter or Reporter()
    started = time.monotonic()
    if task.source.startswith(_NO_PLACE):
        raise RecipeError(
            f"{task.source} is another file in each process: name the file itself, or write one of it"
        )
    output = output.absolute()
    made = [parent for parent in output.parents if not parent.exists()]
    folder = _make_folder(output)
    with lock(folder / _LOCK) as free:
        if not free:
            raise RunConflict(
                f"another command is writing {output}: wait for its end, or name another output"
            )
        try:
            models = task.needed_models()
            shards = [*_shards(task, models, folder, reporter)]
            _clear(folder)
            resumed = sum(shard.rows for shard in shards if shard.is_done)
            rows = sum(shard.rows for shard in shards)
            if resumed:
                reporter.note(f"{resumed:,} of {rows:,} rows were answered by an earlier command")
            count = 0
            if not all(shard.is_done for shard in shards):
                count = _answer_shards(task, models, shards, processes, runner, reporter)
            _check_problems(shards, output)
            try:
                counts = _write_output(task, shards, output)
            except DiskFull as error:
                raise DiskFull(
                    f"{error}. All rows are answered: make room for the output beside {folder}, and "
                    "the same command writes it"
                ) from error
        except LuthierError:
            if not any(folder.glob(f"*{_ANSWERS}")):  # else they are for the next call
                shutil.rmtree(folder)
                for parent in made:
                    with suppress(OSError):  # somebody else has put something into it
                        parent.rmdir()
            raise
        shutil.rmtree(folder)
    return FileAnswers(rows, resumed, count, time.monotonic() - started, counts)


def _shards(
    task: InferenceTask, models: Sequence[StoredModel], folder: Path, reporter: Reporter
) -> Iterator[Shard]:
    """The shards of ``task``, all rows of which are checked, as ``reporter`` hears.

    Raises:
        DataError: naming every row that cannot be read or asked this.
    """
    decides = [luthier.__version__, task.settings(), [content_hash(model) for model in models]]
    problems = BoundedProblems()
    checked, next_note = 0, time.monotonic() + CHECK_SECONDS
    for number, rows in enumerate(_cut(task, problems)):
        checked += len(rows)
        if time.monotonic() >= next_note:
            next_note = time.monotonic() + CHECK_SECONDS
            reporter.note(f"{checked:,} rows are checked")
        try:
            digest = _digest(task, rows)
        except DataError as error:
            for problem in error.problems:
                problems.append(problem)
            continue
        own = hashlib.sha256(json.dumps([decides, digest]).encode()).hexdigest()
        yield Shard(folder, f"{number:06}-{own[:32]}", len(rows), digest)
    problems.refuse()


def _cut(task: InferenceTask, problems: list[Problem]) -> Iterator[list[InputRow]]:
    """The rows of ``task`` in shards: of as many rows as it wants, or fewer that are long."""
    shard, size = list[InputRow](), 0
    for row in task.rows(problems):
        long = text_length([row.record, row.content])
        if shard and (len(shard) == task.shard_rows or size + long > SHARD_BYTES):
            yield shard
            shard, size = [], 0
        shard.append(row)
        size += long
    if shard:
        yield shard


def _digest(task: InferenceTask, rows: Sequence[InputRow]) -> str:
    """SHA-256 of what rows say, and of which version the files of their images and sounds are."""
    digest = hashlib.sha256()
    for row, record in zip(rows, task.records(rows), strict=True):
        media = row.content.media if isinstance(row.content, MediaRow) else None
        said = json.dumps([record, _version(media) if media else None], default=str)
        digest.update(said.encode() + b"\n")
    return digest.hexdigest()


def _version(media: Media) -> object:
    try:
        return media.version() or media.digest()
    except RowRefused:
        return None  # who answers the row says why it cannot be read


def _clear(folder: Path) -> None:
    """Remove the files of an earlier command except answers, whose settings may be used again."""
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
    """Have the shards answered; the number of processes."""
    folder = shards[0].folder
    memory = sum(map(_memory_of, models))
    left = sum(not shard.is_done for shard in shards)
    asked, (processes, threads) = processes, runner.plan_processes(processes, memory, left)
    if asked and asked > processes:
        reporter.note(
            f"{processes} of {asked} processes are started: each answers {task.shard_rows:,} rows at a "
            "time, and there is no more for others"
        )
    write_json(
        folder / _REQUEST,
        {
            "task": task.plain(),
            "directory": os.getcwd(),
            "threads": threads,
            "shards": [[shard.name, shard.rows, shard.digest] for shard in shards],
        },
    )
    folders = dict.fromkeys(str(each) for model in models for each in _folders_of(model))
    source = [] if "://" in task.source else [os.path.abspath(task.source)]
    needs = [path for path in source if os.path.exists(path)]  # it may be a pattern
    resources = Resources(threads, memory, (*needs, *folders))
    workers = []
    for number in range(processes):
        name = _WORKER.format(number + 1)
        process = python_command("luthier.workflows.batch_inference", str(folder), name)
        goes_on = "goes on with the rows that are not answered"
        workers.append(ChildProcess(runner, process, resources, folder / name, goes_on))
    progress = _Progress(shards, workers, reporter)
    try:
        codes = run_processes(workers, reporter, progress.ends, END_SECONDS)
    except Interrupted:
        progress.update()
        raise Interrupted(
            f"stopped with {progress.answered_rows:,} of {progress.total:,} rows answered and stored; "
            "the same command goes on with the others"
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
            f"{failed[0] if failed else 'their processes ended'}. Once that is mended, the same "
            "command goes on with them"
        )
    for why in failed:
        reporter.note(f"others answered its rows when it ended; {why}")
    return processes


class _Progress(Reporter):
    """Sees which shards are answered, hears how far others are, and tells a reporter."""

    def __init__(
        self, shards: Sequence[Shard], workers: Sequence[ChildProcess], reporter: Reporter
    ) -> None:
        self._folder, self._workers, self._reporter = shards[0].folder, workers, reporter
        self._left, self._refused, self._next = list(shards), list[Shard](), 0.0
        self._begun: dict[str, int] = {}
        """Rows that are answered of shards that are not, by what was heard last."""
        self.total = sum(shard.rows for shard in shards)
        self.update()

    @property
    def answered_rows(self) -> int:
        """Rows of the shards that are answered."""
        return self.total - sum(shard.rows for shard in (*self._left, *self._refused))

    @property
    def is_done(self) -> bool:
        """Whether all shards are answered, or so many cannot be that no more are looked for."""
        return not self._left or len(self._refused) >= MOST_PROBLEMS

    def progress(self, done: int, total: int, what: str) -> None:
        """Hear from a process how far the shard named ``what`` is."""
        self._begun[what] = done

    def ends(self) -> bool:
        """Whether no more is to be done (:attr:`is_done`), after a look where it is time for
        one."""
        if time.monotonic() >= self._next:
            self.update()
        return self.is_done

    def update(self) -> None:
        """See which shards are answered by now."""
        self._next = time.monotonic() + LOOK_SECONDS
        names = set(os.listdir(self._folder))  # one call, where a stat of each is many
        refused = [shard for shard in self._left if shard.problems.name in names]
        left = [
            shard
            for shard in self._left
            if shard.answers.name not in names and shard.problems.name not in names
        ]
        if len(left) < len(self._left):
            for worker in self._workers:
                worker.reset_starts()
        self._left, self._refused = left, self._refused + refused
        for worker in self._workers:
            worker.reports.hand_on(self)
        begun = sum(self._begun.get(shard.name, 0) for shard in left)
        self._reporter.progress(self.answered_rows + begun, self.total, "answer")


def _memory_of(model: StoredModel) -> int:
    """Bytes that a process takes that answers with ``model``: twice its files while they are
    loaded."""
    return PROCESS_BYTES + 2 * sum(folder_size(f, ".safetensors") for f in _folders_of(model))


def _folders_of(model: StoredModel) -> list[Path]:
    """Folders of a model, and of those below its adapters."""
    return [model.folder, *(_folders_of(model.parent) if model.parent else [])]


def _check_problems(shards: Sequence[Shard], output: Path) -> None:
    """Refuse rows that cannot be answered, the first of them."""
    found = list[Problem]()
    for shard in shards:
        if shard.problems.exists() and len(found) < MOST_PROBLEMS:
            found += [Problem.from_dict(each) for each in read_json(shard.problems)]
    if found:
        answered = sum(shard.rows for shard in shards if shard.answers.exists())
        advice = (
            f"The answers to {answered:,} rows are kept. Fix the other rows in their lines and run the "
            "same command again."
        )
        raise DataError(found, capped=len(found) >= MOST_PROBLEMS, advice=advice)


def _write_output(task: InferenceTask, shards: Sequence[Shard], output: Path) -> dict[str, int]:
    """Put the answers together; what was counted."""
    totals = Counter[str]()
    with ExitStack() as stack:
        file, target = stack.enter_context(new_file(output)), None
        for shard in shards:
            with shard.open_answers() as (counts, answers):
                if target is None:
                    rows = sum(each.rows for each in shards)
                    width = counts.get(NUMBERS, 0) // shard.rows
                    opening = task.open_output(file, output, rows, width)
                    target = stack.enter_context(opening)
                totals.update(counts)
                shutil.copyfileobj(answers, target, 1 << 20)
    return dict(totals)


def main(folder: Path, name: str) -> None:
    """Answer shards of the request in ``folder``, as the process of it that is called so."""
    on_stdin_end(lambda: os._exit(0))  # what it was answering is answered anew
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
        # Another process holds what is left; should it end, its shard is to be had.
        if any(_is_free(shard) for shard in left):
            _answer_free(task, shards[: shards.index(left[-1]) + 1], answer, reporter)
        else:
            time.sleep(LOOK_SECONDS)


def _is_free(shard: Shard) -> bool:
    with lock(shard.lock) as free:
        return free and not shard.is_done


def _answer_free(
    task: InferenceTask, shards: Sequence[Shard], answer: Answer, reporter: Reporter
) -> None:
    """Answer what is left of the first shards of the source, but for what other processes hold."""
    problems = list[Problem]()
    cut = _cut(task, problems)
    for shard in shards:
        rows = next(cut, [])
        if shard.is_done:
            continue
        with lock(shard.lock) as free:
            if not free:
                continue
            if not shard.is_done:
                if len(rows) != shard.rows or _digest(task, rows) != shard.digest:
                    raise RefusedInput(
                        f"{task.source} changed while its rows were answered: leave it as it is, and "
                        "run the same command again"
                    )
                _answer(shard, rows, answer, reporter)
            shard.lock.unlink()


def _answer(shard: Shard, rows: Sequence[InputRow], answer: Answer, reporter: Reporter) -> None:
    """Write the answers to the rows of a shard, or why there are none; ``reporter`` hears how
    far."""
    next_report = time.monotonic() + LOOK_SECONDS

    def report(done: int) -> None:
        nonlocal next_report
        if time.monotonic() >= next_report:
            next_report = time.monotonic() + LOOK_SECONDS
            reporter.progress(done, shard.rows, shard.name)

    try:
        answered = answer(rows, report)
    except DataError as error:
        write_json(shard.problems, [asdict(problem) for problem in error.problems])
        return
    shard.store(answered)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), sys.argv[2])
    except LuthierError as error:
        sys.exit(" ".join(str(error).split()))  # the last line is what people are told
