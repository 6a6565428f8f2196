"""Batch inference: the rows of a file answered by several processes, here or on a cluster.

    source → shards of rows → processes with the model loaded once → a file for each shard → output

The rows are read one after the other and never all held, by this process to check them and by each of
the others to answer its shards. A process takes the next shard that nobody holds or has answered
(``flock``, so that what a killed one held is free again), and writes its answers whole or not at all,
into a folder beside the output. A shard is named by the hash of what decides its answers: the rows, the
settings and the files of the model. So the same command goes on where it was cut short. Of a row that
was edited its shard is answered anew; of one that was put in or taken out, all behind it, too. The
output is put together from the shards in the order of the rows, to the bytes of any other number of
processes on machines of one kind: processors and graphics cards round in different ways.
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
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import luthier
from luthier.cancellation import on_stdin_end
from luthier.data.media import Media
from luthier.data.shapes import MediaRow
from luthier.engine.metrics import Reporter
from luthier.engine.processes import PROCESS_BYTES, check_room
from luthier.errors import (
    MOST_PROBLEMS,
    BoundedProblems,
    DataError,
    LuthierError,
    Problem,
    RecipeError,
    RefusedInput,
    RowRefused,
    RunConflict,
    data_errors,
)
from luthier.files import folder_size, lock, new_file, read_json, sweep, write_bytes, write_json
from luthier.store.models import StoredModel, content_hash
from luthier.workflows.child_processes import (
    SAFE_PATH,
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

LOOK_SECONDS = 1.0
"""Between two looks at which shards are answered."""
SHARDS = ".{}.shards"
"""Name of the folder beside the output; a folder that is read as data passes over hidden names."""
_REQUEST, _LOCK, _WORKER = "request.json", ".lock", "process-{}"
_ANSWERS, _PROBLEMS = ".answers", ".problems.json"


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
        """A line of JSON with counts, then what is written for the rows."""
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


def shards_folder(output: Path) -> Path:
    """Where the answers to the shards of ``output`` lie until it is whole."""
    return output.with_name(SHARDS.format(output.name))


def _make_folder(output: Path) -> Path:
    """The folder of the shards of ``output``, made or left by an earlier command.

    Raises:
        RecipeError: where the output is no plain file, or the folder is somebody else's.
    """
    folder = shards_folder(output)
    if os.path.exists(output) and not os.path.isfile(output):
        raise RecipeError(f"{output} is no plain file: name one for the answers")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        foreign = not (folder / _LOCK).exists() and any(folder.iterdir())
    except OSError as error:
        raise RecipeError(f"there is no place for {folder}: {error.strerror}") from error
    if foreign:
        raise RecipeError(
            f"{folder} holds files of something else, and would be removed: move it, or name another "
            "output"
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
        DataError: naming every row that cannot be read, before anything is answered, or that cannot be
            answered; the answers to the others are kept for the next call.
        RunConflict: another command answers rows for the same output now.
        Interrupted: on Ctrl-C or SIGTERM; the same call goes on.
        LuthierError: where the processes ended before all rows were answered.
    """
    runner, reporter = runner or InferenceRunner(), reporter or Reporter()
    started = time.monotonic()
    output = output.absolute()
    folder = _make_folder(output)
    with lock(folder / _LOCK) as free:
        if not free:
            raise RunConflict(
                f"another command is writing {output}: wait for its end, or name another output"
            )
        try:
            models = task.needed_models()
            shards = [*_shards(task, models, folder)]
            _clear(folder)
            resumed = sum(shard.rows for shard in shards if shard.is_done)
            count = 0
            if not all(shard.is_done for shard in shards):
                count = _answer_shards(task, models, shards, processes, runner, reporter)
            _check_problems(shards, output)
            counts = _write_output(task, shards, output)
        except LuthierError:
            if not any(folder.glob(f"*{_ANSWERS}")):  # else they are for the next call
                shutil.rmtree(folder)
            raise
        shutil.rmtree(folder)
    rows = sum(shard.rows for shard in shards)
    return FileAnswers(rows, resumed, count, time.monotonic() - started, counts)


