"""Faults seeded into clean data: recall of the checks, and false alarms on clean rows.

    python benchmarks/seeded_faults.py DATA [--base smollm2-135m-instruct] [--seeds 5] [--show NAME]

DATA is a folder with banking77, dolly_hhrlhf, gsm8k, medquad, pandalm_pref and sib200_vi (see
SETS). The faults of `faults.py` and `copied_faults.py` are put into random rows, one fault per row.
A tenth of the other rows are validation rows, and a tenth test rows. Recall is the share of changed
rows for which one of the fault's rules reports the exact line. A false alarm is a rule that reports
an untouched row, which may be right. Findings that compare rows are checked exactly against all
other rows, and are wrong only if no row confirms the finding. `--show` prints the rows of false
alarms, or of missed faults. With a base model, its special tokens are checked too.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import faults
from copied_faults import COPIES, Truth
from faults import Fault, Record
from luthier.data.conversations.chat import ChatFormat
from luthier.gate import check, rules
from luthier.gate.check import Check
from luthier.gate.checks.contradictions import Contradictions
from luthier.gate.checks.duplicates import Duplicates
from luthier.gate.checks.echo import Echo
from luthier.gate.checks.encoding import Encoding
from luthier.gate.checks.language import Language
from luthier.gate.checks.lengths import Lengths
from luthier.gate.checks.markers import Markers
from luthier.gate.checks.privacy import Privacy
from luthier.gate.scan import inspect_sources

rules.MOST_EXAMPLES = check.NAMED = 10**9  # Every place is needed here.

FAULTS = (*faults.FAULTS, *COPIES)

AT_MOST = 40
"""Rows of one fault in one set."""
FAULTY = 0.2
"""Share of the rows of a set that get a fault, at most."""
HELD = 0.1
"""Share of the rows without a fault that are validation rows, and that are test rows."""
SHARED = ("duplicate", "label", "preference", "answer")
"""Groups of rules that name all rows concerned in one finding."""
BESIDE = (*SHARED, "leakage")
"""Groups of rules about rows beside others, whose alarms can be judged exactly."""

Found = dict[tuple[str, int], set[str]]
"""Rules named for a file's name and line."""


def as_chat(record: Record) -> Record:
    turns = [("user", record["prompt"]), ("assistant", record["completion"])]
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def only(*keys: str) -> Callable[[Record], Record]:
    return lambda record: {key: record[key] for key in keys}


SETS: dict[str, tuple[str, Callable[[Record], Record]]] = {
    "banking77": ("banking77/train.jsonl", only("text", "label")),
    "sib200_vi": ("sib200_vi/train.jsonl", only("text", "label")),
    "dolly": ("dolly_hhrlhf/train.jsonl", only("prompt", "completion")),
    "dolly as chat": ("dolly_hhrlhf/train.jsonl", as_chat),
    "gsm8k": ("gsm8k/train.jsonl", only("prompt", "completion")),
    "medquad": ("medquad/train.jsonl", only("prompt", "completion")),
    "pandalm_pref": ("pandalm_pref/train.jsonl", only("prompt", "chosen", "rejected")),
}


def checks(chat: ChatFormat | None) -> list[Check]:
    """Every check under study; a new one is one more line."""
    alone: list[Check] = [
        Encoding(),
        Markers(chat),
        Echo(),
        Language(),
        Lengths(),
        Privacy(),
    ]
    return [*alone, Duplicates(), Contradictions()]


def inspected(folder: Path, files: Mapping[str, Sequence[bytes]], chat: ChatFormat | None) -> Found:
    paths = {}
    for split, lines in files.items():
        if lines:
            paths[split] = folder / f"{split}.jsonl"
            paths[split].write_bytes(b"".join(line + b"\n" for line in lines))
    report = inspect_sources(paths, checks(chat))
    found: Found = defaultdict(set)
    for rule, places in report.findings.examples.items():
        for each in places:
            others = each.others if rule.split(".")[0] in SHARED else ()
            for place in (each.place, *others):
                found[Path(place.file).stem, place.line].add(rule)
    return found


@dataclass
class Study:
    """What came of one set, or of all."""

    put: Counter[str] = field(default_factory=Counter)
    """Faults, by name."""
    hit: Counter[str] = field(default_factory=Counter)
    """Those that were found."""
    false: Counter[str] = field(default_factory=Counter)
    """Rows that nobody touched, by the rules that were named for them."""
    wrong: Counter[str] = field(default_factory=Counter)
    """Of rules about rows beside others, those of ``false`` that no other row makes true."""
    clean: int = 0
    """Rows that nobody touched."""

    def add(self, other: Study) -> None:
        for mine, theirs in zip(self.counters(), other.counters(), strict=True):
            mine.update(theirs)
        self.clean += other.clean

    def counters(self) -> tuple[Counter[str], ...]:
        return self.put, self.hit, self.false, self.wrong


