"""The errors raised by luthier on purpose, and the problem in each error.

    LuthierError                exit 1: a failure during the work
    ├── RefusedInput            exit 2: rejected before any work
    │   ├── DataError           rows or files that cannot be used; one problem for each
    │   ├── RowRefused          one such row, on its way to a DataError
    │   ├── RecipeError         unknown option, impossible value or combination
    │   ├── UnknownModel        no base or custom model of this id
    │   ├── ModelRefused        an imported model that breaks a rule
    │   ├── DoesNotFit          not enough memory or disk space
    │   │   └── DiskFull        exit 1: a full disk; the same request fits after a cleanup
    │   ├── RunConflict         the run's name is taken, or no run to resume
    │   ├── NameInUse           another job or model of the account has the name
    │   ├── QuotaExceeded       a quota of the account is used up
    │   ├── WrongState          an operation that the job's state does not allow
    │   ├── LocationRefused     an address that the service cannot read or write
    │   └── ObjectRefused       an operation of the object store; the rule is S3's error code
    ├── ReadOnlyDisk            a disk that accepts no writes
    ├── OutOfMemory             a failed allocation; the same request fits later
    ├── DownloadError           a source that cannot be read, or has other bytes than pinned
    ├── UploadError             a model that cannot be uploaded
    ├── CorruptFile             a stored file that does not match its recorded hash
    ├── GradingFailed           answers that a grader could not grade; one problem for each
    ├── Diverged                a loss that is not finite
    ├── ProcessLost             another process of the run ended or hangs
    ├── LeaseLost               a worker that no longer holds its job
    └── Interrupted             exit 130: stopped by the user; the run can be resumed

To add an error, subclass the nearest branch and give it a ``default_rule``.
"""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar, Self

_IN_MEMORY = re.compile(r"(?:(rows|train|validation|test|corpus)-[0-9a-f]{16}\.jsonl|(\w+)\[\])$")
"""Stored rows of a program (``luthier.data.in_memory``), or ``NAME[]`` for an argument."""
_DOCUMENTS = re.compile(r"documents-[0-9a-f]{16}\.jsonl$")


class RowNumber(int):
    """Number of a row, from 1, in a file whose rows are no lines.

    Examples are an array on one line, rows inside an object, Parquet and a folder of images.
    """

    name: str
    """Path of the row inside of a folder, such as a message; empty if rows have none."""

    def __new__(cls, number: int, name: str = "") -> Self:
        """Create the number of a row with a name."""
        made = super().__new__(cls, number)
        made.name = name
        return made


def location_text(file: str, line: int) -> str:
    """Return ``file:line``, ``file row N``, ``rows[index]`` for a row that a program passed, or the
    name of a document that became a row.

    Line 0 is the whole file.
    """
    in_memory = _IN_MEMORY.search(file)
    if not line:
        return in_memory[in_memory.lastindex or 0] if in_memory else file
    if _DOCUMENTS.search(file) and line <= len(names := _document_names(file)):
        return names[line - 1]
    if in_memory:
        return f"{location_text(file, 0)}[{line - 1}]"
    if isinstance(line, RowNumber):
        return f"{file}/{line.name}" if line.name else f"{file} {line_text(line)}"
    return f"{file}:{line}"


@lru_cache(maxsize=1)
def _document_names(file: str) -> list[str]:
    """Return the document of each row; empty if the file is gone."""
    try:
        with open(file, "rb") as rows:
            return [json.loads(row)["source"] for row in rows]
    except OSError:
        return []


def line_text(line: int, file: str = "") -> str:
    """Return ``line N``, ``row N``, or ``rows[index]`` for a row that a program passed."""
    if _IN_MEMORY.search(file):
        return location_text(file, line)
    return f"{'row' if isinstance(line, RowNumber) else 'line'} {line}"


def line_field(line: int) -> dict[str, int]:
    """Return the number as the field ``line`` or ``row`` of a JSON record."""
    return {"row" if isinstance(line, RowNumber) else "line": line}


def read_line_field(record: Mapping[str, Any]) -> int:
    """Return the number that :func:`line_field` wrote."""
    return RowNumber(record["row"]) if "row" in record else int(record["line"])


