"""Files and lines of data: encrypted where the store is, and as they are where it is not.

Who reads need not know: what was written before the store became encrypted is read as it is.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from luthier.encryption.chunks import MAGIC, SealedReader, SealedWriter
from luthier.encryption.keys import keyring, keys_for, needed_keyring, open_bytes, seal_bytes
from luthier.errors import CorruptFile
from luthier.files import Sink, luthier_home, new_file, new_folder

READ_SIZE = 1 << 20
_SEALED, _PLACE = "sealed", "place"


@contextmanager
def new_data_file(path: Path) -> Iterator[Sink]:
    """As :func:`luthier.files.new_file`: when the block ends well its content is ``path``."""
    ring = keys_for(path)
    with new_file(path) as file:
        if ring is None:
            yield file
        else:
            writer = SealedWriter(file, ring)
            yield writer
            writer.finish()


def is_sealed(path: Path) -> bool:
    """Whether a file is encrypted."""
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def pieces_of(path: Path) -> Iterator[bytes]:
    """The content of a file, encrypted or not.

    Raises:
        CorruptFile: where an encrypted one was changed, or is of another store.
        WrongKey: where the key is missing.
    """
    if is_sealed(path):
        with SealedReader(path, needed_keyring(path)) as reader:
            yield from reader.pieces()
        return
    with path.open("rb") as file:
        while piece := file.read(READ_SIZE):
            yield piece


def read_data(path: Path) -> bytes:
    """The same in one piece."""
    return b"".join(pieces_of(path))


def copy_plain(source: Path, target: Path) -> None:
    """Write the content of ``source`` to ``target``, which lies in memory or belongs to a user."""
    with new_file(target) as file:
        for piece in pieces_of(source):
            file.write(piece)


def seal(source: Path, target: Path) -> None:
    """Make ``target`` a copy of a plain file, encrypted where the store is."""
    with source.open("rb") as plain, new_data_file(target) as file:
        while piece := plain.read(READ_SIZE):
            file.write(piece)


def seal_folder(source: Path, target: Path) -> None:
    """Make ``target`` a copy of a folder of plain files, encrypted where the store is."""
    with new_folder(target) as fresh:
        for path in files_below(source):
            seal(path, fresh / path.relative_to(source))


def open_folder(source: Path, target: Path) -> None:
    """The opposite: plain files; ``target`` lies in memory."""
    with new_folder(target) as fresh:
        for path in files_below(source):
            copy_plain(path, fresh / path.relative_to(source))


def place_of(path: Path, number: int | None = None) -> str:
    """What a line is bound to: its file in the store and, where lines keep their places, its number."""
    path, home = path.resolve(), luthier_home().resolve()
    name = path.relative_to(home).as_posix() if path.is_relative_to(home) else path.name
    return name if number is None else f"{name}:{number}"


def seal_line(text: str, place: str | None = None) -> str:
    """A line of JSON as the store keeps it; where that is encrypted, an object of two fields.

    ``place`` stands in it, readable and authenticated: :func:`open_line` is told where a line was
    found, and refuses one of another place. All lines have one key.
    """
    ring = keyring()
    if ring is None:
        return text
    sealed = seal_bytes(ring.cipher(ring.current, b"", b"line"), text.encode(), _bound(place))
    record = {_SEALED: f"{ring.current}.{base64.b64encode(sealed).decode()}"}
    return json.dumps(record if place is None else {**record, _PLACE: place})


def open_line(line: bytes | str, place: str | None = None) -> Any:
    """The value of a line of JSON that the store keeps, encrypted or not.

    Lines of earlier versions know no place and are read wherever they stand.

    Raises:
        ValueError: for what is no JSON.
        CorruptFile: where it was changed, is of another store, or was written for another ``place``.
    """
    return open_value(json.loads(line), place)


def open_value(value: Any, place: str | None = None) -> Any:
    """The same of a line that was read already."""
    if not (isinstance(value, dict) and set(value) in ({_SEALED}, {_SEALED, _PLACE})):
        return value
    from cryptography.exceptions import InvalidTag

    written = value.get(_PLACE)
    if None not in (written, place) and written != place:
        raise CorruptFile(f"a line was moved: it was written for {written} and stands in {place}")
    key_id, _, text = str(value[_SEALED]).partition(".")
    ring = needed_keyring("a line")
    try:
        cipher, sealed = ring.cipher(key_id, b"", b"line"), base64.b64decode(text, validate=True)
        return json.loads(open_bytes(cipher, sealed, _bound(written)))
    except (InvalidTag, ValueError):
        raise CorruptFile("a line does not open: it was changed since it was encrypted") from None


def opened_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file to be read by people: texts as they are, other values as JSON.

    Raises:
        CorruptFile: where a line was changed, or moved to this file of the store. In a copy that lies
            elsewhere lines say of themselves where they stood.
    """
    inside = path.resolve().is_relative_to(luthier_home().resolve())
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
                numbered = isinstance(record, dict) and ":" in str(record.get(_PLACE))
                place = place_of(path, number if numbered else None) if inside else None
                value = open_value(record, place)
            except ValueError:
                yield line
                continue
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            yield text.encode() + b"\n"


def seal_value(value: Any, place: str | None = None) -> Any:
    """``value``, ready for JSON, as a database keeps it in an encrypted store."""
    return json.loads(seal_line(json.dumps(value), place))


def seal_json(text: str, place: str) -> dict[str, Any]:
    """The JSON of an object as a database keeps it, bound to ``place``: elsewhere it does not open.

    It is kept as text: what a model writes may hold U+0000, which JSON in PostgreSQL cannot.
    """
    sealed: dict[str, Any] = seal_value({"text": text}, place)
    return sealed


def open_json(sealed: Any, place: str) -> dict[str, Any]:
    """The object that :func:`seal_json` was given as JSON."""
    # Earlier versions kept the lines of batches under another name.
    (text,) = open_value(sealed, place).values()
    found: dict[str, Any] = json.loads(text)
    return found


def seal_text(text: str) -> str:
    """Words as a database keeps them in an encrypted store; in a plain one as they are."""
    return text if keyring() is None else seal_line(json.dumps(text))


def open_text(text: str) -> str:
    """The opposite of :func:`seal_text`."""
    if not text.startswith(f'{{"{_SEALED}": "') or keyring() is None:
        return text
    return str(open_line(text))


def _bound(place: Any) -> bytes | None:
    """What is authenticated with a line."""
    return None if place is None else f"place {place}".encode(errors="surrogatepass")


def files_below(folder: Path) -> list[Path]:
    """All files of a folder and of those in it, sorted."""
    return sorted(path for path in folder.rglob("*") if path.is_file())
