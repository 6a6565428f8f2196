"""What a model writes, as those read it who asked. Nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from queue import SimpleQueue
from typing import Any

from luthier.serving.inference import Called, End, Event, InferenceFailed, Piece, Whole

ENDED: Any = None
"""Stands behind the last event of a stream that was cut short."""


Meter = Callable[[str, int, int], None]
"""Told the stored id of a model, tokens that it read, and tokens that it wrote."""
_metered: ContextVar[Meter | None] = ContextVar("metered", default=None)


@contextmanager
def metered(count: Meter) -> Iterator[None]:
    """``count`` hears what models read and write for what is asked of them in the block.

    It is called by any thread, and may be after the block: a stream is counted when it ends.
    """
    token = _metered.set(count)
    try:
        yield
    finally:
        _metered.reset(token)


def count_tokens(model_id: str, read: int, written: int = 0) -> None:
    """Say what a model read and wrote to whoever counts it."""
    if (count := _metered.get()) is not None:
        count(model_id, read, written)


def metered_stream(stream: Stream, model_id: str) -> Stream:
    """``stream`` of a model, whose tokens are counted when it ends."""
    if (count := _metered.get()) is not None:
        stream.at_end(lambda: count(model_id, stream.prompt_tokens, stream.written()))
    return stream


class Stream:
    """What a model writes for one request, as it comes. Closing it ends the work at once."""

    def __init__(
        self,
        events: SimpleQueue[Any],
        prompt_tokens: int,
        n: int,
        written: Callable[[], int] = lambda: 0,
    ) -> None:
        self.prompt_tokens = prompt_tokens
        """Tokens of the prompt, template included."""
        self.written = written
        """Gives the tokens that were written so far, for all answers."""
        self._events, self._n, self._left = events, n, n
        self._at_end: list[Callable[[], None]] = []
        self._interruption: InferenceFailed | None = None

    def at_end(self, act: Callable[[], None]) -> None:
        """Call ``act`` once, when the last answer ended or the stream was closed."""
        self._at_end.append(act)

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Event:
        """The next piece; blocks.

        Raises:
            InferenceFailed: where the work failed; nothing follows.
        """
        if not self._left:
            raise StopIteration
        event = self._interruption or self._events.get()
        # What was written before it waits in the queue, and an answer that is cut needs none of it.
        event = self._interruption or event
        if isinstance(event, BaseException):
            self.close()
            raise event
        if event is ENDED or not self._left:
            raise StopIteration
        if isinstance(event, End):
            self._left -= 1
            if not self._left:
                self.close()
        assert isinstance(event, Piece | Called | End)
        return event

    def close(self) -> None:
        """Let go of it; the answers that are not whole are not written further. Any thread may."""
        self._left = 0
        # Who reads it may come to its end at the same time.
        with suppress(IndexError):
            while True:
                self._at_end.pop()()
        self._events.put(ENDED)  # for one who waits for the next piece

    def interrupt(self) -> None:
        """End it as a failure, for who reads it: the service ends before the answer. Any thread may."""
        text = "The service is ending. Ask again; the answer is not whole."
        self._interruption = InferenceFailed("ServiceUnavailable", text)
        self._events.put(ENDED)  # for one who waits for the next piece

    def whole(self) -> list[Whole]:
        """All answers, once they are there.

        Raises:
            InferenceFailed: where the work failed, or somebody closed the stream before.
        """
        answers = [Whole() for _ in range(self._n)]
        missing = self._n  # it may be closed already, by a client that hung up at once
        for event in self:
            answers[event.index].take(event)
            missing -= isinstance(event, End)
        if missing:
            raise InferenceFailed("ServiceUnavailable", "The answer was given up half-way.")
        return answers
