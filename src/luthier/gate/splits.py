"""Split of a file into training and held-out files, with a record of the contents."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from luthier.data.files.containers import Container
from luthier.data.files.read import find_container
from luthier.data.rows import stream_rows
from luthier.data.shapes.media import MediaRow
from luthier.data.splitting import Strata, split_rows
from luthier.errors import DataError, Problem, RecipeError, RunConflict
from luthier.files import (
    check_creatable,
    copy_lines,
    link_or_copy,
    new_folder,
    sha256_of,
    write_json,
)
from luthier.gate.row_keys import BATCH, RelatedRows
from luthier.types import IntArray

RECORD = "split.json"
LABELS = 1000
"""Maximum number of labels in the record, most frequent first."""


def split_file(
    source: Path, output: Path, shares: Mapping[str, float], seed: int
) -> dict[str, Any]:
    """Write ``train.jsonl`` and a file for each of ``shares`` (by name), and return the record.

    Lines are copied byte for byte in file order; the last line gets a line end. Texts are not kept
    in memory. Equal file, shares and seed give equal files. Images and audio of the rows get a hard
    link, or a copy on another disk, because rows name them from the folder of their file.

    Raises:
        RunConflict: ``output`` exists.
        DataError: unreadable rows.
        RecipeError: a format other than JSON Lines, or shares without training rows.
    """
    check_creatable(output)
    if output.exists():
        raise RunConflict(f"{output} exists; set `--output` to a new folder")
    problems: list[Problem] = []
    found = find_container(source, problems)
    if problems:
        raise DataError(problems)
    if found != Container("jsonl"):
        raise RecipeError(
            f"{source}: a split needs JSON Lines, not {found}. Run `luthier convert {source} "
            "rows.jsonl`",
            rule="split.format",
        )
    if sum(shares.values()) >= 1:
        text = "the shares leave no training rows; the sum must be less than 1"
        raise RecipeError(text, rule="split.empty")
    related, strata, lines, media = RelatedRows(), Strata(), list[int](), set[str]()
    rows = (row for row, _ in stream_rows(source, problems))
    while batch := list(islice(rows, BATCH)):
        related.add(batch)
        strata.add(batch)
        lines += [row.line for row in batch]
        media |= {row.media.path for row in batch if isinstance(row, MediaRow) and row.media.path}
    if problems:
        raise DataError(problems)
    groups_N, names = related.groups(), strata.names()
    chosen = {name: share for name, share in shares.items() if share > 0}
    parts = split_rows(names, groups_N, list(chosen.values()), seed)
    with new_folder(output) as folder:
        for named in media:
            link = folder / os.path.relpath(named, source.parent.resolve())
            link.parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(Path(named), link)
        record = _record(source, shares, seed, groups_N)
        for name, part in zip(("train", *chosen), parts, strict=True):
            path = folder / f"{name}.jsonl"
            with path.open("wb") as target:
                copy_lines(source, [lines[row] for row in part.tolist()], target)
            counts = Counter(names[row] for row in part.tolist())
            record["splits"][name] = {
                "file": path.name,
                "rows": len(part),
                "sha256": sha256_of(path),
                "labels": {label: n for label, n in counts.most_common(LABELS) if label},
            }
        write_json(folder / RECORD, record)
    return record


def _record(
    source: Path, shares: Mapping[str, float], seed: int, groups_N: IntArray
) -> dict[str, Any]:
    sizes = np.bincount(groups_N, minlength=1)
    return {
        "source": str(source),
        "sha256": sha256_of(source),
        "seed": seed,
        "shares": dict(shares),
        "rows": len(groups_N),
        "kept_together": {
            "groups": int((sizes > 1).sum()),
            "rows": int(sizes[sizes > 1].sum()),
            "largest": int(sizes.max(initial=0)),
        },
        "splits": {},
    }
