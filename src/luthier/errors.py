"""One tree of errors. The command line turns each into its exit code.

    LuthierError                exit 1: something failed while we worked
    ├── RefusedInput            exit 2: refused before any work was done
    │   ├── DataError           rows that would fail or mislead; carries each problem
    │   ├── RowRefused          one such row, on its way to a DataError
    │   ├── RecipeError         unknown option, impossible value, pair that cannot work
    │   ├── UnknownModel        no such base or custom model
    │   ├── ModelRefused        a model from outside breaks a rule; carries file, rule and fix
    │   ├── DoesNotFit          not enough memory or disk for what was asked
    │   │   └── DiskFull        exit 1: no room is left now; with some it would go on
    │   ├── RunConflict         the name is taken, or there is nothing to resume
    │   ├── NameInUse           another job or model of the account has the name
    │   ├── QuotaExceeded       the account has as many as it may have
    │   ├── WrongState          what is asked of a job is not possible where it stands
    │   ├── LocationRefused     an address of data that cannot be read from, or written to
    │   └── ObjectRefused       what the object store does not do; carries S3's name for it
    ├── ReadOnlyDisk            the disk takes no more writes; when it does again it would go on
    ├── DownloadError           a source could not be read, or gave other bytes than pinned
    ├── UploadError             a model could not be put where others fetch it
    ├── CorruptFile             a stored file no longer matches its recorded hash
    ├── GradingFailed           a grader raised, hung, or gave no score; carries each problem
    ├── Diverged                the loss is no longer a finite number
    ├── ProcessLost             another process of the run is gone or hangs; a new start goes on
    ├── LeaseLost               a worker no longer holds its job; it must not write
    └── Interrupted             exit 130: stopped by the user; the run can be resumed

To add an error, subclass the nearest branch; the exit code is inherited.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace


class LuthierError(Exception):
    """Base of all errors raised on purpose. ``exit_code`` is what a command ends with."""

    exit_code = 1
    reported = False
    """Whether another process of the run raised it, and reported it to this one."""


class RefusedInput(LuthierError):
    """The request was refused before any work; nothing was written."""

    exit_code = 2


class RowRefused(RefusedInput):
    """One row cannot be used: rule, message and fix. Where file and line are known, a `Problem`."""

    def __init__(self, rule: str, message: str, fix: str, place: str = "") -> None:
        """``place`` says in words which row it is, where that is known when it is refused."""
        super().__init__(f"{place}{': ' if place else ''}[{rule}] {message} Fix: {fix}")
        self.rule, self.message, self.fix, self.place = rule, message, fix, place

    def at(self, file: str, line: int) -> Problem:
        """The same as a problem of a file; line 0 is the file as a whole."""
        return Problem(file, line, self.rule, self.message, self.fix)


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with one row: where, which rule, and how to mend it."""

    file: str
    line: int
    """1-based line in the file; 0 when the whole file is meant."""
    rule: str
    """Stable id of the rule, for example ``json.invalid``."""
    message: str
    fix: str

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}" if self.line else self.file
        return f"{where}: [{self.rule}] {self.message} Fix: {self.fix}"


class DataError(RefusedInput):
    """Data that would fail or mislead. All problems are kept, the first twenty causes are printed."""

    shown = 20
    shown_lines = 3
    """Further lines that are named of rows with the same cause."""

    def __init__(
        self,
        problems: Iterable[Problem],
        outcome: str = "nothing was trained",
        capped: bool = False,
    ) -> None:
        """``capped`` says that reading stopped at so many problems, and there may be more."""
        self.problems: Sequence[Problem] = tuple(problems)
        self.outcome, self.capped = outcome, capped
        super().__init__(self._text())

    def _text(self) -> str:
        count = len(self.problems)
        counted = (
            f"{count} or more problems" if self.capped else f"{count} problem{'s' * (count != 1)}"
        )
        lines = [f"{counted} in the data; {self.outcome}."]
        causes: dict[Problem, list[int]] = {}
        for problem in self.problems:
            causes.setdefault(replace(problem, line=0), []).append(problem.line)
        for cause, found in list(causes.items())[: self.shown]:
            lines.append(f"  {replace(cause, line=found[0])}{self._also(found[1:])}")
        if left := sum(len(found) for found in list(causes.values())[self.shown :]):
            lines.append(f"  … and {self._at_least(left)} more.")
        return "\n".join(lines)

    def _also(self, further: Sequence[int]) -> str:
        """The lines of further rows that the same is wrong with."""
        if not further:
            return ""
        named = ", ".join(map(str, further[: self.shown_lines]))
        more = len(further) - self.shown_lines
        return f" (also line{'s' * (len(further) > 1)} {named}" + (
            f" and {self._at_least(more)} more)" if more > 0 else ")"
        )

    def _at_least(self, count: int) -> str:
        return f"{'at least ' if self.capped else ''}{count}"


MOST_PROBLEMS = 100
"""Reading stops after so many: a file of another format may hold millions."""


