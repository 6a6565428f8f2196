"""Faults put into clean data at known rows: what the gate finds, and what it says of clean rows.

    python benchmarks/seeded_faults.py DATA [--base smollm2-135m-instruct] [--seeds 5] [--show NAME]

DATA is a folder with banking77, dolly_hhrlhf, gsm8k, medquad, pandalm_pref and sib200_vi (see SETS).
The faults of `faults.py` are put into rows drawn by the seed, one fault a row. Recall is the share of
those rows for which one of the fault's rules is named at that very line. A false alarm is a rule that
is named for a row nobody touched; it may be right about it. `--show` prints the rows for which a rule
gave a false alarm, or those in which a fault was missed. With a base model, its own special tokens are
looked for too.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from faults import FAULTS, Fault, Record
from luthier.data.chat import ChatFormat
from luthier.inspection import findings as kept
from luthier.inspection.check import Check
from luthier.inspection.encoding import Encoding
from luthier.inspection.inspect import inspect_sources
from luthier.inspection.language import Language
from luthier.inspection.lengths import Lengths
from luthier.inspection.markers import Markers
from luthier.inspection.privacy import Privacy

kept.KEPT = 10**9  # Every place is needed here.

AT_MOST = 40
"""Rows of one fault in one set."""
FAULTY = 0.2
"""Share of the rows of a set that get a fault, at most."""

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
    return [Encoding(), Markers(chat), Language(), Lengths(), Privacy()]


def inspected(folder: Path, files: dict[str, Sequence[bytes]], chat: ChatFormat | None) -> Found:
    paths = {}
    for split, lines in files.items():
        if lines:
            paths[split] = folder / f"{split}.jsonl"
            paths[split].write_bytes(b"".join(line + b"\n" for line in lines))
    report = inspect_sources(paths, checks(chat))
    found: Found = defaultdict(set)
    for rule, places in report.findings.kept.items():
        for each in places:
            found[Path(each.place.file).stem, each.place.line].add(rule)
    return found


def study(
    records: list[Record], chat: ChatFormat | None, seed: int
) -> tuple[Counter[str], Counter[str], Counter[str], list[tuple[str, Any]], int]:
    """Faults put in and found by name, false alarms by rule, rows for people, and clean rows."""
    rng = random.Random(seed)
    fitting = [fault for fault in FAULTS if fault.fits(records[0])]
    each = max(2, min(AT_MOST, int(FAULTY * len(records) / len(fitting))))
    # The first row says which shape the file has, so it is left alone.
    rows = iter(rng.sample(range(1, len(records)), each * len(fitting)))
    faulty: dict[int, Fault] = {next(rows): fault for fault in fitting for _ in range(each)}
    files: dict[str, list[bytes]] = {"train": [], "validation": []}
    where: dict[tuple[str, int], Fault] = {}
    clean: dict[tuple[str, int], Record] = {}
    for number, record in enumerate(records):
        fault = faulty.get(number)
        split = fault.split if fault else "train"
        line = json.dumps(record, ensure_ascii=False).encode()
        if fault:
            line = fault.line(records, number, rng)
            if fault.split != "train":  # The row itself stays where it was.
                files["train"].append(json.dumps(record, ensure_ascii=False).encode())
        files[split].append(line)
        place = (split, len(files[split]))
        if fault:
            where[place] = fault
        else:
            clean[place] = record
    with tempfile.TemporaryDirectory() as folder:
        found = inspected(Path(folder), files, chat)
    put, hit, false = Counter[str](), Counter[str](), Counter[str]()
    alarms: list[tuple[str, Any]] = []
    for place, fault in where.items():
        put[fault.name] += 1
        seen = not found[place].isdisjoint(fault.rules)
        hit[fault.name] += seen
        if not seen:
            alarms.append((fault.name, files[place[0]][place[1] - 1].decode("utf-8", "replace")))
    for place, record in clean.items():
        for rule in found[place]:
            false[rule] += 1
            alarms.append((rule, record))
    return put, hit, false, alarms, len(clean)


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
        from luthier.store.models import chat_format, find

        chat = chat_format(find(asked.base))
    put, hit, false = Counter[str](), Counter[str](), Counter[str]()
    by_set: dict[str, tuple[Counter[str], int]] = {}
    rows = 0
    for name, (path, made) in SETS.items():
        lines = (asked.data / path).read_text("utf-8").split("\n")
        records: list[Any] = [made(json.loads(line)) for line in lines if line]
        for seed in range(asked.seeds):
            there, seen, wrong, alarms, clean = study(records, chat, seed)
            put, hit, false, rows = put + there, hit + seen, false + wrong, rows + clean
            before, count = by_set.get(name, (Counter(), 0))
            by_set[name] = (before + wrong, count + clean)
            for what, record in alarms:
                if what == asked.show:
                    print(f"{name}: {json.dumps(record, ensure_ascii=False)[:1500]}")
    print("| fault | rules | rows | found | recall |\n| --- | --- | --- | --- | --- |")
    for fault in FAULTS:
        total, got = put[fault.name], hit[fault.name]
        rules = ", ".join(f"`{rule}`" for rule in fault.rules)
        print(f"| {fault.name} | {rules} | {total} | {got} | {share(got, total)} |")
    print("\n| rule | clean rows named | share | most in |\n| --- | --- | --- | --- |")
    for rule, count in false.most_common():
        worst = max(by_set, key=lambda name: by_set[name][0][rule] / by_set[name][1])
        print(f"| `{rule}` | {count} | {share(count, rows)} | {worst} |")
    print(f"\n{rows} clean rows.")


if __name__ == "__main__":
    main()