@dataclass(frozen=True, slots=True)
class Location:
    """The place of a problem: a file with a line, or a field of a request."""

    file: str = ""
    line: int = 0
    """1-based line in ``file``, or :class:`RowNumber`; 0 for the whole file."""
    field: str = ""
    """Field of a request, such as ``messages[2].content``."""

    def __str__(self) -> str:
        return location_text(self.file, self.line) or self.field


NOWHERE = Location()


@dataclass(frozen=True, slots=True)
class Problem:
    """A broken rule of an input or of a step of the work, with the place and the fix."""

    rule: str
    """Stable id, for example ``json.invalid``."""
    message: str
    advice: str = ""
    """How to fix the problem."""
    location: Location = NOWHERE
    setting: str | None = None
    """Name of the invalid setting in a recipe, such as ``training.epochs``."""
    value: object = None
    """Wrong value of ``setting`` or of the field at ``location``."""

    def __str__(self) -> str:
        if not self.advice:
            return f"{self.location}: {self.message}" if self.location.file else self.message
        where = f"{self.location}: " if self.location.file else ""
        return f"{where}[{self.rule}] {self.text}"

    @property
    def text(self) -> str:
        """The message with the advice, for APIs that return rule and location in their own fields."""
        return f"{self.message} Fix: {self.advice}" if self.advice else self.message

    @property
    def file(self) -> str:
        """File of the location."""
        return self.location.file

    @property
    def line(self) -> int:
        """Line of the location."""
        return self.location.line

    def at(self, file: str, line: int = 0) -> Problem:
        """Return the problem with another location."""
        return replace(self, location=Location(file, line))

    def to_dict(self) -> dict[str, Any]:
        """Return the problem in JSON types, with the location's fields next to the others.

        A :class:`RowNumber` has the key ``row`` instead of ``line``.
        """
        fields = asdict(self)
        # A recipe value may be any object.
        fields["value"] = json.loads(json.dumps(self.value, default=str))
        location = fields.pop("location")
        return {**line_field(location.pop("line")), **location, **fields}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Problem:
        """Return the problem of :meth:`to_dict`."""
        place = {"file", "line", "row", "field"}
        rest = {name: value for name, value in fields.items() if name not in place}
        return cls(
            **rest, location=Location(fields["file"], read_line_field(fields), fields["field"])
        )


class LuthierError(Exception):
    """Base of all errors raised on purpose. ``exit_code`` is the exit code of a command."""

    exit_code = 1
    default_rule: ClassVar[str] = "internal"
    """Default of ``rule``."""
    reported = False
    """True for an error that another process of the run raised and reported."""

    problem: Problem
    """The first problem."""
    problems: Sequence[Problem]
    """All problems; several only for errors about rows."""

    def __init__(
        self,
        message: str = "",
        *,
        rule: str = "",
        location: Location = NOWHERE,
        setting: str | None = None,
        value: object = None,
        advice: str = "",
    ) -> None:
        rule = rule or self.default_rule
        self.problem = Problem(rule, message, advice, location, setting, value)
        self.problems = (self.problem,)
        super().__init__(str(self.problem))

    def __reduce__(self) -> tuple[Any, ...]:
        """Return the error for another process, such as a worker of joblib."""
        return type(self).of_problems, (self.problems, self.args[0]), self.__dict__

    @property
    def rule(self) -> str:
        """Rule of the first problem."""
        return self.problem.rule

    @property
    def setting(self) -> str | None:
        """Setting of the first problem."""
        return self.problem.setting

    @property
    def text(self) -> str:
        """The message without rule and request field, for APIs with separate fields for both."""
        alone = len(self.problems) == 1 and not self.problem.location.file
        return self.problem.text if alone else str(self)

    @classmethod
    def of_problems(cls, problems: Iterable[Problem], text: str = "") -> Self:
        """Return an error of this class for ``problems``; ``text`` replaces the composed message."""
        error = cls.__new__(cls)
        LuthierError._carry(error, problems, text)
        return error

    def _carry(self, problems: Iterable[Problem], text: str = "") -> None:
        self.problems = tuple(problems)
        self.problem = next(iter(self.problems), Problem(self.default_rule, text))
        self.args = (text or str(self.problem),)


class RefusedInput(LuthierError):
    """An input that is rejected before any work; no file was written."""

    exit_code = 2
    default_rule = "input.refused"


class RowRefused(RefusedInput):
    """One invalid row. The caller adds file and line if known."""

    def __init__(self, rule: str, message: str, advice: str, location: Location = NOWHERE) -> None:
        super().__init__(message, rule=rule, advice=advice, location=location)

    def at(self, file: str, line: int) -> Problem:
        """Return the problem at a line of a file; line 0 is the whole file."""
        return self.problem.at(file, line)