class BoundedProblems(list[Problem]):
    """Problems of data that may hold millions; at :data:`MOST_PROBLEMS` it refuses the data."""

    def append(self, problem: Problem) -> None:
        """Add ``problem``, and raise where no more fit."""
        super().append(problem)
        if len(self) >= MOST_PROBLEMS:
            raise DataError(self, capped=True)

    def refuse(self) -> None:
        """Raise where there are any."""
        if self:
            raise DataError(self)


@contextmanager
def data_errors(outcome: str) -> Iterator[None]:
    """End refusals of data with ``outcome``, where something else than training was asked for."""
    try:
        yield
    except DataError as error:
        raise DataError(error.problems, outcome, error.capped) from error


class RecipeError(RefusedInput):
    """A recipe that cannot be carried out: unknown option, impossible value or pair.

    ``setting`` is the first wrong setting by its name in a recipe, such as ``training.epochs``, and
    ``value`` its value, if they are known.
    """

    def __init__(self, message: str, setting: str | None = None, value: object = None) -> None:
        super().__init__(message)
        self.setting, self.value = setting, value


class UnknownModel(RefusedInput):
    """No base or custom model answers to this id."""


class ModelRefused(RefusedInput):
    """A model from outside that cannot be taken: its file, the rule that it breaks, and the fix."""

    def __init__(self, file: str, rule: str, message: str, fix: str) -> None:
        self.problem = Problem(file, 0, rule, message, fix)
        super().__init__(str(self.problem))


class DoesNotFit(RefusedInput):
    """The estimate says that memory or disk would not be enough."""


class DiskFull(DoesNotFit):
    """A disk has no room now. What was asked would fit on it, so it is no fault of the request."""

    exit_code = 1


class ReadOnlyDisk(LuthierError):
    """A disk takes no writes now: it is mounted so, or the system found errors on it."""


class RunConflict(RefusedInput):
    """The name is taken by another run, or there is no run to resume."""


class NameInUse(RefusedInput):
    """A name is taken in this account. ``kind`` is what has it: ``job`` or ``model``."""

    def __init__(self, kind: str) -> None:
        # Clients compare this text byte for byte (Airflow's operator of Bedrock).
        super().__init__(f"The provided {kind} name is currently in use.")
        self.kind = kind


class QuotaExceeded(RefusedInput):
    """The account has as many of something as it may have; ``quota`` names it, where it is known."""

    def __init__(self, message: str, quota: str = "") -> None:
        super().__init__(message)
        self.quota = quota


class WrongState(RefusedInput):
    """What is asked of a job or a model is not possible in the state it is in."""


class LocationRefused(RefusedInput):
    """Data cannot be read from, or written to, an address of the service's clients."""


class ObjectRefused(RefusedInput):
    """The object store refuses: ``code`` is S3's name for it, such as ``NoSuchKey``."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code, self.message = code, message


class ProcessLost(LuthierError):
    """Another process of the same run is gone, hangs, or failed; a new start of all goes on."""


class LeaseLost(LuthierError):
    """A worker wrote for a job that it no longer holds; nothing was written."""


class DownloadError(LuthierError):
    """A source could not be read, or its bytes are not the pinned ones."""


class UploadError(LuthierError):
    """A model could not be put where others fetch it; what arrived there is not sent again."""


class CorruptFile(LuthierError):
    """A stored file no longer matches the hash recorded beside it."""


class GradingFailed(LuthierError):
    """A grader raised, hung, or gave no usable score. All problems are kept, five different printed."""

    shown = 5

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems: Sequence[Problem] = tuple(problems)
        count = len(self.problems)
        lines = [f"{count} answer{'s' if count != 1 else ''} could not be graded."]
        # A row is answered several times; what goes wrong with it is told once.
        counts = list(Counter(map(str, self.problems)).items())[: self.shown]
        lines += [f"  {text}" + f" ({n} times)" * (n > 1) for text, n in counts]
        if left := count - sum(times for _, times in counts):
            lines.append(f"  … and {left} more.")
        super().__init__("\n".join(lines))


class Diverged(LuthierError):
    """The loss or a gradient is no longer finite."""


class Interrupted(LuthierError):
    """Stopped by the user at a step boundary; a checkpoint was written."""

    exit_code = 130


def report_error(error: Exception) -> dict[str, str]:
    """What other processes are told of ``error``: the class to restore and the message, as JSON.

    Of a class from another module it is the first of its bases that this module defines.
    """
    known = [kind.__name__ for kind in type(error).__mro__ if globals().get(kind.__name__) is kind]
    return {"error": (known or [type(error).__name__])[0], "message": str(error)}


def restore_error(name: str, message: str) -> LuthierError | None:
    """The error that :func:`report_error` names; ``None`` where nobody raised it on purpose.

    Of a class that carries more than its message it is the branch.
    """
    kind = globals().get(name)
    if not (isinstance(kind, type) and issubclass(kind, LuthierError)):
        return None
    if kind.__init__ not in (LuthierError.__init__, RecipeError.__init__):
        kind = RefusedInput if issubclass(kind, RefusedInput) else LuthierError
    error = kind(message)
    error.reported = True
    return error
