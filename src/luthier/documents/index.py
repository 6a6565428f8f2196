"""Index of documents: passages, their words and their embeddings, in one SQLite file.

Words are searched with FTS5 (BM25), embeddings with one exact matrix product, and reciprocal rank
fusion combines both orders. Each document is one transaction: a killed process loses the current
document, and the same command continues. One process writes, and readers continue.

``LUTHIER_HOME/indexes/NAME/`` has a file for each embedding model, and ``current.json`` names the file
in use. An index of another embedding model is built next to the old index, then replaces it.
"""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from luthier.data.spelling import unify_spelling
from luthier.documents.passages import Passage, cut
from luthier.documents.readers import DocumentReader, ReadDocument, normalize
from luthier.errors import CorruptFile, DiskFull, RecipeError
from luthier.evaluation.retrieval import DEPTH, nearest, reciprocal_rank_fusion
from luthier.files import lock, luthier_home, read_json, sha256_of, write_json
from luthier.gate.checks.language import UNSPACED
from luthier.pages import MOST_TEXT, shorten
from luthier.recipe import check_name

if TYPE_CHECKING:
    from luthier.graders.base import Embedder
    from luthier.library.models import StoredModel

MOST_WORDS = 64
"""Maximum number of different words of a question in the search for words: time grows with them."""
READ_AT_ONCE = 10_000
"""Number of embeddings read together: all at once take three times the memory."""
LEAST_FREE = 1 << 20
"""Free bytes of a disk below which an error of SQLite means a full disk."""
FORM = 2
"""Version of the file's tables."""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS about (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS documents (
    id INTEGER PRIMARY KEY, path TEXT NOT NULL UNIQUE, sha256 TEXT NOT NULL, bytes INTEGER NOT NULL,
    modified REAL NOT NULL, note TEXT NOT NULL, refused TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS passages (
    id INTEGER PRIMARY KEY, document INTEGER NOT NULL REFERENCES documents(id), text TEXT NOT NULL,
    heading TEXT NOT NULL, page INTEGER
);
CREATE INDEX IF NOT EXISTS passages_of ON passages(document);
CREATE TABLE IF NOT EXISTS vectors (passage INTEGER PRIMARY KEY, vector BLOB NOT NULL);
CREATE VIRTUAL TABLE IF NOT EXISTS words USING fts5(
    heading, text, content='passages', content_rowid='id', tokenize='{tokenizer}'
);
"""
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class FoundPassage:
    """A passage of a search."""

    document: str
    """Path of the file."""
    passage: Passage
    cosine: float
    """Similarity of the embeddings of question and passage, from -1 to 1."""
    relevance: float | None = None
    """Score of the reranker, if any."""

    @property
    def place(self) -> str:
        """File with page or heading, for readers."""
        name = Path(self.document).name
        if self.passage.page is not None:
            return f"{name}, page {self.passage.page}"
        return f"{name}, {self.passage.heading}" if self.passage.heading else name

    def excerpt(self, characters: int = MOST_TEXT) -> str:
        """Return the beginning of the passage as a line."""
        return shorten(" ".join(self.passage.text.split()), characters)

    def plain(self) -> dict[str, str | int | float | None]:
        """Return JSON values."""
        found = self.passage
        return {
            "document": self.document,
            "page": found.page,
            "heading": found.heading,
            "text": found.text,
            "cosine": round(self.cosine, 4),
            **({} if self.relevance is None else {"relevance": round(self.relevance, 4)}),
        }


@dataclass(frozen=True)
class IndexedDocument:
    """A document of the index."""

    path: str
    passages: int
    note: str
    """Omitted parts, such as pages without text."""
    refused: str
    """Reason for a document without passages; empty for a read document."""


@dataclass(frozen=True)
class IndexUpdate:
    """Changes of an index, in documents."""

    added: int = 0
    changed: int = 0
    removed: int = 0
    unchanged: int = 0
    problems: list[IndexedDocument] = field(default_factory=list)
    """Refused documents, and documents read in part."""

    @property
    def text(self) -> str:
        """The numbers of documents as a line."""
        return (
            f"{self.added:,} documents added, {self.changed:,} changed, {self.removed:,} removed, "
            f"{self.unchanged:,} unchanged"
        )


class DocumentIndex:
    """An index on disk, opened for search or for an update."""

    def __init__(self, name: str, file: Path, connection: sqlite3.Connection) -> None:
        self.name, self.file, self._connection = name, file, connection
        about = dict(connection.execute("SELECT key, value FROM about"))
        if about.get("form") == "1":
            about["form"] = _unify_words(connection)
        if about.get("form") != str(FORM):
            raise CorruptFile(
                f"{file} was written by another version. Remove the index with `luthier index remove` "
                "and add the documents again."
            )
        self.model, self.fingerprint = about["model"], about["fingerprint"]
        self.language, self.updated = about["language"], about.get("updated", "")
        self._vectors: (
            tuple[int, NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]] | None
        ) = None

    @staticmethod
    def folder(name: str) -> Path:
        """Return the folder of the index ``name``."""
        try:
            return luthier_home() / "indexes" / check_name(name)
        except ValueError as error:
            raise RecipeError(f'"{name}" is not a name of an index: {error}') from error

    @staticmethod
    def names() -> list[str]:
        """Return the names of all indexes."""
        return sorted(each.parent.name for each in luthier_home().glob("indexes/*/current.json"))

    @staticmethod
    def unfinished(name: str) -> list[tuple[str, int]]:
        """Return embedding model and number of documents of running and killed updates."""
        found = []
        for file in sorted(DocumentIndex.folder(name).glob("*.sqlite")):
            with open_file(file) as connection:
                about = dict(connection.execute("SELECT key, value FROM about"))
                (count,) = connection.execute("SELECT COUNT(*) FROM documents").fetchone()
                if "unfinished" in about:
                    found.append((about["model"], int(count)))
        return found

    @staticmethod
    @contextmanager
    def open(name: str) -> Iterator[DocumentIndex]:
        """Yield the index ``name`` for searches.

        Raises:
            RecipeError: for an unknown name.
            CorruptFile: for an unreadable file.
        """
        folder = DocumentIndex.folder(name)
        if not (folder / "current.json").is_file():
            raise _unknown(name)
        file = folder / read_json(folder / "current.json")["file"]
        with open_file(file) as connection:
            yield DocumentIndex(name, file, connection)

    @staticmethod
    def remove(name: str, source: Path | None = None) -> None:
        """Remove the index ``name`` with all files, or its documents of a file or folder.

        Raises:
            RecipeError: for an unknown name, a source without documents in the index, or while
                another process writes.
        """
        folder = DocumentIndex.folder(name)
        if not folder.is_dir():
            raise _unknown(name)
        with _writing(folder):
            if source is None:
                shutil.rmtree(folder)
                return
            with DocumentIndex.open(name) as index:
                gone = [path for path in index.paths() if _is_in(path, [source.resolve()])]
                if not gone:
                    raise RecipeError(f'The index "{name}" has no documents in "{source}".')
                index.delete(gone)

    @staticmethod
    @contextmanager
    def update(name: str, stored: StoredModel, language: str) -> Iterator[DocumentIndex]:
        """Yield the index ``name`` of the embedding model ``stored``, to add and remove documents.

        A new file is in use after the block; its search for words depends on ``language``, the ISO
        639 code of the documents.

        Raises:
            RecipeError: while another process writes.
        """
        folder = DocumentIndex.folder(name)
        folder.mkdir(parents=True, exist_ok=True)
        fingerprint = stored.content_hash
        file = folder / f"{fingerprint[:16]}.sqlite"
        with _writing(folder):
            with open_file(file, may_create=True) as connection:
                create(connection, stored.id, fingerprint, language)
                with connection:
                    connection.execute("INSERT OR REPLACE INTO about VALUES ('unfinished', '')")
                yield DocumentIndex(name, file, connection)
                with connection:
                    connection.execute("DELETE FROM about WHERE key = 'unfinished'")
                    connection.execute(
                        "INSERT OR REPLACE INTO about VALUES ('updated', ?)", (_now(),)
                    )
            current = folder / "current.json"
            if current.is_file() and read_json(current)["file"] == file.name:
                return  # a killed switch to another embedding model can continue
            write_json(current, {"file": file.name, "model": stored.id})
            for other in folder.glob("*.sqlite*"):
                if not other.name.startswith(file.name):
                    other.unlink()

    def synchronize(
        self,
        files: Sequence[Path],
        sources: Sequence[Path],
        embed: Embedder,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> IndexUpdate:
        """Read the new and changed ``files``, and remove missing documents of ``sources``."""
        known = {
            path: (digest, size, modified)
            for path, digest, size, modified, refused in self._connection.execute(
                "SELECT path, sha256, bytes, modified, refused FROM documents"
            )
            if not refused  # the reason may be gone
        }
        added = changed = unchanged = 0
        with DocumentReader.open() as reader:
            for done, path in enumerate(files, 1):
                before = known.get(str(path))
                try:
                    status = path.stat()
                    same = before is not None and before[1:] == (status.st_size, status.st_mtime)
                    digest = before[0] if before is not None and same else sha256_of(path)
                except OSError as error:  # without permission, or gone since the list was made
                    self._store(path, ("", 0, 0.0), ReadDocument(refused=str(error)), embed)
                else:
                    about = (digest, status.st_size, status.st_mtime)
                    if before is None or before[0] != digest:
                        read = reader.read(path)
                        self._store(path, about, read, embed)
                        added += before is None and not read.refused
                        changed += before is not None and not read.refused
                    else:
                        unchanged += 1
                        if not same:
                            self._touch(path, status.st_mtime)
                on_progress(done, len(files))
        present = {str(each) for each in files}
        roots = [source.resolve() for source in sources]
        gone = [
            path
            for (path,) in self._connection.execute("SELECT path FROM documents").fetchall()
            if path not in present and _is_in(path, roots)
        ]
        self.delete(gone)
        problems = [each for each in self.documents() if each.note or each.refused]
        return IndexUpdate(added, changed, len(gone), unchanged, problems)

    def _touch(self, path: Path, modified: float) -> None:
        with self._connection:
            self._connection.execute(
                "UPDATE documents SET modified = ? WHERE path = ?", (modified, str(path))
            )

    def _store(
        self, path: Path, about: tuple[str, int, float], read: ReadDocument, embed: Embedder
    ) -> None:
        passages = [*cut(read.pages)]
        vectors = [*embed([each.content for each in passages])] if passages else []
        self.put(str(path), about, read, passages, vectors)

    def put(
        self,
        path: str,
        about: tuple[str, int, float],
        read: ReadDocument,
        passages: Sequence[Passage],
        vectors: Sequence[NDArray[np.float32]],
    ) -> None:
        """Replace the passages of a document, in a transaction.

        ``about`` has SHA-256, size and modification time of the file.
        """
        insert = self._connection.execute
        with self._connection:
            self._delete(path)
            row = insert(
                "INSERT INTO documents (path, sha256, bytes, modified, note, refused) "
                "VALUES (?, ?, ?, ?, ?, ?)",
                (path, *about, read.note, read.refused),
            )
            for passage, vector_H in zip(passages, vectors, strict=True):
                text = (passage.heading, passage.text)
                added = insert(
                    "INSERT INTO passages (document, heading, text, page) VALUES (?, ?, ?, ?)",
                    (row.lastrowid, *text, passage.page),
                ).lastrowid
                vector = np.asarray(vector_H, np.float16).tobytes()
                insert("INSERT INTO vectors VALUES (?, ?)", (added, vector))
                insert(
                    "INSERT INTO words (rowid, heading, text) VALUES (?, ?, ?)",
                    (added, *map(unify_spelling, text)),
                )

    def delete(self, paths: Iterable[str]) -> None:
        """Delete documents, in a transaction."""
        with self._connection:
            for path in paths:
                self._delete(path)

    def _delete(self, path: str) -> None:
        execute = self._connection.execute
        execute("DELETE FROM about WHERE key LIKE 'threshold%'")  # of the passages before
        self._vectors = None
        for number, heading, text in execute(
            "SELECT passages.id, heading, text FROM passages JOIN documents "
            "ON documents.id = document WHERE path = ?",
            (path,),
        ).fetchall():
            execute(
                "INSERT INTO words (words, rowid, heading, text) VALUES ('delete', ?, ?, ?)",
                (number, unify_spelling(heading), unify_spelling(text)),
            )
            execute("DELETE FROM vectors WHERE passage = ?", (number,))
            execute("DELETE FROM passages WHERE id = ?", (number,))
        execute("DELETE FROM documents WHERE path = ?", (path,))

    def documents(self) -> list[IndexedDocument]:
        """Return all documents, by path."""
        return [
            IndexedDocument(*row)
            for row in self._connection.execute(
                "SELECT path, COUNT(passages.id), note, refused FROM documents LEFT JOIN passages "
                "ON documents.id = document GROUP BY documents.id ORDER BY path"
            )
        ]

    def paths(self) -> set[str]:
        """Return the paths of all documents."""
        return {path for (path,) in self._connection.execute("SELECT path FROM documents")}

    def passages(self, path: str) -> list[Passage]:
        """Return the passages of a document, in order."""
        rows = self._connection.execute(
            "SELECT text, heading, page FROM passages JOIN documents ON documents.id = document "
            "WHERE path = ? ORDER BY passages.id",
            (path,),
        )
        return [Passage(*row) for row in rows]

    def search(
        self,
        question: str,
        query_H: NDArray[np.float32],
        count: int,
        *,
        among: Collection[str] | None = None,
        weights: tuple[float, float] = (1.0, 1.0),
    ) -> list[FoundPassage]:
        """Return the ``count`` best passages, the best first, by words and by meaning.

        Args:
            question: Question or words.
            query_H: Embedding of the question.
            count: Maximum number of passages.
            among: Paths of the documents to search; all documents by default.
            weights: Weights of words and of embeddings in the fusion.
        """
        with self._connection:
            # One state of the file: another process may replace a document during the search.
            self._connection.execute("BEGIN")
            documents = None if among is None else self._numbers(among)
            places, scores = self._by_meaning(query_H, documents)
            orders = [self._by_words(question, documents), places]
            best = reciprocal_rank_fusion(orders, weights)[:count]
            return [self._passage(number, query_H, scores.get(number)) for number in best]

    def best_cosines(
        self, question_QH: NDArray[np.float32], among: Collection[str] | None = None
    ) -> NDArray[np.float32]:
        """Return the largest cosine of each question with a passage, ``[Q]``; -1 without passages."""
        _, vector_NH = self._load(None if among is None else self._numbers(among))
        if not len(vector_NH):
            return np.full(len(question_QH), -1, np.float32)
        _, score_Q1 = nearest(question_QH, vector_NH, 1)
        return score_Q1[:, 0]

    def _numbers(self, paths: Collection[str]) -> list[int]:
        """Return the numbers of documents."""
        query = "SELECT id FROM documents WHERE path IN (SELECT value FROM json_each(?))"
        found = self._connection.execute(query, (json.dumps([*paths]),))
        return [number for (number,) in found]

    def _by_words(self, question: str, documents: list[int] | None = None) -> list[int]:
        """Return the passages with words of the question, the best first."""
        words = _WORD.findall(unify_spelling(normalize(question)))
        if self.language in UNSPACED:
            words = [word[n : n + 3] for word in words for n in range(max(1, len(word) - 2))]
        if not words:
            return []
        distinct = [*dict.fromkeys(words)][:MOST_WORDS]
        found = self._connection.execute(
            "SELECT rowid FROM words WHERE words MATCH :words AND (:among IS NULL OR rowid IN "
            "(SELECT id FROM passages WHERE document IN (SELECT value FROM json_each(:among)))) "
            "ORDER BY rank LIMIT :depth",
            {
                "words": " OR ".join(f'"{word}"' for word in distinct),
                "among": None if documents is None else json.dumps(documents),
                "depth": DEPTH,
            },
        )
        return [number for (number,) in found]

    def _by_meaning(
        self, query_H: NDArray[np.float32], documents: list[int] | None
    ) -> tuple[list[int], dict[int, float]]:
        passage_N, vector_NH = self._load(documents)
        if not len(passage_N):
            return [], {}
        places_1K, scores_1K = nearest(query_H[None], vector_NH, DEPTH)
        found = passage_N[places_1K[0]].tolist()
        return found, dict(zip(found, scores_1K[0].tolist(), strict=True))

    def _load(
        self, documents: list[int] | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return the numbers and vectors ``[N, H]`` of the passages of ``documents``.

        All vectors stay in memory, and are read again after a change.
        """
        (version,) = self._connection.execute("PRAGMA data_version").fetchone()
        if self._vectors is None or self._vectors[0] != version:
            rows = self._connection.execute(
                "SELECT passage, document, vector FROM vectors JOIN passages ON id = passage "
                "ORDER BY passage"
            )
            numbers, parts = [np.empty((0, 2), np.int64)], [np.empty((0, 0), np.float32)]
            while chunk := rows.fetchmany(READ_AT_ONCE):
                numbers.append(np.array([row[:2] for row in chunk], np.int64))
                joined = np.frombuffer(b"".join(vector for *_, vector in chunk), np.float16)
                parts.append(joined.astype(np.float32).reshape(len(chunk), -1))
            number_N2, vector_NH = np.concatenate(numbers), np.concatenate(parts[1:] or parts)
            self._vectors = version, number_N2[:, 0], number_N2[:, 1], vector_NH
        _, passage_N, document_N, vector_NH = self._vectors
        if documents is not None:
            kept_N = np.isin(document_N, documents)
            if not kept_N.all():
                passage_N, vector_NH = passage_N[kept_N], vector_NH[kept_N]
        return passage_N, vector_NH

    def _passage(
        self, number: int, query_H: NDArray[np.float32], cosine: float | None
    ) -> FoundPassage:
        path, text, heading, page, vector = self._connection.execute(
            "SELECT path, text, heading, page, vector FROM passages JOIN documents "
            "ON documents.id = document JOIN vectors ON passage = passages.id "
            "WHERE passages.id = ?",
            (number,),
        ).fetchone()
        if cosine is None:  # found by words alone
            cosine = float(np.frombuffer(vector, np.float16).astype(np.float32) @ query_H)
        return FoundPassage(path, Passage(text, heading, page), cosine)

    def threshold(self, scorer: str = "") -> float | None:
        """Return the score of the best passage above which a question may have an answer here.

        ``scorer`` is the reranker that scores; by default the score is the cosine.
        """
        row = self._connection.execute(
            "SELECT value FROM about WHERE key = ?", (f"threshold{scorer}",)
        ).fetchone()
        return None if row is None else float(row[0])

    def keep_threshold(self, value: float, scorer: str = "") -> None:
        """Store the :meth:`threshold` until the passages change."""
        with self._connection:
            self._connection.execute(
                "INSERT OR REPLACE INTO about VALUES (?, ?)", (f"threshold{scorer}", str(value))
            )


def _is_in(path: str, roots: Iterable[Path]) -> bool:
    return any(Path(path).is_relative_to(root) for root in roots)


def _tokenizer(language: str) -> str:
    """Return the tokenizer of FTS5. Diacritics are kept: they are tones in Vietnamese."""
    if language in UNSPACED:
        return "trigram"
    words = "unicode61 remove_diacritics 0"
    return f"porter {words}" if language == "en" else words


def _unify_words(connection: sqlite3.Connection) -> str:
    """Bring the words of an index of form 1 to the spelling of form 2, and return the form."""
    with connection:
        # The first statement takes the lock: another process may have converted the index before.
        connection.execute("UPDATE about SET value = '2' WHERE key = 'form'")
        connection.execute("INSERT INTO words (words) VALUES ('delete-all')")
        read = connection.execute("SELECT id, heading, text FROM passages")
        connection.executemany(
            "INSERT INTO words (rowid, heading, text) VALUES (?, ?, ?)",
            (
                (number, unify_spelling(heading), unify_spelling(text))
                for number, heading, text in read
            ),
        )
    return "2"


def _unknown(name: str) -> RecipeError:
    if DocumentIndex.unfinished(name):
        return RecipeError(
            f'The index "{name}" is unfinished. Repeat `luthier index add FOLDER --name {name}`.'
        )
    known = ", ".join(DocumentIndex.names()) or "none"
    return RecipeError(
        f'There is no index "{name}". Known indexes: {known}. `luthier index add FOLDER --name {name}` '
        "creates it."
    )


@contextmanager
def open_file(file: Path, *, may_create: bool = False) -> Iterator[sqlite3.Connection]:
    """Yield a connection to the file of an index."""
    address = f"{file.absolute().as_uri()}?mode={'rwc' if may_create else 'rw'}"
    try:
        with closing(
            sqlite3.connect(address, timeout=30, check_same_thread=False, uri=True)
        ) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
            yield connection
    except sqlite3.OperationalError as error:  # locked, missing, read-only
        # Without space for its shared memory, SQLite reports an I/O error.
        is_full = shutil.disk_usage(file.parent).free < LEAST_FREE
        if is_full or error.sqlite_errorcode == sqlite3.SQLITE_FULL:
            raise DiskFull(f"the disk of {file.parent} is full. Free some space") from error
        raise RecipeError(f"The index {file} cannot be used: {error}.") from error
    except sqlite3.DatabaseError as error:
        raise CorruptFile(
            f"{file} is damaged: {error}. Remove the index with `luthier index remove` and add the "
            "documents again."
        ) from error


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    with lock(folder.with_name(f"{folder.name}.lock")) as free:
        if not free:
            raise RecipeError(f"Another process writes {folder.name}. Wait until it finishes.")
        yield


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def create(connection: sqlite3.Connection, model: str, fingerprint: str, language: str) -> None:
    """Create the tables of an index; an existing index stays."""
    about = {
        "form": str(FORM), "model": model, "fingerprint": fingerprint, "language": language,
        "created": _now(),
    }  # fmt: skip
    connection.executescript(_SCHEMA.format(tokenizer=_tokenizer(language)))
    with connection:
        connection.executemany("INSERT OR IGNORE INTO about VALUES (?, ?)", about.items())
