"""Search for near-duplicate texts among all rows, in bounded memory.

The similarity of two texts is the Jaccard similarity of their shingle sets (Broder 1997, "On the
resemblance and containment of documents"). MinHash signatures are split into bands, and only texts
that agree in a whole band are compared (Leskovec, Rajaraman and Ullman, *Mining of Massive
Datasets*, section 3.4). The comparison is exact for texts of up to 256 distinct shingles and an
estimate for longer texts. Shingles consist of characters, not of words, because Vietnamese, Chinese
and Thai would need a word splitter.

A sketch takes a few hundred bytes and does not depend on neighbouring texts, so batches may have
any size.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import regex
from numpy.typing import NDArray

from luthier.data.spelling import unify_spelling
from luthier.gate.columns import MEMORY_LIMIT, ColumnStore
from luthier.types import FloatArray, IntArray

Words = NDArray[np.uint32]

LENGTH = 5
"""Length of a shingle in characters, as Leskovec et al. (section 3.2.2) recommend for short texts."""
BANDS, ROWS = 14, 6
"""Number of bands, and hashes per band. Texts of Jaccard similarity 0.8 agree in a band with
probability 1 - (1 - 0.8^6)^14 = 0.986; texts of similarity 0.3 with 0.01."""
SKETCH_SIZE = 256
"""Maximum number of hashes of a sketch. Smaller sets are stored whole, and the similarity is exact.
The standard error for larger sets is at most 0.031 (0.025 at 0.8)."""
COMMON_SHARE = 0.5
"""Minimum share of the texts with a common shingle, such as the wording of a prompt."""

_APOSTROPHES = regex.compile("['’ʼ]")
_PUNCTUATION = regex.compile(r"\p{P}+")
_ASCII = {ord(mark): " " for mark in '!"#%&()*,-./:;?@[\\]_{}'} | {ord("'"): None}
_MISSING = np.uint32(0xFFFFFFFF)
_MULTIPLIER = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio; odd
_rng = np.random.default_rng(20_1997)
_FACTORS = _rng.integers(0, 1 << 32, BANDS * ROWS, dtype=np.uint32) | np.uint32(1)
_FLIPS = _rng.integers(0, 1 << 32, BANDS * ROWS, dtype=np.uint32)


def normalize(text: str) -> str:
    """Normalize case, width, accent composition, punctuation and white space.

    A comma destroys most shingles of a short text. Without normalization, the search found only 11
    of the 29 test texts of Banking77 that differ from training rows in punctuation or case. Symbols
    (+, $, <) stay.
    """
    if text.isascii():
        bare = text.translate(_ASCII)
    else:
        text = unify_spelling(unicodedata.normalize("NFKC", text))
        bare = _PUNCTUATION.sub(" ", _APOSTROPHES.sub("", text))
    return " ".join(bare.casefold().split()) or " ".join(text.casefold().split())


@dataclass(frozen=True)
class Sketches:
    """Sketches of ``N`` texts."""

    rows_N: IntArray
    """Index of each text in the input."""
    bands_NB: Words
    """Hash of each band of the signature."""
    hashes_M: Words
    """Smallest shingle hashes of each text in ascending order, concatenated."""
    counts_N: NDArray[np.uint16]
    """Number of ``hashes_M`` per text, at most :data:`SKETCH_SIZE`."""
    whole_N: NDArray[np.bool_]
    """True if the hashes cover all shingles of the text."""


def sketch(
    texts: Sequence[str],
    common: Words | None = None,
    share: float = 1.0,
    salts_N: Words | None = None,
) -> Sketches:
    """Sketch :func:`normalize`d texts.

    A text shorter than a shingle is one shingle, so "yes" is similar to "yes" only.

    Args:
        common: sorted hashes of shingles to ignore, except in texts without any other shingle.
        share: share of the texts to sample. The sample depends on two minimum shingle hashes, which
            agree with the squared similarity of two texts (Broder 1997). Similar texts therefore
            usually stay together.
        salts_N: texts with different salts share no shingles.
    """
    hashes_S, counts_N = _shingles(texts)
    if common is not None and len(common):
        hashes_S, counts_N = _remove_common(hashes_S, counts_N, common)
    if salts_N is not None:
        hashes_S = np.minimum(hashes_S ^ np.repeat(salts_N, counts_N), _MISSING - np.uint32(1))
    rows_N = np.arange(len(texts))
    if share < 1 and len(texts):
        drawn_N = _draw(hashes_S, counts_N) < share
        hashes_S = hashes_S[np.repeat(drawn_N, counts_N)]
        rows_N, counts_N = rows_N[drawn_N], counts_N[drawn_N]
    starts_N = np.cumsum(counts_N) - counts_N
    return Sketches(rows_N, _bands(hashes_S, starts_N), *_smallest(hashes_S, counts_N))


def common_shingles(texts: Sequence[str]) -> Words:
    """Return sorted hashes of the shingles that most ``texts`` share; empty if few are shared.

    Without the removal, all prompts with the same instruction would be similar. Shingles of more
    than half of the distinct texts are common if they make up a quarter of the texts. Frequent
    words of long texts stay below the quarter.
    """
    different = sorted(set(texts))
    nothing = np.zeros(0, np.uint32)
    if len(different) < 8:
        return nothing
    hashes_S, counts_N = _shingles(different)
    distinct_S = _distinct(hashes_S, counts_N)[1]
    values, held = np.unique(distinct_S, return_counts=True)
    found = values[held > COMMON_SHARE * len(different)]
    share = held[held > COMMON_SHARE * len(different)].sum() / len(distinct_S)
    return found if share >= 0.25 else nothing


def similarity(
    first_PK: Words, second_PK: Words, whole_P2: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Jaccard similarity of pairs of sketches; rows are ascending and filled with ``MISSING``.

    Exact where both are whole. Elsewhere the part of both sets below the largest hash that both
    sketches still cover is a random sample of the union (Broder 1997, section 3).
    """
    limits_P = np.full(len(first_PK), _MISSING)
    for number, sketch_PK in enumerate((first_PK, second_PK)):
        last_P = np.where(sketch_PK == _MISSING, np.uint32(0), sketch_PK).max(1)
        limits_P = np.where(whole_P2[:, number], limits_P, np.minimum(limits_P, last_P))
    both_PK = np.sort(np.concatenate([first_PK, second_PK], 1), axis=1)
    within_PK = (both_PK <= limits_P[:, None]) & (both_PK != _MISSING)
    shared_P = ((both_PK[:, 1:] == both_PK[:, :-1]) & within_PK[:, 1:]).sum(1)
    union_P = within_PK.sum(1) - shared_P
    found: NDArray[np.float64] = shared_P / np.maximum(union_P, 1)
    return found