@dataclass
class Written:
    """The files that are inspected."""

    lines: dict[str, list[bytes]] = field(
        default_factory=lambda: {"train": [], "validation": [], "test": []}
    )
    where: dict[tuple[str, int], Fault] = field(default_factory=dict)
    clean: dict[tuple[str, int], Record] = field(default_factory=dict)

    def add(self, split: str, line: bytes) -> tuple[str, int]:
        self.lines[split].append(line)
        return split, len(self.lines[split])

    def rows(self) -> list[tuple[str, Record]]:
        """Split and record of each line; those nobody touched are the same objects as in ``clean``."""
        found = []
        for split, lines in self.lines.items():
            for number, line in enumerate(lines, 1):
                record = self.clean.get((split, number))
                with suppress(ValueError):
                    found.append((split, record or json.loads(line)))
        return found


def written(records: list[Record], seed: int) -> Written:
    """The rows with their faults."""
    rng = random.Random(seed)
    fitting = [fault for fault in FAULTS if fault.fits(records[0])]
    each = max(2, min(AT_MOST, int(FAULTY * len(records) / len(fitting))))
    # The first row says which shape the file has, so it is left alone.
    rows = iter(rng.sample(range(1, len(records)), each * len(fitting)))
    faulty: dict[int, Fault] = {next(rows): fault for fault in fitting for _ in range(each)}
    made = Written()
    beside: list[tuple[Fault, int]] = []
    for number, record in enumerate(records):
        fault = faulty.get(number)
        line = json.dumps(record, ensure_ascii=False).encode()
        if fault is None:
            drawn = rng.random() if number else 1.0
            split = "validation" if drawn < HELD else "test" if drawn < 2 * HELD else "train"
            made.clean[made.add(split, line)] = record
        elif fault.beside:
            made.add("train", line)
            beside.append((fault, number))
        else:
            made.where[made.add(fault.split, fault.line(records, number, rng))] = fault
    for fault, number in beside:
        made.where[made.add(fault.split, fault.line(records, number, rng))] = fault
    return made


def study(
    records: list[Record], chat: ChatFormat | None, seed: int
) -> tuple[Study, list[tuple[str, Any]]]:
    """What was found, and rows for people."""
    made = written(records, seed)
    with tempfile.TemporaryDirectory() as folder:
        found = inspected(Path(folder), made.lines, chat)
    came, alarms = Study(clean=len(made.clean)), list[tuple[str, Any]]()
    for place, fault in made.where.items():
        came.put[fault.name] += 1
        seen = not found[place].isdisjoint(fault.rules)
        came.hit[fault.name] += seen
        if not seen:
            line = made.lines[place[0]][place[1] - 1]
            alarms.append((fault.name, line.decode("utf-8", "replace")))
    truth = Truth(made.rows())
    for place, record in made.clean.items():
        for rule in found[place]:
            came.false[rule] += 1
            if rule.split(".")[0] in BESIDE and truth.right(rule, place[0], record):
                continue
            came.wrong[rule] += 1
            alarms.append((rule, record))
    return came, alarms


def share(count: int, total: int) -> str:
    return f"{count / total:.4f}" if total else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--base")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--show", help="a rule or a fault whose wrong rows are printed")
    asked = parser.parse_args()
    chat = None
    if asked.base:
        from luthier.library.models import find

        chat = find(asked.base).chat
    total = Study()
    by_set: dict[str, Study] = {}
    for name, (path, made) in SETS.items():
        lines = (asked.data / path).read_text("utf-8").split("\n")
        records: list[Any] = [made(json.loads(line)) for line in lines if line]
        for seed in range(asked.seeds):
            came, alarms = study(records, chat, seed)
            by_set.setdefault(name, Study()).add(came)
            for what, record in alarms:
                if what == asked.show:
                    print(f"{name}: {json.dumps(record, ensure_ascii=False)[:1500]}")
        total.add(by_set[name])
    show(total, by_set)


def show(total: Study, by_set: dict[str, Study]) -> None:
    print("| fault | rules | rows | found | recall |\n| --- | --- | --- | --- | --- |")
    for fault in FAULTS:
        count, got = total.put[fault.name], total.hit[fault.name]
        rules = ", ".join(f"`{rule}`" for rule in fault.rules)
        print(f"| {fault.name} | {rules} | {count} | {got} | {share(got, count)} |")
    print(
        "\n| rule | clean rows named | share | most in | not so |\n| --- | --- | --- | --- | --- |"
    )
    for rule, count in total.false.most_common():
        worst = max(by_set, key=lambda name: by_set[name].false[rule] / by_set[name].clean)
        judged = str(total.wrong[rule]) if rule.split(".")[0] in BESIDE else "?"
        print(f"| `{rule}` | {count} | {share(count, total.clean)} | {worst} | {judged} |")
    print(f"\n{sum(total.put.values())} rows with a fault, {total.clean} clean ones.")


if __name__ == "__main__":
    main()
