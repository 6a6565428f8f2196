"""Agreement between `luthier advise` and the later result of `luthier compare`.

    python benchmarks/advice_vs_comparison.py DATA [--set sib200_vi ...]

`advise` runs a trial of 60 s on each data set. The data set is then tuned with default settings,
and the tuned model is compared on at most 500 test rows that neither command saw. Both agree if
tuning was advised and is worth it, or was not advised and is not shown to be better. If the rows
decide nothing, the advice has low confidence.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from defaults import SETS, Case, flags, new_home, rows_of, run_luthier, write_rows

NAMES = (
    "sib200_vi", "sib200_en", "banking77, 20 rows a label", "banking77, 5 rows a label",
    "sms_spam, 100 rows", "wnut17",
)  # fmt: skip
MOST_TEST_ROWS = 500


def table_row(data: Path, case: Case) -> str:
    with tempfile.TemporaryDirectory() as folder:
        home = new_home(Path(folder))
        rows = rows_of(data / case.folder / case.test)
        chosen = rows[:: max(1, len(rows) // MOST_TEST_ROWS)][:MOST_TEST_ROWS]
        train = write_rows(
            case.form(case.cut(rows_of(data / case.folder / case.train))),
            Path(folder) / "train.jsonl",
        )
        test = write_rows(case.form(chosen), Path(folder) / "test.jsonl")
        settings = flags(case.settings)
        advised = run_luthier(home, "advise", str(train), "--base", case.base, *settings)
        advice = advised["recommendation"]
        run_luthier(home, "tune", str(train), "--base", case.base, "--name", "tuned", *settings)
        found = run_luthier(
            home, "compare", str(test), "--tuned", f"{case.base}:tuned", "--train", str(train)
        )
    agree = advice["tune"] is (found["worth_it"] is True)
    said = "tune" if advice["tune"] else ", ".join(advice["techniques"])
    cells = [
        case.name, f"{said}{'' if advice['sure'] else ' (not sure)'}", found["verdict"],
        "yes" if agree else "no",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="folder of the sets")
    parser.add_argument("--set", action="append", dest="sets", choices=NAMES)
    arguments = parser.parse_args()
    print("| set | advised | found | agree |", "| --- | --- | --- | --- |", sep="\n", flush=True)
    for name in arguments.sets or NAMES:
        (case,) = [each for each in SETS if each.name.rstrip("*") == name]
        print(table_row(arguments.data, case), flush=True)


if __name__ == "__main__":
    main()