def pad(hashes_M: Words, counts_N: Any) -> Words:
    """Return ragged sketches as ``[N, K]``, padded with a hash that no shingle has."""
    counts_N = counts_N.astype(np.int64)
    width = int(counts_N.max(initial=1))
    filled_NK = np.full((len(counts_N), width), _MISSING)
    filled_NK[np.arange(width) < counts_N[:, None]] = hashes_M
    return filled_NK


def _shingles(texts: Sequence[str]) -> tuple[Words, IntArray]:
    """Hashes of the shingles of each text, with repeats, and how many each has (1 at least)."""
    lengths_N = np.fromiter(map(len, texts), np.int64, len(texts))
    # A text of its own between the texts keeps short ones apart: no shingle of 0 is ever taken.
    joined = "".join(texts).encode("utf-32-le", "surrogatepass")
    points = np.frombuffer(joined + bytes(4 * LENGTH), np.uint32)
    counts_N = np.maximum(lengths_N - LENGTH + 1, 1)
    firsts_N = np.cumsum(counts_N) - counts_N
    starts_N = np.cumsum(lengths_N) - lengths_N
    at_S = np.arange(counts_N.sum()) + np.repeat(starts_N - firsts_N, counts_N)
    rolled = _roll(points, LENGTH)
    hashes_S = rolled[at_S]
    for row in np.flatnonzero(lengths_N < LENGTH):
        start, length = int(starts_N[row]), int(lengths_N[row])
        whole = np.concatenate([points[start : start + length], np.zeros(LENGTH - length)])
        hashes_S[firsts_N[row]] = _roll(whole.astype(np.uint32), LENGTH)[0]
    return hashes_S, counts_N


def _roll(points: Words, length: int) -> Words:
    """Hash of each run of ``length`` characters."""
    size = len(points) - length + 1
    found = points[:size].astype(np.uint64)
    for further in range(1, length):
        found *= np.uint64(_MULTIPLIER)
        found += points[further : further + size]
    found ^= found >> np.uint64(32)
    found *= np.uint64(0xD6E8FEB86659FD93)
    found >>= np.uint64(32)
    return np.minimum(found.astype(np.uint32), _MISSING - np.uint32(1))


