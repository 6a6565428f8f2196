"""A task with and without text of the domain before."""

from __future__ import annotations

from typing import Any

from defaults import rows_of
from pages.bench import PACKED, Bench, Colours, Found, Use, first_rows, percent

WITHOUT, WITH = "task alone", "text first"
"""Configurations of the preset `domain`."""


def collect(bench: Bench) -> Found:
    """Compare the task with and without the text stage, from the study of the page."""
    (study,) = (step["result"] for step in bench.steps if " study " in step["command"])
    arms = {row["name"]: row for row in study["rows"]}
    contenders = [
        {
            "name": f"{name}, mean of {len(arms[name]['seeds'])} seeds", "technique": technique,
            "score": arms[name]["value"], "interval": arms[name]["interval"],
            "seconds": None, "model_bytes": 0,
        }
        for name, technique in ((WITH, "fine-tuning"), (WITHOUT, "task alone"))
    ]  # fmt: skip
    both = arms[WITH]["value"], arms[WITHOUT]["value"]
    behind = next(arm for arm in arms.values() if arm["behind_best"] is not None)
    if not behind["significant"]:
        text = "**Text of the domain made no significant difference here**"
    elif both[0] > both[1]:
        text = "Text of the domain helps first"
    else:
        text = "**Text of the domain hurt here**"
    rows = rows_of(bench.folder / "rows" / "test.jsonl")
    return {
        "rows": first_rows(bench),
        "headline": f"{text}: entity F1 {percent(both[0])} with papers of the field read first, "
        f"{percent(both[1])} without, on {len(rows):,} unseen sentences.",
        "compared": {
            "contenders": contenders, "rows": len(rows),
            "worth_it": (both[0] > both[1]) if behind["significant"] else None,
            "verdict": f"`study` says: {study['verdict']}",
        },
        "seeds": {each["name"]: arms[name]["seeds"]
                  for each, name in zip(contenders, (WITH, WITHOUT), strict=True)},
    }  # fmt: skip


def arms_result(found: Found) -> str:
    """Return the scores with and without the text stage."""
    read, alone = found["compared"]["contenders"]
    return f"{percent(read['score'])} text first, {percent(alone['score'])} task alone"


def paint(axes: Any, colours: Colours, found: Found) -> None:
    """Draw the score with and without the text stage, with intervals and seeds."""
    for place, each in enumerate(reversed(found["compared"]["contenders"])):
        low, high = each["interval"]
        colour = colours["front" if each["technique"] == "fine-tuning" else "point"]
        axes.plot([100 * low, 100 * high], [place, place], color=colour, linewidth=3)
        axes.plot(100 * each["score"], place, "o", color=colour, markersize=11)
        seeds = [100 * score for score in found["seeds"][each["name"]]]
        axes.plot(seeds, [place - 0.15] * len(seeds), "|", color=colours["text"], markersize=14)
        axes.text(100 * low, place + 0.1, each["name"], color=colours["text"], va="bottom")
    axes.set(xlabel="entity F1 on unseen sentences, %", yticks=[], ylim=(-0.5, 1.5))


USE = Use(
    "domain-text",
    "Text of the domain, then the task",
    "sentences",
    "entity F1",
    "Rows: SOFC-Exp corpus (Friedrich et al. 2020), CC BY 4.0; a cut. Papers: CC BY, their "
    "authors are listed in NOTICE.md.",
    tuple(f"examples/domain-text/{name}" for name in (*PACKED, "papers.jsonl.gz")),
    "Entity F1 with and without the text stage, with intervals and seeds",
    paint,
    collect,
    result=arms_result,
)
