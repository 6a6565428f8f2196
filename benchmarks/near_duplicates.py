"""Near-duplicates among a million short rows: time, memory, recall and false alarms.

    python benchmarks/near_duplicates.py DATA/banking77 --rows 1000000

Rows are texts of the folder's JSON Lines with up to three words exchanged, so that all similarities
occur. Recall and false alarms count pairs with one row in a random sample, against exact Jaccard
similarity on sets of strings.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from luthier.gate.near_duplicates import (
    LEAST_SIMILARITY,
    LENGTH,
    Groups,
    NearDuplicates,
    first_rows,
    normalize,
    sketch,
)
from luthier.gate.row_keys import hash_texts, key_column

BATCH = 1024


def texts_of(folder: Path) -> list[str]:
    found = []
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").strip("\n").split("\n"):
            row = json.loads(line)
            found.append(row.get("text") or row.get("prompt") or row["completion"])
    return found


def batches(texts: list[str], count: int, edits: int) -> Iterator[list[str]]:
    rng = random.Random(0)
    vocabulary = [word for text in texts for word in text.split()]
    for start in range(0, count, BATCH):
        batch = []
        for _ in range(min(BATCH, count - start)):
            words = rng.choice(texts).split()
            for _ in range(rng.randint(0, edits)):
                words[rng.randrange(len(words))] = rng.choice(vocabulary)
            batch.append(" ".join(words))
        yield batch


def grams(text: str) -> set[str]:
    return {text[i : i + LENGTH] for i in range(max(1, len(text) - LENGTH + 1))}


def sampled_pairs(texts: dict[int, str], sample: list[int]) -> tuple[set[tuple[int, int]], int]:
    """Return the pairs above the smallest similarity with one row in the sample."""
    sets = {row: grams(texts[row]) for row in sample}
    holding = defaultdict(list)
    for row, shingles in sets.items():
        for shingle in shingles:
            holding[shingle].append(row)
    pairs, compared = set(), 0
    for row, text in texts.items():
        shared: dict[int, int] = defaultdict(int)
        shingles = grams(text)
        for shingle in shingles:
            for other in holding.get(shingle, ()):
                shared[other] += 1
        for other, count in shared.items():
            compared += 1
            if other != row and count >= LEAST_SIMILARITY * (
                len(shingles) + len(sets[other]) - count
            ):
                pairs.add((min(row, other), max(row, other)))
    return pairs, compared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--edits", type=int, default=3)
    parser.add_argument("--sample", type=int, default=500)
    given = parser.parse_args()

    near, column, seconds, size = NearDuplicates(), [], 0.0, 0
    for batch in batches(texts_of(given.folder), given.rows, given.edits):
        began = time.perf_counter()
        plain = [normalize(text) for text in batch]
        column.append(key_column(map(hash_texts, plain), len(plain)))
        near.add(sketch(plain))
        seconds += time.perf_counter() - began
        size += sum(map(len, batch))
    began = time.perf_counter()
    keys_N = np.concatenate(column)
    one_of, other_of = [], []

    groups = Groups(given.rows)

    def join(one_P: np.ndarray, other_P: np.ndarray) -> None:
        groups.join(one_P, other_P)
        one_of.append(one_P)
        other_of.append(other_P)

    near.find(keys_N, lambda one, other: ~groups.together(one, other), join)
    found_seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6

    first_N = first_rows(keys_N)
    alone = np.flatnonzero(first_N == np.arange(given.rows))
    rows = set(alone.tolist())
    print(
        f"{given.rows:,} rows of {size / given.rows:.0f} characters ({len(rows):,} different), "
        f"{sum(1 for _ in groups.members()):,} groups: {seconds:.0f} s to sketch, "
        f"{found_seconds:.0f} s to find, peak memory {peak:.2f} GB",
        flush=True,
    )
    texts, number = {}, 0
    for batch in batches(texts_of(given.folder), given.rows, given.edits):
        for text in batch:
            if number in rows:
                texts[number] = normalize(text)
            number += 1
    sample = random.Random(1).sample(sorted(rows), min(given.sample, len(rows)))
    pairs, compared = sampled_pairs(texts, sample)
    together = sum(groups.roots_N[one] == groups.roots_N[other] for one, other in pairs)
    joined = list(
        zip(np.concatenate(one_of).tolist(), np.concatenate(other_of).tolist(), strict=True)
    )
    checked = random.Random(2).sample(joined, min(20_000, len(joined)))
    wrong = 0
    for one, other in checked:
        a, b = grams(texts[one]), grams(texts[other])
        wrong += len(a & b) < LEAST_SIMILARITY * len(a | b)
    in_group = np.bincount(groups.roots_N, minlength=given.rows)[groups.roots_N[sample]] > 1
    partner = {row for pair in pairs for row in pair}
    alarms = sum(
        bool(flag) and row not in partner for row, flag in zip(sample, in_group, strict=True)
    )
    print(
        f"recall {together / max(1, len(pairs)):.4f} of {len(pairs):,} pairs with a similarity of "
        f"{LEAST_SIMILARITY} or more, among {compared:,} pairs of {len(sample)} sampled rows that "
        "share a shingle"
    )
    print(
        f"false alarms: {wrong} of {len(checked):,} joined pairs are less similar than that; {alarms} "
        f"of {len(sample) - len(partner & set(sample))} sampled rows without a partner are in a group"
    )


if __name__ == "__main__":
    main()