class DataError(RefusedInput):
    """Data on which training would fail or learn nothing useful."""

    default_rule = "data.invalid"
    capped = False
    """True if reading stopped before the end of the data."""

    def __init__(
        self, problems: Iterable[Problem], *, capped: bool = False, advice: str = ""
    ) -> None:
        found = tuple(dict.fromkeys(problems))  # encoding and the checks both open an image
        self.capped = capped
        count = f"{len(found)}{' or more' * capped} problem{'s' * (capped or len(found) != 1)}"
        text = _list_problems(f"{count} in the data.", found, 20, capped)
        self._carry(found, f"{text}\n{advice}".rstrip())


CAUSES_PER_FIX = 3
"""Most causes with the same fix in one message."""


def _list_problems(title: str, problems: Sequence[Problem], most: int, capped: bool = False) -> str:
    """Return ``title`` and the first ``most`` causes, each with the lines of more rows.

    At most three causes have one fix, because messages such as token counts differ by row.
    """
    least = "at least " * capped
    lines_of_cause: dict[Problem, dict[int, None]] = {}
    for problem in problems:
        cause = problem.at(problem.location.file)
        lines_of_cause.setdefault(cause, {})[problem.location.line] = None
    text = [title]
    causes_of_fix: dict[tuple[str, str, str], int] = {}
    shown: list[Problem] = []
    for cause in lines_of_cause:
        fix = cause.location.file, cause.rule, cause.advice
        causes_of_fix[fix] = causes_of_fix.get(fix, 0) + 1
        if causes_of_fix[fix] <= CAUSES_PER_FIX and len(shown) < most:
            shown.append(cause)
    for cause in shown:
        line_numbers = lines_of_cause[cause]
        first, *others = line_numbers
        start = 1 if _IN_MEMORY.search(cause.location.file) else 0
        unit = "row" if start or isinstance(first, RowNumber) else "line"
        numbers = ", ".join(str(each - start) for each in others[:3])
        if _DOCUMENTS.search(cause.location.file):
            unit = "document"
            numbers = ", ".join(location_text(cause.location.file, each) for each in others[:3])
        also = f" (also {unit}{'s' * (len(others) > 1)} {numbers}"
        more = f" and {least}{len(others) - 3} more)" if len(others) > 3 else ")"
        where = cause.at(cause.location.file, first)
        text.append(f"  {where}{also + more if others else ''}")
    if left := sum(len(lines_of_cause[cause]) for cause in lines_of_cause.keys() - {*shown}):
        text.append(f"  … and {least}{left} more.")
    return "\n".join(text)


MOST_PROBLEMS = 100
"""Number of problems that stops reading: a file of another format may have millions."""


class BoundedProblems(list[Problem]):
    """A list of problems that raises :class:`DataError` at :data:`MOST_PROBLEMS`."""

    def append(self, problem: Problem) -> None:
        """Add ``problem``, and raise if the list is full."""
        super().append(problem)
        if len(self) >= MOST_PROBLEMS:
            raise DataError(self, capped=True)

    def refuse(self) -> None:
        """Raise if the list has a problem."""
        if self:
            raise DataError(self)


class RecipeError(RefusedInput):
    """An invalid recipe or option: unknown name, impossible value or combination."""

    default_rule = "recipe.invalid"


def check_at_least_one(**numbers: int | None) -> None:
    """Raise :class:`RecipeError` for a given number below 1, by the name of its argument."""
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise RecipeError(f"`{name}` must be at least 1, not {number}", setting=name)


class UnknownModel(RefusedInput):
    """An id of no base and no custom model."""

    default_rule = "model.unknown"


class ModelRefused(RefusedInput):
    """A rejected model of a different trainer."""

    default_rule = "model.refused"

    def __init__(self, file: str, rule: str, message: str, advice: str) -> None:
        super().__init__(message, rule=rule, advice=advice, location=Location(file))


class DoesNotFit(RefusedInput):
    """An estimate that exceeds the memory or the disk space."""

    default_rule = "machine.too_small"


class DiskFull(DoesNotFit):
    """A disk without free space. The request itself is not at fault."""

    exit_code = 1
    default_rule = "disk.full"


