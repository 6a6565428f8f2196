"""Forwarding of a reporter's calls between processes, in a file with one call per line.

["note", ["the text"]]    ["metrics", [{"step": 1, ...}, 81]]
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from luthier.engine.metrics import Reporter, without_rows

LOOK_SECONDS = 0.1
"""Interval between two reads of the file, in seconds."""


class ReportFile(Reporter):
    """Reporter with a file as output, one line per call."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def metrics(self, line: Mapping[str, Any], steps: int) -> None:
        """Write the line without row-level values, which no reader displays."""
        super().metrics(without_rows(line), steps)

    def receive(self, method: str, *arguments: Any) -> None:
        """Append the call to the file."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([method, arguments], default=str) + "\n")


class ReportReader:
    """Reader of the file of a :class:`ReportFile`."""

    def __init__(self, path: Path) -> None:
        self.path, self._place = path, 0

    def forward(self, reporter: Reporter) -> None:
        """Report the new lines since the last call to ``reporter``."""
        if not self.path.is_file():
            return
        with self.path.open("rb") as file:
            file.seek(self._place)
            lines = file.read().split(b"\n")
        # The writer may be in the middle of the last line: leave the rest for the next call.
        for line in lines[:-1]:
            # Advance before the call, so that a line whose report raises is not reported again.
            self._place += len(line) + 1
            method, arguments = json.loads(line)
            getattr(reporter, method)(*arguments)

    def remove(self) -> None:
        """Delete the file."""
        self.path.unlink(missing_ok=True)


@contextmanager
def forward_reports(path: Path, reporter: Reporter) -> Iterator[None]:
    """Forward the new lines of ``path`` to ``reporter`` during the block.

    An exception of ``reporter`` is raised at the end of the block; ``reporter`` receives no more
    calls.
    """
    ended = threading.Event()
    reader = ReportReader(path)
    raised: list[BaseException] = []

    def forward_new() -> None:
        while True:
            try:
                # After an exception the reader still advances, but a silent reporter receives the
                # calls.
                reader.forward(Reporter() if raised else reporter)
            except BaseException as error:
                raised.append(error)
            else:
                return

    def follow() -> None:
        while not ended.wait(LOOK_SECONDS):
            forward_new()

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        # The last lines may have been written after the thread's last look.
        forward_new()
    if raised:
        raise raised[0]
