"""Which fix of ``luthier clean`` mends what a rule finds: the one place that says so."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path

from luthier.data.sources import stem_of
from luthier.inspection.findings import Finding, Rule
from luthier.inspection.inspect import Report
from luthier.inspection.pii import KINDS
from luthier.inspection.reading import rules as reading_rules

_DROPPED = (
    "label.contradiction",
    "preference.contradiction",
    "target.says_nothing",
    "target.equals_input",
    "encoding.replacement",
    "row.nothing_learned",
    "row.empty",
)
"""Rules whose rows nothing but a person mends; without them nothing is wrong."""

FIXES: Mapping[str, tuple[str, str]] = {
    **{rule.id: ("--drop", "unreadable") for rule in reading_rules().values() if not rule.whole},
    **{f"encoding.{name}": ("--strip", "") for name in ("control", "invisible", "not_nfc")},
    **{f"{group}.{kind}": ("--redact", kind) for group in ("privacy", "secret") for kind in KINDS},
    **{f"leakage.{name}": ("--drop", "leakage.*") for name in ("exact", "input", "near", "many")},
    **{name: ("--drop", name) for name in _DROPPED},
    "row.too_long": ("--truncate", "end"),
    "duplicate.exact": ("--dedupe", "exact"),
    "duplicate.near": ("--dedupe", "near"),
    "label.imbalance": ("--balance", "down"),
}
"""Option and value by rule. ``--balance`` is never proposed, as it costs good rows."""

_SAME_ENDING = (".csv", ".tsv", ".parquet", ".txt", ".md")


def command(report: Report) -> str:
    """The cleaning that mends what was found in the training rows; empty where there is none."""
    options = _options(_mended(report))
    if not options:
        return ""
    source = report.source("train")
    words = ["luthier", "clean", source, target_of(source)]
    for name, value in options.items():
        for each in value:
            words += [name, each] if each else [name]
    if any(each.startswith("leakage.") for each in options.get("--drop", {})):
        for split in report.files:
            if split != "train":
                words += [f"--{split}", report.source(split)]
    if report.base and "--truncate" in options:
        words += ["--base", report.base]
    return shlex.join(words)


def target_of(source: str) -> str:
    """A name for the cleaned data: beside a file, in the working folder for anything else."""
    ending = next((each for each in _SAME_ENDING if source.lower().endswith(each)), ".jsonl")
    name = f"{stem_of(source)}-clean{ending}"
    path = Path(source)
    return str(path.with_name(name)) if path.is_file() else name


def _mended(report: Report) -> Iterable[Rule]:
    """Rules that a fix mends and that are worth one: notes are left to people."""
    found = report.findings
    train = set(report.files.get("train", ()))

    def ours(each: Finding) -> bool:
        return each.place.file in train or each.rule.id.startswith("leakage.")

    for rule in found.rules():
        serious = found.severity(rule) != "note"
        if rule.id in FIXES and FIXES[rule.id][1] == "unreadable" and not report.rows.get("train"):
            continue  # to leave out all rows mends nothing
        if serious and rule.id in FIXES and any(map(ours, found.kept[rule.id])):
            yield rule


def _options(rules: Iterable[Rule]) -> dict[str, dict[str, None]]:
    """Values of each option, each once."""
    options: dict[str, dict[str, None]] = {}
    for rule in rules:
        name, value = FIXES[rule.id]
        options.setdefault(name, {})[value] = None
    if "near" in options.get("--dedupe", {}):
        options["--dedupe"] = {"near": None}  # exact copies go with it
    return options