class ReadOnlyDisk(LuthierError):
    """A read-only disk: mounted read-only, or after an error of the file system."""

    default_rule = "disk.read_only"


class OutOfMemory(LuthierError):
    """A failed allocation: other programs use the memory now."""

    default_rule = "memory.short"


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an allocation failed, on the CPU or on a GPU."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    # By name and text, because torch is not imported here. On a CPU, torch raises a RuntimeError.
    return (
        isinstance(error, MemoryError | OutOfMemory)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    )


@contextmanager
def memory_errors() -> Iterator[None]:
    """Convert a failed allocation to :class:`OutOfMemory`."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error) or isinstance(error, OutOfMemory):
            raise
        raise OutOfMemory(
            "too little memory is free on this machine",
            advice="Free some memory and resume the run. If memory stays short, use a smaller "
            "`training.micro_batch_tokens`.",
        ) from error


class RunConflict(RefusedInput):
    """A run name in use, or a run that does not exist and cannot be resumed."""

    default_rule = "run.conflict"


class NameInUse(RefusedInput):
    """A name in use in this account: ``job.name_taken`` or ``model.name_taken``."""

    default_rule = "model.name_taken"

    def __init__(self, kind: str) -> None:
        # Airflow's Bedrock operator compares this message byte for byte.
        text = f"The provided {kind} name is currently in use."
        field = "name" if kind == "job" else "model_name"
        super().__init__(text, rule=f"{kind}.name_taken", location=Location(field=field))


class QuotaExceeded(RefusedInput):
    """A used-up quota of the account; ``setting`` is the name of the quota, if any."""

    default_rule = "quota.exceeded"


class WrongState(RefusedInput):
    """An operation that the state of a job or model does not allow."""

    default_rule = "state.wrong"


class LocationRefused(RefusedInput):
    """An address that the service does not access for clients."""

    default_rule = "location.refused"


class ObjectRefused(RefusedInput):
    """A refusal of the object store; ``rule`` is S3's error code, such as ``NoSuchKey``."""

    default_rule = "InvalidRequest"

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message, rule=code)


class ProcessLost(LuthierError):
    """A lost, failed or hanging process of the run; a restart of all processes resumes the run."""

    default_rule = "process.lost"


class LeaseLost(LuthierError):
    """A rejected write of a worker after the loss of its job's lease."""

    default_rule = "lease.lost"


class DownloadError(LuthierError):
    """An unreadable source, or a source whose bytes differ from the pinned hash."""

    default_rule = "download.failed"


class UploadError(LuthierError):
    """An upload that failed; a retry sends only the missing files."""

    default_rule = "upload.failed"


class CorruptFile(LuthierError):
    """A stored file with a different hash than recorded."""

    default_rule = "file.corrupt"


class GradingFailed(LuthierError):
    """Answers without a usable score, because a grader raised or timed out."""

    default_rule = "grading.failed"

    def __init__(self, problems: Iterable[Problem]) -> None:
        found = tuple(problems)
        title = f"{len(found)} answer{'s' * (len(found) != 1)} could not be graded."
        self._carry(found, _list_problems(title, found, 5))


class Diverged(LuthierError):
    """A loss or a gradient that is not finite."""

    default_rule = "training.diverged"


class Interrupted(LuthierError):
    """A run that the user stopped; the last checkpoint is kept."""

    exit_code = 130
    default_rule = "run.interrupted"


def report_error(error: Exception, prefix: str = "") -> dict[str, Any]:
    """Return ``error`` as JSON for another process, with ``prefix`` before the message.

    ``error`` is the most specific class that this module defines.
    """
    classes = [
        kind.__name__ for kind in type(error).__mro__ if globals().get(kind.__name__) is kind
    ]
    report: dict[str, Any] = {"error": (classes or [type(error).__name__])[0]}
    if isinstance(error, LuthierError):
        report["problems"] = [problem.to_dict() for problem in error.problems]
    return report | {"message": f"{prefix}{error}"}


def restore_error(report: Mapping[str, Any]) -> LuthierError:
    """Return the error of :func:`report_error`; a plain :class:`LuthierError` for an unknown class."""
    kind = globals().get(report["error"])
    if not (isinstance(kind, type) and issubclass(kind, LuthierError)):
        return LuthierError(report["message"])
    error = kind.of_problems(map(Problem.from_dict, report["problems"]), report["message"])
    error.reported = True
    return error
