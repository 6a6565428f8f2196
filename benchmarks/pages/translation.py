"""Translations against training sentences."""

from __future__ import annotations

import json
from typing import Any

from defaults import rows_of, write_rows
from pages.bench import PACKED, Bench, Colours, Found, Use, comparison, first_rows

SENTENCES = (100, 200, 400)


def collect(bench: Bench) -> Found:
    """Measure fewer training sentences, and select the worst translation."""
    tune, evaluate = (
        next(each for each in USE.commands if f" {name} " in each) for name in ("tune", "evaluate")
    )
    answers = rows_of(bench.folder / "answers.jsonl")
    compared = comparison({"steps": bench.steps})
    measure = compared["measure"]
    tuned = next(each for each in compared["contenders"] if each["technique"] == "fine-tuning")
    curve = [{"rows": SENTENCES[-1], "tuned": [tuned["score"], *tuned["interval"]]}]
    train = rows_of(bench.folder / "rows" / "train.jsonl")
    for count in reversed(SENTENCES[:-1]):
        write_rows(train[:count], bench.folder / "part.jsonl")
        bench.run(f"{tune}{count}".replace("rows/train.jsonl", "part.jsonl"))
        scored = bench.run(f"{evaluate.split(' --output')[0].replace(':vi', f':vi{count}')}")[
            "result"
        ]
        score = [scored["scores"][measure], *scored["intervals"][measure]]
        curve.append({"rows": count, "tuned": score})
    rows = rows_of(bench.folder / "rows" / "test.jsonl")
    several = sum(len(row["completion"]) > 1 for row in rows)
    worst = min(answers, key=lambda each: each["scores"][measure])
    return {
        "rows": [*first_rows(bench, 1), json.dumps(
            next(row for row in rows if len(row["completion"]) > 1), ensure_ascii=False
        )],
        "wrong": f"{worst['prompt']}\nanswer:   {worst['reply'].strip()}\n"
        f"expected: {worst['expected']}",
        "curve": curve[::-1],
        "facts": f"{several} of {len(rows)} test sentences have several translations: the best counts.",
    }  # fmt: skip


def paint(axes: Any, colours: Colours, found: Found) -> None:
    """Draw chrF against training sentences, with the rivals as lines."""
    places = [point["rows"] for point in found["curve"]]
    scores = [[100 * each for each in point["tuned"]] for point in found["curve"]]
    axes.plot(places, [s[0] for s in scores], "o-", color=colours["front"], label="tuned")
    axes.fill_between(
        places, [s[1] for s in scores], [s[2] for s in scores], color=colours["front"], alpha=0.15
    )
    rivals = [e for e in comparison(found)["contenders"] if "fine-tuning" not in e["technique"]]
    for each, style in zip(rivals[:2], ("--", ":"), strict=False):
        axes.axhline(
            100 * each["score"], color=colours["point"], linestyle=style, label=each["name"]
        )
    axes.set_xscale("log")
    axes.set_xticks(places, [f"{place:,}" for place in places])
    axes.minorticks_off()
    axes.set(xlabel="training sentences", ylabel="chrF on unseen sentences, %", ylim=(0, None))
    axes.legend(frameon=False, labelcolor=colours["text"], loc="lower right")


USE = Use(
    "translation",
    "Translation",
    "sentences",
    "chrF",
    "Rows: Tatoeba (tatoeba.org), CC BY 2.0 FR, by the contributors in `source`; a cut.",
    tuple(f"examples/translation/{name}" for name in PACKED),
    "chrF against training sentences, with cheap rivals",
    paint,
    collect,
)
