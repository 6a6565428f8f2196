"""The next purchase of a customer."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from typing import Any

from luthier.workflows.figures import paint_bars
from pages.bench import PACKED, Bench, Colours, Found, Use, comparison, first_rows, percent


def collect(bench: Bench) -> Found:
    """Find a customer whose next purchase is not among the first ten items of item counts."""
    from luthier.data.rows import load_rows
    from luthier.data.shapes.texts import History

    wrong = list[str]()
    for row in load_rows(str(bench.folder / "rows" / "test.jsonl")):
        assert isinstance(row, History)
        command = f"luthier nearest item-counts:counts rows/catalogue.txt {shlex.quote(row.text)}"
        bench.run(f"{command} --top 10 --json > nearest.json")
        found = json.loads((bench.folder / "nearest.json").read_text())
        new = [str(each["name"]) for each in found["neighbours"]]  # without the items of the row
        if row.positive not in new:
            wrong = [f"bought: {', '.join(row.items[::-1])}", f"answer: {', '.join(new)}"]
            wrong.append(f"expected: {row.positive}")
            break
    return {
        "rows": first_rows(bench), "wrong": "\n".join(wrong), "facts": counts_sentence(bench.steps)
    }  # fmt: skip


def counts_sentence(steps: Sequence[Found]) -> str:
    """Return the recall of the stored item counts."""
    (found,) = (s["result"] for s in steps if "evaluate item-counts" in s["command"])
    low, high = (100 * end for end in found["intervals"]["recall_at_10"])
    return (
        f"Stored as a model, `item-counts` has {percent(found['scores']['recall_at_10'])} "
        f"({low:.1f} to {high:.1f})."
    )


def paint(axes: Any, colours: Colours, found: Found) -> None:
    """Draw the score of each contender with its interval."""
    bars = [
        (each["name"], each["score"], tuple(each["interval"]), "fine-tuning" in each["technique"])
        for each in comparison(found)["contenders"]
    ]
    paint_bars(axes, colours, USE.measure, bars)


USE = Use(
    "recommendation",
    "Recommend the next purchase",
    "customers",
    "recall at 10",
    "Purchases: Fernspoke Cycles, drawn for luthier (benchmarks/purchase_rows.py), Apache-2.0.",
    tuple(f"examples/recommendation/{name}" for name in (*PACKED, "catalogue.txt")),
    "Recall at 10 of item counts, a tuned encoder and simple baselines",
    paint,
    collect,
)