def _bands(hashes_S: Words, starts_N: IntArray) -> Words:
    """MinHash by multiplication modulo 2^32, six rows hashed to a band."""
    bands_NB = np.zeros((len(starts_N), BANDS), np.uint32)
    if not len(starts_N):
        return bands_NB
    mixed_S = np.empty_like(hashes_S)
    for number, (factor, flip) in enumerate(zip(_FACTORS, _FLIPS, strict=True)):
        np.bitwise_xor(hashes_S, flip, out=mixed_S)
        np.multiply(mixed_S, factor, out=mixed_S)
        band_N = bands_NB[:, number // ROWS]
        band_N *= np.uint32(0x01000193)
        # The lowest bits of a product are hardly mixed; the least value is told by the highest.
        band_N ^= np.minimum.reduceat(mixed_S, starts_N) * np.uint32(0x85EBCA6B)
        band_N ^= band_N >> np.uint32(15)
    return bands_NB


def _draw(hashes_S: Words, counts_N: IntArray) -> FloatArray:
    """Return a hash from 0 to 1 per text, from the minimum shingles under two permutations.

    With a single minimum, a third of all word problems ("how many") would share one value.
    """
    starts_N = np.cumsum(counts_N) - counts_N
    drawn_N = np.zeros(len(counts_N), np.uint64)
    for flip in _FLIPS[-2:]:
        least_N = np.minimum.reduceat((hashes_S ^ flip) * np.uint32(0x2C1B3C6D), starts_N)
        drawn_N = (drawn_N ^ least_N) * np.uint64(_MULTIPLIER)
        drawn_N = (drawn_N ^ (drawn_N >> np.uint64(29))) * np.uint64(0xD6E8FEB86659FD93)
    return (drawn_N >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24)


def _distinct(hashes_S: Words, counts_N: IntArray) -> tuple[IntArray, Words]:
    """Text and hash of each distinct shingle of each text, in ascending order."""
    texts_S = np.repeat(np.arange(len(counts_N), dtype=np.uint64), counts_N)
    packed = np.sort((texts_S << np.uint64(32)) | hashes_S)
    packed = packed[np.concatenate([[True], packed[1:] != packed[:-1]])[: len(packed)]]
    return (packed >> np.uint64(32)).astype(np.int64), packed.astype(np.uint32)


def _smallest(
    hashes_S: Words, counts_N: IntArray
) -> tuple[Words, NDArray[np.uint16], NDArray[np.bool_]]:
    """The :data:`SKETCH_SIZE` smallest distinct hashes of each text."""
    # Most hashes of a long text are too large to be among them; only the others are sorted.
    share_N = np.minimum(3 * SKETCH_SIZE / np.maximum(counts_N, 1), 1.0)
    limits_N = (share_N * 0xFFFFFFFF).astype(np.uint32)
    near_S = hashes_S <= np.repeat(limits_N, counts_N)
    near_N = np.add.reduceat(near_S, np.cumsum(counts_N) - counts_N) if len(counts_N) else counts_N
    texts_M, hashes_M = _distinct(hashes_S[near_S], near_N)
    found_N = np.bincount(texts_M, minlength=len(counts_N))
    short_N = (found_N <= SKETCH_SIZE) & (share_N < 1)  # long texts of few different shingles
    if short_N.any():
        rows = np.flatnonzero(short_N)
        mask_S = np.repeat(short_N, counts_N)
        again_M, whole_M = _distinct(hashes_S[mask_S], counts_N[rows])
        others_M = ~short_N[texts_M]
        texts_M = np.concatenate([texts_M[others_M], rows[again_M]])
        hashes_M = np.concatenate([hashes_M[others_M], whole_M])
        order = np.argsort(texts_M, kind="stable")
        texts_M, hashes_M = texts_M[order], hashes_M[order]
        found_N = np.bincount(texts_M, minlength=len(counts_N))
    firsts_N = np.cumsum(found_N) - found_N
    kept_M = np.arange(len(texts_M)) - firsts_N[texts_M] < SKETCH_SIZE
    counts = np.minimum(found_N, SKETCH_SIZE).astype(np.uint16)
    return hashes_M[kept_M], counts, found_N <= SKETCH_SIZE


def _remove_common(hashes_S: Words, counts_N: IntArray, common: Words) -> tuple[Words, IntArray]:
    """Remove common shingles, except from texts without any other shingle."""
    low = np.zeros(1 << 16, np.bool_)
    low[common & np.uint32(0xFFFF)] = True
    maybe = np.flatnonzero(low[hashes_S & np.uint32(0xFFFF)])
    keep_S = np.ones(len(hashes_S), np.bool_)
    keep_S[maybe] = ~np.isin(hashes_S[maybe], common)
    texts_S = np.repeat(np.arange(len(counts_N)), counts_N)
    left_N = np.bincount(texts_S[keep_S], minlength=len(counts_N))
    keep_S |= left_N[texts_S] == 0
    return hashes_S[keep_S], np.bincount(texts_S[keep_S], minlength=len(counts_N))


class Groups:
    """Connected components: rows joined in pairs, whole columns of pairs at once.

    Each round hangs the larger of two roots below the smaller and then shortens all paths (Shiloach
    and Vishkin 1982, "An O(log n) parallel connectivity algorithm"), so the root of a group is its
    first row.
    """

    def __init__(self, rows: int) -> None:
        self.roots_N: IntArray = np.arange(rows)

    def join(self, first_P: Any, second_P: Any) -> None:
        """Merge the groups of both rows of each pair."""
        while len(first_P):
            one_P, other_P = self.roots_N[first_P], self.roots_N[second_P]
            apart_P = one_P != other_P
            if not apart_P.any():
                return
            first_P, second_P = first_P[apart_P], second_P[apart_P]
            one_P, other_P = one_P[apart_P], other_P[apart_P]
            np.minimum.at(self.roots_N, np.maximum(one_P, other_P), np.minimum(one_P, other_P))
            while True:
                shorter_N = self.roots_N[self.roots_N]
                if np.array_equal(shorter_N, self.roots_N):
                    break
                self.roots_N = shorter_N

    def join_equal(self, keys_N: Any) -> None:
        """Merge the groups of rows with equal keys."""
        self.join(np.arange(len(keys_N)), first_rows(keys_N))

    def together(self, first_P: Any, second_P: Any) -> Any:
        """Return ``[P]`` True for pairs in one group."""
        return self.roots_N[first_P] == self.roots_N[second_P]

    def members(self) -> Iterator[IntArray]:
        """Rows of each group of two or more, in ascending order, by their first rows."""
        return rows_by_value(self.roots_N)


def rows_by_value(keys_N: Any) -> Iterator[IntArray]:
    """Yield the ascending rows of each value with several rows, in the order of the first rows."""
    order = np.argsort(keys_N, kind="stable")
    sorted_N = keys_N[order]
    edges = np.flatnonzero(np.concatenate([[True], sorted_N[1:] != sorted_N[:-1], [True]]))
    if not len(keys_N):
        return
    starts, ends = edges[:-1], edges[1:]
    several = ends - starts > 1
    starts, ends = starts[several], ends[several]
    by_first = np.argsort(order[starts])
    for start, end in zip(starts[by_first].tolist(), ends[by_first].tolist(), strict=True):
        yield order[start:end]


def first_rows(keys_N: Any) -> IntArray:
    """Return ``[N]`` index of the first row with the key of each row."""
    _, first_U, inverse_N = np.unique(keys_N, return_index=True, return_inverse=True)
    found: IntArray = first_U[inverse_N]
    return found


LEAST_SIMILARITY = 0.8
"""Minimum Jaccard similarity of near-duplicates."""
MARGIN = 0.01
"""Tolerance for estimates: less than half the standard error of 0.025."""
NEIGHBOURS = 8
"""Number of neighbours, besides the first row, that a row of a large bucket is compared with."""
CHUNK = 4096
"""Pairs compared at once."""

PairFilter = Callable[[Any, Any], Any]


class NearDuplicates:
    """Sketches of rows in order, and the search for similar pairs."""

    def __init__(self, limit: int = MEMORY_LIMIT) -> None:
        self._table = ColumnStore(limit)
        self.rows = 0

    def add(self, sketches: Sketches) -> None:
        """Append the sketches of the next rows."""
        append = self._table.append
        for band in range(BANDS):
            append(f"band {band}", sketches.bands_NB[:, band])
        append("hashes", sketches.hashes_M)
        append("counts", sketches.counts_N)
        append("whole", sketches.whole_N)
        self.rows += len(sketches.counts_N)

    def find(self, keys_N: Any, wanted: PairFilter, found: Callable[[Any, Any], None]) -> None:
        """Call ``found(first_P, second_P)`` with batches of similar pairs; ``first_P < second_P``.

        Args:
            keys_N: key of the text and of all values that must differ between the rows of a pair.
                Only the first row of each key is compared.
            wanted: returns True for pairs worth a comparison, to skip consequences of earlier
                pairs.
            found: receives the similar pairs.
        """
        if not self.rows:
            return
        self._counts_N = self._table.read("counts")
        self._whole_N = self._table.read("whole")
        self._starts_N = np.cumsum(self._counts_N, dtype=np.int64) - self._counts_N
        alone = np.flatnonzero(first_rows(keys_N) == np.arange(self.rows))
        # Sorted by key, so that the result does not depend on the order of rows.
        alone = alone[np.argsort(keys_N[alone])]
        for first_P, second_P in self._propose_pairs(alone):
            for start in range(0, len(first_P), CHUNK * 16):
                one_P, other_P = first_P[start:][: CHUNK * 16], second_P[start:][: CHUNK * 16]
                one_P, other_P = np.minimum(one_P, other_P), np.maximum(one_P, other_P)
                worth_P = wanted(one_P, other_P)
                worth_P &= self._possible(one_P, other_P)
                one_P, other_P = one_P[worth_P], other_P[worth_P]
                alike_P = self._alike(one_P, other_P)
                found(one_P[alike_P], other_P[alike_P])

    def _propose_pairs(self, alone: IntArray) -> Iterator[tuple[Any, Any]]:
        """Yield pairs that share a band: all pairs of a small bucket; in a large bucket, neighbours
        and pairs with the first row."""
        following = self._table.read(f"band {BANDS - 1}")[alone]
        for band in range(BANDS):
            values = self._table.read(f"band {band}")[alone]
            # Within a bucket, rows that agree in another band are neighbours.
            order = np.argsort(
                (values.astype(np.uint64) << np.uint64(32)) | following, kind="stable"
            )
            following, values = values, values[order]
            rows = alone[order]
            # Distance of each row from the first row of the bucket.
            new = np.concatenate([[True], values[1:] != values[:-1]])
            starts = np.flatnonzero(new)[np.cumsum(new) - 1]
            behind = np.arange(len(rows)) - starts
            for step in range(1, NEIGHBOURS + 1):
                later = np.flatnonzero(behind >= step)
                if not len(later):
                    break
                yield rows[later - step], rows[later]
            later = np.flatnonzero(behind > NEIGHBOURS)
            yield rows[starts[later]], rows[later]

    def _possible(self, one_P: Any, other_P: Any) -> Any:
        """Return True if the sizes allow similarity: sets of sizes a < b have a similarity of at
        most a/b."""
        a_P, b_P = self._counts_N[one_P].astype(np.float64), self._counts_N[other_P]
        exact_P = self._whole_N[one_P] & self._whole_N[other_P]
        return ~exact_P | (np.minimum(a_P, b_P) >= LEAST_SIMILARITY * np.maximum(a_P, b_P))

    def _alike(self, one_P: IntArray, other_P: IntArray) -> Any:
        """``[P]`` whether the sketches of each pair are similar enough."""
        alike_P = np.zeros(len(one_P), np.bool_)
        # Sort by length, because a chunk is padded to its longest sketch.
        order = np.argsort(np.maximum(self._counts_N[one_P], self._counts_N[other_P]))
        for start in range(0, len(order), CHUNK):
            chunk = order[start : start + CHUNK]
            pairs_P2 = np.stack([one_P[chunk], other_P[chunk]], 1)
            rows, places = np.unique(pairs_P2, return_inverse=True)
            counts = self._counts_N[rows].astype(np.int64)
            hashes = self._table["hashes"].gather(self._starts_N[rows], counts)
            filled_RK, places = pad(hashes, counts), places.reshape(-1, 2)
            whole_P2 = self._whole_N[pairs_P2]
            found_P = similarity(filled_RK[places[:, 0]], filled_RK[places[:, 1]], whole_P2)
            alike_P[chunk] = found_P >= np.where(
                whole_P2.all(1), LEAST_SIMILARITY, LEAST_SIMILARITY - MARGIN
            )
        return alike_P
