"""Documents of a folder, each read in a child process with limits of memory and time."""

from __future__ import annotations

import codecs
import json
import os
import selectors
import subprocess
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.data.files.sources import TABLE_ENDINGS
from luthier.data.in_memory import store_rows
from luthier.data.languages import detect_languages
from luthier.data.rows import load_documents
from luthier.errors import DataError, Location, Problem, RecipeError
from luthier.processes import KillHandle, cancellable, python_command

TEXT_FORMATS = (".md", ".txt", ".rst")
LIBRARY_FORMATS = (".pdf", ".docx", ".pptx", ".xlsx", ".html", ".htm", ".epub")
FORMATS = (*TEXT_FORMATS, *LIBRARY_FORMATS)
"""Extensions of the supported formats; :data:`LIBRARY_FORMATS` need the extra ``documents``."""
ROW_FORMATS = (*TABLE_ENDINGS, ".json")
SECONDS = 120.0
"""Time limit of a document, and of each scanned page."""
READ_BYTES = 1 << 16
"""Bytes of an answer that are read at once: the capacity of a pipe."""
MOST_BYTES = 512 << 20
"""Largest document."""
LANGUAGE_DOCUMENTS, LANGUAGE_CHARACTERS = 10, 5_000
"""Number of documents, and of characters of each, from which languages are detected."""
LANGUAGE_SHARE = 0.2
"""Minimum share of the sample for a language that the choice of a model considers: of more than 5
documents, two documents."""
ENCODINGS = {
    "cp1252": ("de", "en", "fr", "es", "it", "pt", "nl", "sv", "da", "no", "nb", "nn", "fi", "ca"),
    "cp1258": ("vi",),
    "cp1250": ("pl", "cs", "sk", "hu", "hr", "sl"),
    "cp1251": ("ru", "uk", "bg", "mk", "sr"),
    "cp1253": ("el",),
    "cp1254": ("tr",),
    "gb18030": ("zh",),
    "shift_jis": ("ja",),
    "euc_kr": ("ko",),
}
"""Encodings of texts that are not UTF-8, with the languages of each. The frequencies of characters,
as in charset-normalizer, do not separate them: French in cp1252 looks like cp1250."""


@dataclass(frozen=True)
class DocumentPage:
    """A page of a document, or a whole document without pages."""

    text: str
    """Markdown."""
    number: int | None = None
    """Number from 1; ``None`` for formats without pages."""


@dataclass(frozen=True)
class ReadDocument:
    """Content of a document, or the reason for a refusal."""

    pages: tuple[DocumentPage, ...] = ()
    note: str = ""
    """Omitted parts, such as pages without text."""
    refused: str = ""
    """Reason for a refusal; empty for a document with content."""


def visible_files(folder: Path) -> Iterator[Path]:
    """Yield the files below ``folder`` without hidden files and folders."""
    for each in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in each.relative_to(folder).parts)
        if not hidden and each.is_file():
            yield each


def document_files(sources: Sequence[Path]) -> list[Path]:
    """Return the documents in ``sources``, files or folders, sorted by path, without
    :func:`outward_links`.

    Raises:
        RecipeError: for a missing source, an unsupported file, or a folder without documents.
    """
    if not sources:
        raise RecipeError("no documents are given. Name a file or a folder.")
    files: set[Path] = set()
    for source in sources:
        if source.is_dir():
            inside = {
                each
                for each in visible_files(source)
                if each.suffix.lower() in FORMATS
                and each.name[0] != "~"
                and not _leaves(each, source)
            }
            if not inside:
                raise RecipeError(
                    f'"{source}" has no documents. Supported: {", ".join(FORMATS)}. '
                    "`luthier index remove NAME FOLDER` removes deleted documents from an index."
                )
            files |= inside
        elif not source.is_file():
            raise RecipeError(
                f'"{source}" does not exist. `luthier index remove NAME SOURCE` removes deleted '
                "documents from an index."
            )
        elif source.suffix.lower() not in FORMATS:
            raise RecipeError(f'"{source}" is not a document. Supported: {", ".join(FORMATS)}')
        else:
            files.add(source)
    return sorted({each.resolve() for each in files})


