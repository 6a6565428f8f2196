"""Token ids in a file, and training sequences from the file.

    tokens/train.bin, tokens/validation.bin    little-endian ids of 16 or 32 bits
    tokens/tokens.json                         count, id type and hash of each file

A sequence is read on access, so memory does not grow with the file. The file is read instead of
mapped, because mapped pages count as memory of the process.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, overload

import numpy as np

from luthier.errors import CorruptFile
from luthier.types import Example, IntArray

SMALL, LARGE = "<u2", "<u4"


def id_type(vocabulary: int) -> str:
    """Return the smallest integer type for the ids of ``vocabulary`` tokens."""
    return SMALL if vocabulary <= 1 << 16 else LARGE


def cut_stream(documents: Iterable[IntArray], size: int) -> Iterator[IntArray]:
    """The tokens of all documents, joined, in pieces of ``size``; the last may be shorter."""
    rest_T = np.zeros(0, np.int64)
    for ids_T in documents:
        stream_T = np.concatenate([rest_T, ids_T])
        whole = len(stream_T) // size * size
        # Copies, because a view would keep the whole document in memory.
        yield from (stream_T[start : start + size].copy() for start in range(0, whole, size))
        rest_T = stream_T[whole:].copy()
    if len(rest_T):
        yield rest_T


class TokenWriter:
    """Appends token ids to a new file."""

    def __init__(self, path: Path, kind: str) -> None:
        self.path, self.kind, self.count = path, kind, 0
        self._file, self._digest = path.open("wb"), hashlib.sha256()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, ids: Iterable[int]) -> None:
        """Append ``ids``, which must fit the id type."""
        array = np.fromiter(ids, dtype=np.int64).astype(self.kind)
        self._file.write(data := array.tobytes())
        self._digest.update(data)
        self.count += len(array)

    def close(self) -> dict[str, Any]:
        """Finish the file; return the description for :class:`TokenFile`."""
        self._file.close()
        return {"type": self.kind, "tokens": self.count, "sha256": self._digest.hexdigest()}


@dataclass(frozen=True)
class TokenFile(Sequence[Example]):
    """Sequences of ``length`` tokens from a file; the last has the rest, at least two tokens.

    All tokens but the first of a sequence are learned, as in :class:`~luthier.objectives.CausalLM`.
    """

    path: Path
    kind: str
    tokens: int
    """Number of tokens in the file."""
    length: int

    @classmethod
    def open(cls, path: Path, facts: dict[str, Any], length: int, *others: Any) -> Self:
        """Open a file described by :meth:`TokenWriter.close`; the file size is checked."""
        size = facts["tokens"] * np.dtype(facts["type"]).itemsize
        if not path.is_file() or path.stat().st_size != size:
            raise CorruptFile(f"{path} does not have {size:,} bytes, as recorded")
        return cls(path, facts["type"], facts["tokens"], length, *others)

    def __len__(self) -> int:
        return -(-self.tokens // self.length) if self.tokens > 1 else 0

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
        """Sequence ``index``, read from the file."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index += len(self) if index < 0 else 0
        if not 0 <= index < len(self):
            raise IndexError(index)
        start, stop = self._start(index), self._start(index + 1)
        size = np.dtype(self.kind).itemsize
        ids_T = np.fromfile(self.path, self.kind, stop - start, offset=start * size)
        return self._example(ids_T.astype(np.int64), index)

    def _example(self, ids_T: IntArray, index: int) -> Example:
        weight_T = np.ones(len(ids_T), dtype=np.float32)
        weight_T[0] = 0.0
        return Example(ids_T, weight_T, index)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return self._start(1)

    def _start(self, index: int) -> int:
        start = min(index * self.length, self.tokens)
        # A single last token has no context, so the last sequence starts one token earlier.
        lone = index == len(self) - 1 and self.tokens - start == 1 and index > 0
        return start - 1 if lone else start


@dataclass(frozen=True)
class PieceFile(TokenFile):
    """Sequences as an objective makes them, for span corruption."""

    piece: Callable[[IntArray, int], Example]

    def _example(self, ids_T: IntArray, index: int) -> Example:
        return self.piece(ids_T, index)


@dataclass(frozen=True)
class EncoderTokenFile(TokenFile):
    """Sequences between the start and end token of an encoder, for masked language modelling.

    Special tokens are not learned. ``target`` is as in :class:`~luthier.objectives.MaskedLM`, with each
    token as a word.
    """

    start_id: int
    end_id: int
    """Also ends each document."""

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, with start and end."""
        return super().longest + 2

    def _example(self, ids_T: IntArray, index: int) -> Example:
        ids_T = np.array([self.start_id, *ids_T, self.end_id])
        is_special_T = np.isin(ids_T, (self.start_id, self.end_id))
        word_T = np.where(is_special_T, -1, np.arange(len(ids_T)))
        return Example(ids_T, (~is_special_T).astype(np.float32), index, target=word_T)
