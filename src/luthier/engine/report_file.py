"""Forwarding of a reporter's calls between processes, in a file with one call per line.

["note", ["the text"]]    ["metrics", [{"step": 1, ...}, 81]]
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
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

    def stage(self, text: str) -> None:
        """See :class:`Reporter`."""
        self._append("stage", text)

    def settings(self, defaults: Sequence[tuple[str, Any, str]]) -> None:
        """See :class:`Reporter`."""
        self._append("settings", list(defaults))

    def note(self, text: str) -> None:
        """See :class:`Reporter`."""
        self._append("note", text)

    def nothing_to_resume(self, model_id: str) -> None:
        """See :class:`Reporter`."""
        self._append("nothing_to_resume", model_id)

    def progress(self, done: int, total: int, what: str) -> None:
        """See :class:`Reporter`."""
        self._append("progress", done, total, what)

    def metrics(self, line: Mapping[str, Any], steps: int) -> None:
        """See :class:`Reporter`."""
        self._append("metrics", without_rows(line), steps)

    def _append(self, method: str, *arguments: Any) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([method, arguments], default=str) + "\n")


class ReportReader:
    """Reader of the file of a :class:`ReportFile`."""

    def __init__(self, path: Path) -> None:
        self.path, self._place = path, 0

    def hand_on(self, reporter: Reporter) -> None:
        """Report the new lines since the last call to ``reporter``."""
        if not self.path.is_file():
            return
        with self.path.open("rb") as file:
            file.seek(self._place)
            lines = file.read().split(b"\n")
        for line in lines[:-1]:  # what follows the last line end is being written
            self._place += len(line) + 1
            method, arguments = json.loads(line)
            getattr(reporter, method)(*arguments)

    def remove(self) -> None:
        """Delete the file."""
        self.path.unlink(missing_ok=True)


@contextmanager
def handing_on(path: Path, reporter: Reporter) -> Iterator[None]:
    """Forward the new lines of ``path`` to ``reporter`` during the block.

    An exception of ``reporter`` is raised at the end of the block; ``reporter`` receives no more
    calls.
    """
    ended = threading.Event()
    reader = ReportReader(path)
    raised: list[BaseException] = []

    def hand_on() -> None:
        while True:
            try:
                reader.hand_on(Reporter() if raised else reporter)
            except BaseException as error:
                raised.append(error)
            else:
                return

    def follow() -> None:
        while not ended.wait(LOOK_SECONDS):
            hand_on()

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        hand_on()
    if raised:
        raise raised[0]