def other_formats(sources: Sequence[Path]) -> Counter[str]:
    """Return the number of files in folders of ``sources`` that are no documents, by extension."""
    inside = (each for source in sources if source.is_dir() for each in visible_files(source))
    endings = (each.suffix.lower() or "without extension" for each in inside)
    return Counter(each for each in endings if each not in FORMATS)


def outward_links(sources: Sequence[Path]) -> list[Path]:
    """Return the ignored links in folders of ``sources`` to documents or folders outside."""
    return sorted(
        each
        for source in sources
        if source.is_dir()
        for each in source.rglob("*")
        if _leaves(each, source) and (each.is_dir() or each.suffix.lower() in FORMATS)
    )


def _leaves(path: Path, folder: Path) -> bool:
    return path.is_symlink() and not path.resolve().is_relative_to(folder.resolve())


class DocumentReader:
    """Reads documents, one at a time. The child process starts with the first document that needs a
    library, and again after a crash."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self._seconds = seconds
        self._child: subprocess.Popen[bytes] | None = None

    @staticmethod
    @contextmanager
    def open() -> Iterator[DocumentReader]:
        """Yield a reader; the reader's process ends with the block."""
        reader = DocumentReader()
        try:
            yield reader
        finally:
            reader.close()

    def close(self) -> None:
        """End the child process."""
        if self._child is not None:
            self._child.kill()
            self._child.communicate()
            self._child = None

    def read(self, path: Path) -> ReadDocument:
        """Return the content of ``path``, or the reason for a refusal.

        Raises:
            RecipeError: if the libraries for documents are not installed.
        """
        try:
            size = path.stat().st_size
            if size > MOST_BYTES:
                return ReadDocument(refused=f"{size:,} bytes; the limit is {MOST_BYTES:,}")
            if path.suffix.lower() in TEXT_FORMATS:
                text, note = _read_text(path)
                answer: dict[str, Any] = {"pages": [[None, text]], "note": note}
            else:
                answer = self._ask(path)
        except (OSError, RecipeError) as error:
            return ReadDocument(refused=str(error))
        if "missing" in answer:
            raise RecipeError(
                f"\"{path}\" needs libraries for documents. Run pip install 'luthier[documents]'"
            )
        if "error" in answer:
            return ReadDocument(refused=str(answer["error"]))
        pages = tuple(DocumentPage(normalize(text), number) for number, text in answer["pages"])
        pages = tuple(page for page in pages if page.text.strip())
        note = str(answer["note"])
        return ReadDocument(pages, note) if pages else ReadDocument(refused=note or "no text")

    def _ask(self, path: Path) -> dict[str, Any]:
        if self._child is None:
            self._child = subprocess.Popen(
                python_command("luthier.documents.extract"),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        child = self._child
        assert child.stdin is not None and child.stdout is not None
        work = cancellable(KillHandle(child.kill))
        line, ready = bytearray(), True
        # Not `select.select`, which rejects the descriptors of a server with 1,024 open files.
        selector = selectors.DefaultSelector()
        selector.register(child.stdout, selectors.EVENT_READ)
        try:
            child.stdin.write(json.dumps(str(path)).encode() + b"\n")
            child.stdin.flush()
            while not line.endswith(b"\n"):
                ready = bool(selector.select(self._seconds))
                received = os.read(child.stdout.fileno(), READ_BYTES) if ready else b""
                line += received
                if not received:
                    break
        except BrokenPipeError:
            ready, line = True, bytearray()
        finally:
            selector.close()
            work.finish()
        if line.endswith(b"\n"):
            answer: dict[str, Any] = json.loads(line)
            return answer
        self.close()
        reason = "the reader crashed" if ready else f"takes more than {self._seconds:.0f} s"
        return {"error": reason}


def _read_text(path: Path) -> tuple[str, str]:
    """Return a text, and a note about an encoding besides UTF-8, and UTF-16 with its mark.

    An older encoding is certain if it makes the text one of the encoding's languages.

    Raises:
        RecipeError: for text in another encoding.
    """
    content = path.read_bytes()
    is_wide = content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    with suppress(UnicodeDecodeError):
        return content.decode("utf-16" if is_wide else "utf-8-sig"), ""
    special = b"\n".join(line for line in content.splitlines() if not line.isascii())
    for encoding, languages in ENCODINGS.items():
        with suppress(UnicodeDecodeError):
            text = content.decode(encoding)
            sample = normalize(special[:LANGUAGE_CHARACTERS].decode(encoding, "ignore"))
            if detect_languages([sample])[0] in languages:
                return text, f"read as {encoding}; save the file as UTF-8 if letters are wrong"
    raise RecipeError("not UTF-8 text; save the file as UTF-8")


def normalize(text: str) -> str:
    """Return ``text`` with composed characters (NFC), so that equal words are equal, in valid
    Unicode."""
    return unicodedata.normalize("NFC", text.encode("utf-8", "replace").decode())


def has_documents(source: str | Path) -> bool:
    """Return whether ``source`` is a document, or a folder with documents, in a format besides
    text."""
    path = Path(source)
    inside = visible_files(path) if path.is_dir() else [path] if path.is_file() else []
    return any(each.suffix.lower() in LIBRARY_FORMATS for each in inside)


def read_texts(source: Path) -> Iterator[tuple[Path, str]]:
    """Yield path and Markdown of each document in ``source``.

    Raises:
        RecipeError: for a folder with files of rows next to documents.
        DataError: after the last document, with every document that cannot be read.
    """
    rows = [each for each in visible_files(source) if each.suffix.lower() in ROW_FORMATS]
    if rows:
        raise RecipeError(
            f'"{source}" has documents and files of rows, such as {rows[0].name}. Move them to '
            "different folders."
        )
    problems = []
    with DocumentReader.open() as reader:
        for path in document_files([source]):
            read = reader.read(path)
            if read.refused:
                advice = "Remove the file, or save it in another format."
                message = f"The document cannot be read: {read.refused}."
                problems.append(Problem("file.invalid", message, advice, Location(str(path))))
            else:
                yield path, "\n\n".join(page.text for page in read.pages)
    if problems:
        raise DataError(problems)


def as_rows(source: Any) -> Any:
    """Return a file with a row of text for each document of ``source``; other sources unchanged.

    A workbook stays unchanged, because a table has rows, not text.
    """
    is_path = isinstance(source, str | Path)
    if not is_path or Path(source).suffix.lower() == ".xlsx" or not has_documents(source):
        return source
    return store_rows(document_rows(Path(source)), name="documents")


def document_rows(source: Path) -> Iterator[dict[str, str]]:
    """Yield a row of text for each document of ``source``, with the path in the folder; see
    :func:`read_texts`."""
    folder = source.resolve() if source.is_dir() else source.resolve().parent
    for path, text in read_texts(source):
        yield {"text": text, "source": str(path.relative_to(folder))}


def load_texts(sources: Iterable[str | Path]) -> list[str]:
    """Return the texts of ``sources``: documents, or files with a text per row.

    Raises:
        DataError: with documents that cannot be read.
    """
    texts: list[str] = []
    for source in sources:
        if has_documents(source):
            texts += [text for _, text in read_texts(Path(source))]
        else:
            texts += load_documents([str(source)])
    return texts


def frequent_languages(files: Sequence[Path]) -> list[str]:
    """Return the ISO 639 codes of a sample of documents, the most frequent first, without languages
    of less than :data:`LANGUAGE_SHARE` of the sample."""
    codes = Counter[str]()
    with DocumentReader.open() as reader:
        step = -(-len(files) // LANGUAGE_DOCUMENTS)
        for path in files[::step]:
            text = " ".join(page.text for page in reader.read(path).pages[:5])
            codes.update(detect_languages([text[:LANGUAGE_CHARACTERS]]))
    least = LANGUAGE_SHARE * codes.total()
    return [code for code, count in codes.most_common() if code and count >= least]