def _shards(task: InferenceTask, models: Sequence[StoredModel], folder: Path) -> Iterator[Shard]:
    """The shards of ``task``, all rows of which are checked.

    Raises:
        DataError: naming every row that cannot be read or asked this.
    """
    decides = [luthier.__version__, task.settings(), [content_hash(model) for model in models]]
    problems = BoundedProblems()
    with data_errors(task.outcome):
        for number, rows in enumerate(_cut(task, problems)):
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
    """The rows of ``task`` in shards."""
    rows = iter(task.rows(problems))
    while shard := [*islice(rows, task.shard_rows)]:
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
    """Remove what an earlier command left, but for answers: their settings may be asked for again."""
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
    processes, threads = runner.plan_processes(processes, memory, left)
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
        module = "luthier.workflows.batch_inference"
        process = [sys.executable, *SAFE_PATH, "-m", module, str(folder), name]
        goes_on = "goes on with the rows that are not answered"
        workers.append(ChildProcess(runner, process, resources, folder / name, goes_on))
    progress = _Progress(shards, workers, reporter)
    again = "stopped; the same command goes on with the rows that are not answered"
    codes = run_processes(workers, reporter, again, progress.ends)
    progress.update()
    failed = [
        f"{worker.work.name}: {worker.reason(code)}"
        for worker, code in zip(workers, codes, strict=True)
        if code
    ]
    if not progress.is_done:
        raise LuthierError(
            f"{progress.missing:,} of {progress.total:,} rows are not answered "
            f"({failed[0] if failed else 'their processes ended'}). The same command goes on with them"
        )
    for why in failed:
        reporter.note(f"others answered its rows when it ended; {why}")
    return processes


class _Progress:
    """Sees which shards are answered, and tells a reporter."""

    def __init__(
        self, shards: Sequence[Shard], workers: Sequence[ChildProcess], reporter: Reporter
    ) -> None:
        self._folder, self._workers, self._reporter = shards[0].folder, workers, reporter
        self._left, self._refused, self._next = list(shards), 0, 0.0
        self.total = sum(shard.rows for shard in shards)
        self.update()

    @property
    def missing(self) -> int:
        """Rows that are not answered."""
        return sum(shard.rows for shard in self._left)

    @property
    def is_done(self) -> bool:
        """Whether all shards are answered, or so many cannot be that no more are looked for."""
        return not self._left or self._refused >= MOST_PROBLEMS

    def ends(self) -> bool:
        """The same, after a look where it is time for one."""
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
        self._left, self._refused = left, self._refused + len(refused)
        self._reporter.progress(self.total - self.missing, self.total, "answer")


def _memory_of(model: StoredModel) -> int:
    """Bytes that a process takes that answers with ``model``: twice its files while they are loaded."""
    return PROCESS_BYTES + 2 * sum(folder_size(f, ".safetensors") for f in _folders_of(model))


def _folders_of(model: StoredModel) -> list[Path]:
    """Folders of a model, and of those below its adapters."""
    return [model.folder, *(_folders_of(model.parent) if model.parent else [])]


def _check_problems(shards: Sequence[Shard], output: Path) -> None:
    """Refuse rows that cannot be answered, the first of them."""
    found = list[Problem]()
    for shard in shards:
        if shard.problems.exists() and len(found) < MOST_PROBLEMS:
            found += [Problem(**each) for each in read_json(shard.problems)]
    if found:
        answered = sum(shard.rows for shard in shards if shard.answers.exists())
        kept = (
            f"{output} is not written; the answers to {answered:,} rows are kept. Mend these in their "
            "lines, and the same command goes on"
        )
        raise DataError(found, kept, capped=len(found) >= MOST_PROBLEMS)


def _write_output(task: InferenceTask, shards: Sequence[Shard], output: Path) -> dict[str, int]:
    """Put the answers together; what was counted."""
    totals = Counter[str]()
    with ExitStack() as stack:
        file, target = stack.enter_context(new_file(output)), None
        for shard in shards:
            with shard.answers.open("rb") as answers:
                counts = json.loads(answers.readline())
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
    answer = task.open()
    while left := [shard for shard in shards if not shard.is_done]:
        # Another process holds what is left; should it end, its shard is to be had.
        if any(_is_free(shard) for shard in left):
            _answer_free(task, shards[: shards.index(left[-1]) + 1], answer)
        else:
            time.sleep(LOOK_SECONDS)


def _is_free(shard: Shard) -> bool:
    with lock(shard.lock) as free:
        return free and not shard.is_done


def _answer_free(task: InferenceTask, shards: Sequence[Shard], answer: Answer) -> None:
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
                _answer(shard, rows, answer)
            shard.lock.unlink()


def _answer(shard: Shard, rows: Sequence[InputRow], answer: Answer) -> None:
    """Write the answers to the rows of a shard, or why there are none."""
    try:
        answered = answer(rows)
    except DataError as error:
        write_json(shard.problems, [asdict(problem) for problem in error.problems])
        return
    write_bytes(shard.answers, json.dumps(answered.counts).encode() + b"\n" + answered.data)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), sys.argv[2])
    except LuthierError as error:
        sys.exit(" ".join(str(error).split()))  # the last line is what people are told
