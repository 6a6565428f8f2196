"""Data before training: looked at, mended, written in another form, split."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from luthier.data.convert import Conversion, Format
    from luthier.gate.clean import CleaningSummary


def clean(
    source: str | Path,
    target: str | Path,
    *,
    validation: str | Path | None = None,
    test: str | Path | None = None,
    columns: Mapping[str, str] | None = None,
    plan: str | Path | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    **fixes: Any,
) -> CleaningSummary:
    """Apply chosen fixes to a data set and write a new one, with a log of what became of each row.

    Args:
        source: a file, a folder, a pattern, ``file://`` or ``s3://``; it is not changed.
        target: the new file; its ending names the format. The log is ``TARGET.changes.jsonl``.
        validation, test: held-out rows, for ``drop=["leakage.*"]``.
        columns: the source's name for each of our keys.
        plan: TOML file with fixes; those given here win.
        overwrite: replace files where there are some.
        dry_run: find out all that would happen, and write nothing.
        on_progress: hears how many bytes are read, and of how many.
        **fixes: fields of :class:`luthier.gate.clean_plan.CleaningPlan`, for example ``dedupe="near"``,
            ``drop=["unreadable"]``, ``redact=["all"]``.

    Returns:
        Rows in and out, and how many were changed or dropped by what.

    Raises:
        RefusedInput: for fixes that cannot be, or rows that are neither mended nor dropped.
    """
    from luthier.files import read_toml
    from luthier.gate.clean import clean as run
    from luthier.gate.clean_plan import CleaningPlan

    held = {"validation": validation, "test": test}
    splits = {split: str(each) for split, each in held.items() if each is not None}
    planned = {} if plan is None else read_toml(Path(plan), "a cleaning plan")
    chosen = CleaningPlan.of({**planned, **fixes})
    return run(
        str(source), Path(target), chosen, splits, columns, overwrite, dry_run,
        on_progress=on_progress,
    )  # fmt: skip


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: str = "rows",
    format: Format | None = None,
    columns: Mapping[str, str] | None = None,
    drop_extra_keys: bool = False,
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Conversion:
    """Write rows in another form or container; what it cannot say is refused, never dropped.

    Args:
        source: a file, a folder, a pattern, ``file://`` or ``s3://``.
        target: the new file; its ending names the format, and ``.gz`` or ``.zst`` packs it.
        to: ``rows`` (luthier's own), ``prompt-completion``, ``chat``, ``openai``, ``bedrock``,
            ``bedrock-conversation``, ``sharegpt``, ``alpaca`` or ``text``.
        format: ``jsonl``, ``json``, ``csv``, ``tsv`` or ``parquet``, where the ending does not tell it.
        columns: the source's name for each of our keys.
        drop_extra_keys: leave out keys that are no part of the form.
        overwrite: replace the file where there is one.
        on_progress: hears how many bytes are read, and of how many.

    Returns:
        What the source was taken for, rows written, and further keys kept or left out.

    Raises:
        RefusedInput: for a form or target that cannot be, or with every row that cannot be read or
            written.
    """
    from luthier.data.convert import convert as run

    return run(
        str(source), Path(target), to, format, columns, drop_extra_keys, overwrite, on_progress
    )


def split(
    source: str | Path,
    output: str | Path,
    *,
    validation: float = 0.1,
    test: float = 0.1,
    seed: int = 0,
) -> dict[str, Any]:
    """Split a JSON Lines file: each label in proportion, near-duplicates on one side, lines unchanged.

    Args:
        source: the file.
        output: a new folder for ``train.jsonl``, ``validation.jsonl`` and ``test.jsonl``.
        validation, test: shares of the rows; 0 for none.
        seed: which rows are chosen.

    Returns:
        The record that stands in ``split.json`` too: files, rows, hashes and labels of each split.

    Raises:
        RefusedInput: for rows that cannot be read, or shares that leave nothing to train on.
        RunConflict: where ``output`` exists.
    """
    from luthier.gate.splits import split_file

    return split_file(Path(source), Path(output), {"validation": validation, "test": test}, seed)
