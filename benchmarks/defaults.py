"""Default runs against simple baselines and a search, on unseen test rows.

    python benchmarks/defaults.py DATA [--set sib200_vi ...] [--trials 6]

Each data set is tuned with default settings in a temporary LUTHIER_HOME. `luthier evaluate`
measures the stored model on at most 2,000 test rows. The baselines are those of each run, fitted on
all training rows (at most 10,000) in a run of one step with the test rows as validation rows.
``--trials`` adds a search over rate, adaptation and batch size. Data sets without a baseline are
measured before and after training on the held-out rows.

Data sets marked * were used while the defaults were chosen.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from children import run
from luthier.evaluation.baselines import MOST_ROWS, Baseline, Comparison, render
from luthier.evaluation.significance import standard_error

Rows = list[dict[str, Any]]
ENCODER, DECODER = "all-minilm-l6-v2", "smollm2-135m-instruct"
MOST_TEST_ROWS = MOST_ROWS // 5
ALLOW_LEAKAGE = '{"leakage.exact"="note","leakage.near"="note","leakage.many"="note"}'
"""Settings that report test rows among the training rows without rejecting the data."""
SPACE = (
    "training.learning_rate=3e-5..2e-3",
    "adaptation.method=lora,full",
    "training.batch_size=8,16,32",
)


def first(count: int) -> Callable[[Rows], Rows]:
    return lambda rows: rows[:count]


def first_of_each_label(count: int) -> Callable[[Rows], Rows]:
    def chosen(rows: Rows) -> Rows:
        seen: Counter[str] = Counter()
        found = []
        for row in rows:
            seen[row["label"]] += 1
            if seen[row["label"]] <= count:
                found.append(row)
        return found

    return chosen


def as_pairs(rows: Rows) -> Rows:
    return [{"anchor": row["question"], "positive": row["context"]} for row in rows]


def as_preferences(rows: Rows) -> Rows:
    return [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows]


def as_ratings(rows: Rows) -> Rows:
    """Turn the number of words, in tens, into a rating from 1 to 5. No public data set has ratings."""
    return [
        {"text": row["text"], "rating": 1 + min(4, len(row["text"].split()) // 10)} for row in rows
    ]


@dataclass(frozen=True)
class Case:
    """Rows of a folder, and how they are tuned on."""

    name: str
    folder: str
    cut: Callable[[Rows], Rows] = lambda rows: rows
    """Selection of the training rows."""
    form: Callable[[Rows], Rows] = lambda rows: rows
    """Conversion of training and test rows."""
    train: str = "train.jsonl"
    test: str = "test.jsonl"
    base: str = ENCODER
    settings: tuple[str, ...] = ()
    """Settings needed to read the rows."""
    has_rivals: bool = True
    """Whether baselines exist for the rows, which `luthier evaluate` measures without generation."""
    cuts_long_rows: bool = False
    """Whether `luthier evaluate` must truncate rows."""


SETS = (
    Case("sib200_vi*", "sib200_vi"),
    Case("sib200_en*", "sib200_en"),
    Case("banking77, 20 rows a label*", "banking77", cut=first_of_each_label(20)),
    Case("banking77, 5 rows a label", "banking77", cut=first_of_each_label(5)),
    Case("banking77", "banking77"),
    Case("sms_spam", "sms_spam"),
    Case("sms_spam, 100 rows", "sms_spam", cut=first(100)),
    Case("sms_spam, length as a rating", "sms_spam", cut=first(1000), form=as_ratings),
    Case("ncbi_disease, 600 rows*", "ncbi_disease", cut=first(600)),
    Case("ncbi_disease", "ncbi_disease"),
    Case("wnut17", "wnut17"),
    Case(
        "xquad, English", "xquad", form=as_pairs, train="train.en.jsonl",
        test="test.en.jsonl", settings=("data.long_rows=truncate",), cuts_long_rows=True,
    ),
    Case(
        "xquad, Vietnamese", "xquad", form=as_pairs, train="train.vi.jsonl",
        test="test.vi.jsonl", settings=("data.long_rows=truncate",), cuts_long_rows=True,
    ),
    Case(
        "pandalm_pref", "pandalm_pref", form=as_preferences, base=DECODER, has_rivals=False,
        settings=("data.long_rows=drop",),
    ),
    Case(
        "dolly_hhrlhf", "dolly_hhrlhf", base=DECODER, has_rivals=False,
        settings=("data.long_rows=drop",),
    ),
)  # fmt: skip


def new_home(folder: Path) -> Path:
    """Create a LUTHIER_HOME in ``folder`` with the base models of the current one."""
    from luthier.files import luthier_home

    home = folder / "home"
    (home / "models").mkdir(parents=True)
    (home / "models" / "base").symlink_to(luthier_home() / "models" / "base")
    return home


def run_luthier(home: Path, *words: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "luthier", *words, "--json"]
    return run(command, {**os.environ, "LUTHIER_HOME": str(home)}).report


def lines_of(rows: Rows) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_rows(rows: Rows, path: Path) -> Path:
    path.write_text(lines_of(rows))
    return path


def write_packed(rows: Rows, path: Path) -> None:
    path.write_bytes(lzma.compress(lines_of(rows).encode(), preset=9))


def rows_of(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def flags(settings: Sequence[str]) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


def rivals(home: Path, case: Case, train: Path, test: Path) -> Comparison | None:
    """Return the scores of the baselines on the test rows, fitted on all training rows."""
    settings = (
        "training.max_steps=1", "training.baseline_seconds=600", f"data.severity={ALLOW_LEAKAGE}",
        *case.settings,
    )  # fmt: skip
    plain = run_luthier(
        home, "tune", str(train), "--base", case.base, "--name", "rivals", "--validation", str(test),
        *flags(settings),
    )["comparison"]  # fmt: skip
    if plain is None:
        return None
    return Comparison(**{**plain, "baselines": [Baseline(**each) for each in plain["baselines"]]})


def score(home: Path, case: Case, name: str, test: Path, measure: str) -> float:
    long_rows = ["--long-rows", "truncate"] if case.cuts_long_rows else []
    found = run_luthier(home, "evaluate", f"{case.base}:{name}", str(test), *long_rows)
    value: float = found["scores"][measure]
    return value


def run_search(home: Path, case: Case, train: Path, trials: int) -> None:
    """Store the best model of a search with ``trials`` runs as ``searched``."""
    fields = [word for field in SPACE for word in ("--vary", field)]
    run_luthier(
        home, "study", str(train), "--base", case.base, "--name", "searched", "--search",
        str(trials), *fields, *flags(case.settings),
    )  # fmt: skip
    chosen = home / "studies" / "searched" / "chosen.toml"
    run_luthier(home, "tune", str(chosen), "--name", "searched")


def table_row(data: Path, case: Case, trials: int) -> str:
    """A row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        home = new_home(Path(folder))
        train, test = (
            write_rows(case.form(rows), Path(folder) / f"{part}.jsonl")
            for part, rows in (
                ("train", case.cut(rows_of(data / case.folder / case.train))),
                ("test", rows_of(data / case.folder / case.test)[:MOST_TEST_ROWS]),
            )
        )
        result = run_luthier(
            home, "tune", str(train), "--base", case.base, "--name", "tuned", *flags(case.settings)
        )
        spent = f"{result['steps']:,} steps, {result['seconds']:.0f} s"
        found = rivals(home, case, train, test) if case.has_rivals else None
        if found is None:
            verdict = result["verdict"]
            before, kept = (_values(verdict[name]) for name in ("before", "kept"))
            cells = [case.name, f"{len(rows_of(train)):,}", f"{before} → {kept}", spent]
            return _row(*cells, *[""] * (4 if trials else 2))
        if found.rows != len(rows_of(test)):
            sys.exit(f"the rivals of {case.name} were measured on {found.rows} rows of the test")
        tuned = score(home, case, "tuned", test, found.measure)
        cells = [
            case.name, f"{len(rows_of(train)):,} / {found.rows:,}", render(found.measure, tuned),
            spent,
        ]  # fmt: skip
        found = replace(found, tuned=tuned)
        best = found.best
        assert best is not None
        gap = f"{found.gain(best):+.3f}"
        if found.measure in ("accuracy", "recall_at_1"):
            gap += f" (own error {standard_error(tuned, found.rows):.3f})"
        cells += [f"{best.name}, {render(found.measure, best.score)}", gap]
        if trials:
            run_search(home, case, train, trials)
            other = score(home, case, "searched", test, found.measure)
            against = Baseline("search", other, {}, 0.0)
            cells += [render(found.measure, other), f"{found.gain(against):+.3f}"]
        return _row(*cells)


def _values(measured: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in measured.items())


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="folder of the sets")
    parser.add_argument(
        "--set", action="append", dest="sets", help="its name here; all when not given"
    )
    parser.add_argument(
        "--trials", type=int, default=0, help="runs of a search beside each default run"
    )
    arguments = parser.parse_args()
    cases = [each for each in SETS if not arguments.sets or each.name.rstrip("*") in arguments.sets]
    heads = ["set", "rows learned / tested", "defaults", "training", "best rival", "ahead by"]
    heads += ["searched", "ahead by"] if arguments.trials else []
    print(_row(*heads), _row(*["---"] * len(heads)), sep="\n", flush=True)
    for case in cases:
        print(table_row(arguments.data, case, arguments.trials), flush=True)


if __name__ == "__main__":
    main()
