"""Files that clients of the service may name: those inside the folders it was started with.

Whether a file outside is there is not told: every address outside is refused in the same words.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote

from luthier.errors import LocationRefused

_SCHEME = "file://"


class FileRoots:
    """The folders, resolved once."""

    def __init__(self, roots: Sequence[Path]) -> None:
        self._roots = [root.resolve() for root in roots]

    def path(self, uri: str, name: str = "") -> Path:
        """The path of ``file:///…``, or of ``name`` below it, without ``..`` and symbolic links."""
        text = unquote(uri.removeprefix(_SCHEME)) if uri.startswith(_SCHEME) else ""
        if not text.startswith("/"):
            raise LocationRefused("A file:// location is a path from the root: file:///folder/file")
        try:
            resolved = (Path(text) / name).resolve()
        except (OSError, RuntimeError, ValueError):
            resolved = Path("/")  # a loop, a NUL, a name that is too long: nothing that is inside
        if not any(resolved.is_relative_to(root) for root in self._roots):
            text = (
                "Files are read and written only in the folders that the server was started with."
            )
            raise LocationRefused(text)
        return resolved

    def named(self, uri: str, ending: str) -> list[Path]:
        """The file of an address; of one that ends with ``/``, all below it with that ending."""
        path = self.path(uri)
        if not uri.endswith("/"):
            return [path]
        # What is a link there may lead outside, and is looked at again.
        below = [each for each in sorted(path.rglob(f"*{ending}")) if each.is_file()]
        if not below:
            raise LocationRefused(f"There is no file below {uri} that ends with {ending}.")
        return [self.path(each.as_uri()) for each in below]

    def folder(self, uri: str, most: int) -> list[tuple[str, Path]]:
        """Names and paths of the files right below an address, in order.

        Raises:
            LocationRefused: where there is no such folder, or more than ``most`` entries in it.
        """
        path = self.path(uri)
        try:
            with os.scandir(path) as entries:
                names = [each.name for each in islice(entries, most + 1)]
            if len(names) > most:
                raise LocationRefused(f"There are more than {most:,} entries in {uri}.")
            # What is a link there may lead outside, and is looked at again.
            found = [(name, self.path((path / name).as_uri())) for name in sorted(names)]
        except OSError as error:
            raise LocationRefused(f"{uri} cannot be read: {error.strerror}") from None
        return [(name, each) for name, each in found if each.is_file()]

    def open(self, path: Path, uri: str) -> BinaryIO:
        """A plain file, for reading."""
        try:
            if not stat.S_ISREG(path.stat().st_mode):
                raise LocationRefused(f"{uri} is not a file.")
            return os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb")
        except OSError as error:
            raise LocationRefused(f"{uri} cannot be read: {error.strerror}") from None

    def check_writable(self, uri: str) -> None:
        """Refuse an address below which no file can be made."""
        path = self.path(uri)
        existing = next(each for each in (path, *path.parents) if each.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            raise LocationRefused(f"Nothing can be written below {uri}.")
