"""Work on what a client sends, in processes with limits: graders that compare texts, and schemas.

See :mod:`luthier.serving.sandbox_pool_child` for what is limited. Work ends at its limit, and as
soon as its client has hung up; the process that did it is started anew for the next.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from pydantic import Field, SerializeAsAny
from pydantic.json_schema import SkipJsonSchema

from luthier.cancellation import KillHandle, cancellable
from luthier.errors import RecipeError
from luthier.graders import Answer, Grader, Multi, Trouble, Ungraded
from luthier.graders.python_source import SandboxedFunction
from luthier.serving.sandboxed_process import SandboxedProcess, TakesTooMuch, WorkInterrupted

IDLE = 1
"""Processes that wait for work; further ones end with theirs."""
IDLE_SECONDS = 10.0
"""For which one is asked again; it ends by itself a little later, and its memory is given back."""
GRACE_SECONDS = 5.0
"""How much later: no request may meet a process that ends."""
CLOSED = "the service is ending"


class SandboxPool:
    """Processes for one kind of work, as many as are asked at once. Safe to share between threads.

    Whoever asks bounds how many that are.
    """

    def __init__(self, seconds: int, memory: int, subject: str) -> None:
        """``seconds`` of processor time and ``memory`` bytes for one request.

        A refusal says that ``subject`` takes too much.
        """
        self.seconds, self.memory, self._subject = seconds, memory, subject
        self._idle: list[tuple[SandboxedProcess, float]] = []
        """Those that wait for work, and since when."""
        self._lock = threading.Lock()
        self._closed = False

    def ask(self, call: str, **given: Any) -> Any:
        """What the process answers.

        Raises:
            TakesTooMuch: where it reached a limit, or what works on it failed: it would again.
            WorkInterrupted: where it was ended for another reason: the client hung up, the machine is
                busy or out of memory, the service is ending.
        """
        try:
            with self._process() as process:
                return process.ask(call, **given)
        except WorkInterrupted:
            raise
        except RecipeError as error:
            text = str(error)
            raise TakesTooMuch(f"{text[:1].upper()}{text[1:]}.") from error

    def close(self) -> None:
        """End the processes that wait; the others end with their work."""
        with self._lock:
            self._closed, idle = True, self._idle
            self._idle = []
        for process, _ in idle:
            process.close()

    @contextmanager
    def _process(self) -> Iterator[SandboxedProcess]:
        with self._lock:
            if self._closed:
                raise WorkInterrupted(CLOSED)
            process, since = self._idle.pop() if self._idle else (None, 0.0)
        if process is not None and time.monotonic() - since > IDLE_SECONDS:
            process.close()
            process = None
        if process is None:
            process = SandboxedProcess(
                "luthier.serving.sandbox_pool_child",
                (str(self.memory), str(IDLE_SECONDS + GRACE_SECONDS)),
                self.seconds,
                self._subject,
                "for what was sent",
                CLOSED,
            )
        running = cancellable(KillHandle(process.kill))
        try:
            yield process
        finally:
            running.finish()
            with self._lock:
                keep = process.alive and not self._closed and len(self._idle) < IDLE
                if keep:
                    self._idle.append((process, time.monotonic()))
            if not keep:
                process.close()


class SandboxedGrader(Grader):
    """Another grader, at work in a process with limits."""

    method: str
    grader: SerializeAsAny[Grader]
    sandbox: SkipJsonSchema[Any] = Field(exclude=True, repr=False)

    needs_expected = False

    @property
    def is_share(self) -> bool:
        """As the grader."""
        return self.grader.is_share

    @property
    def prefers_batches(self) -> bool:
        """All answers are sent at once."""
        return True

    def grade(self, answers: Sequence[Answer]) -> list[float]:
        """The grader's scores; :class:`TakesTooMuch` or :class:`WorkInterrupted` where it was ended."""
        found = self.sandbox.ask(
            "grade",
            grader=self.grader.model_dump(mode="json"),
            answers=[
                {
                    "reply": answer.reply,
                    "members": dict(answer.row.members or {}),
                    "text_characters": answer.text_characters,
                }
                for answer in answers
            ],
        )
        if found["troubles"]:
            troubles = {i: Trouble(*texts) for i, *texts in found["troubles"]}
            raise Ungraded(found["scores"], troubles)
        scores: list[float] = found["scores"]
        return scores


def sandbox_grader(grader: Grader, sandbox: SandboxPool) -> Grader:
    """``grader`` with all that compares texts at work in processes of ``sandbox``.

    Sources have a sandbox of their own, and models that grade take turns with all others.
    """
    if isinstance(grader, Multi):
        parts = {name: sandbox_grader(part, sandbox) for name, part in grader.graders.items()}
        return grader.model_copy(update={"graders": parts})
    if grader.models or isinstance(grader, SandboxedFunction):
        return grader
    return SandboxedGrader(method=grader.method, grader=grader, sandbox=sandbox)
