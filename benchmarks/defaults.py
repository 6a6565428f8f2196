"""A run with defaults beside the best simple baseline, on one set of rows after another.

    python benchmarks/defaults.py DATA [--base all-minilm-l6-v2] [--set sib200_vi ...]

Each set is tuned with no setting but the base, in a process and a home of its own. The run itself fits
the baselines on the same training rows and measures all on the same held-out rows (`comparison` of its
result); this only writes the table. Sets whose rows no baseline goes with are named below it.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from children import run
from luthier.evaluation.baselines import Baseline, Comparison, render

SETS = ("sib200_vi", "sib200_en", "sms_spam", "banking77", "wnut17", "ncbi_disease")


def tuned(data: Path, base: str, settings: list[str]) -> dict[str, Any]:
    """The result of a run with defaults in a home that is thrown away."""
    from luthier.files import luthier_home

    command = [sys.executable, "-m", "luthier", "tune", str(data), "--base", base]
    command += ["--name", "x", "--json"]
    command += [part for setting in settings for part in ("--set", setting)]
    with tempfile.TemporaryDirectory() as home:
        (Path(home) / "models").mkdir()
        (Path(home) / "models" / "base").symlink_to(luthier_home() / "models" / "base")
        return run(command, {**os.environ, "LUTHIER_HOME": home}).report


def line(name: str, result: dict[str, Any]) -> str | None:
    """A row of the table; ``None`` where nothing was compared."""
    plain = result["comparison"]
    if plain is None:
        return None
    baselines = [Baseline(**each) for each in plain["baselines"]]
    found = Comparison(**{**plain, "baselines": baselines})
    best = found.best
    assert best is not None and found.tuned is not None
    gain = found.gain(best)
    cells = (
        name, f"{found.train_rows:,} / {found.rows:,}", render(found.measure, found.tuned),
        f"{result['steps']} steps, {result['seconds']:.0f} s", render(found.measure, best.score),
        f"{best.name}, {best.seconds:.1f} s", "yes" if gain > 0 else "**no**",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="folder of the sets, each with train.jsonl")
    parser.add_argument("--base", default="all-minilm-l6-v2")
    parser.add_argument("--set", action="append", dest="sets", help="one set; all when not given")
    parser.add_argument("--setting", action="append", default=[], help="KEY=VALUE of the recipe")
    asked = parser.parse_args()
    print("| set | rows learned / measured | run | training | best baseline | what | run wins |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    left_out = []
    for name in asked.sets or SETS:
        text = line(name, tuned(asked.data / name / "train.jsonl", asked.base, asked.setting))
        if text is None:
            left_out.append(name)
        else:
            print(text, flush=True)
    if left_out:
        print(f"\nNo baseline goes with the rows of {', '.join(left_out)}.")


if __name__ == "__main__":
    main()
