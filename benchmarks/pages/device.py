"""A chat model with fewer bits."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from children import table
from pages.bench import ROWS, Bench, Colours, Found, Use, first_rows, percent

FORMS = ("bf16", "q8_0", "q4_k_m", "q4_0")
"""Types of GGUF weights."""
BOT = "smollm2-135m-instruct:bot"
FEW_BITS = "q4_k_m"


def collect(bench: Bench) -> Found:
    """Measure score, speed and memory of each form under one thread."""
    side = Path(__file__).parents[1] / "device_side.py"

    def measure(kind: str) -> None:
        bench.run(
            f"OMP_NUM_THREADS=1 LUTHIER_BACKEND=llama.cpp LUTHIER_GGUF_TYPE={kind} "
            f"{sys.executable} {side} {BOT} rows/test.jsonl > {kind}.json"
        )

    with ThreadPoolExecutor(len(FORMS)) as pool:
        [*pool.map(measure, FORMS)]
    return collect_forms(bench)


def collect_forms(bench: Bench) -> Found:
    """Compare the measured forms; a form whose file was refused has no score."""
    from luthier.evaluation.significance import RowScores, paired_differences

    forms, scores, wrong, refused = list[Found](), dict[str, RowScores](), "", list[str]()
    for kind in FORMS:
        (folder,) = (bench.home / "cache" / "gguf").glob(f"*~{kind}")
        if refusal := json.loads((folder / "parity.json").read_text())["refusal"]:
            refused.append(f"{kind} is refused: {refusal.split(';')[0]}.")
            continue
        found = json.loads((bench.folder / f"{kind}.json").read_text())
        file = folder / "model.gguf"
        answers = found.pop("answers")
        scores[kind] = RowScores.of([each["scores"]["first_line"] for each in answers])
        forms.append({
            "name": kind, "bytes": file.stat().st_size, "score": scores[kind].value,
            "interval": list(scores[kind].interval), "rows": len(answers), **found,
        })  # fmt: skip
        if kind == FEW_BITS:
            each = next(each for each in answers if each["scores"]["first_line"] == 0)
            wrong = f"{each['prompt']}\nanswer:   {each['reply'].strip()}\n"
            wrong += f"expected: {each['expected']}"
    lost = {
        kind: paired_differences({"": (scores[kind], scores["bf16"])})[""]
        for kind in scores
        if kind != "bf16"
    }
    told = [
        f"{kind} {0.0 - 100 * each.value:+.1f} \N{PLUS-MINUS SIGN} {100 * each.error:.1f} points"
        for kind, each in lost.items()
    ]
    return {
        "rows": first_rows(bench),
        "wrong": wrong,
        "forms": forms,
        "headline": form_sentence(forms),
        "compared": {
            "contenders": [
                {
                    "name": each["name"], "score": each["score"], "interval": each["interval"],
                    "technique": "16 bits" if each["name"] == "bf16" else "fine-tuning, fewer bits",
                    "seconds": None, "model_bytes": each["bytes"],
                }
                for each in forms
            ],
            "rows": forms[0]["rows"],
            "worth_it": None,
            "verdict": f"Against 16 bits, by pairs of {forms[0]['rows']} messages: {', '.join(told)}. "
            f"One message is {100 / forms[0]['rows']:.1f} points.",
        },
        "facts": " ".join(refused),
    }  # fmt: skip


def form_sentence(forms: Sequence[Found]) -> str:
    """Return scores and sizes of the forms, the largest first."""
    parts = [f"{e['name']} {percent(e['score'])} in {e['bytes'] / 1e6:,.0f} MB" for e in forms]
    return f"Right labels on {forms[0]['rows']} unseen messages by weights: {', '.join(parts)}."


def form_table(found: Found) -> str:
    """Return size, score, speed and memory of each form, and its scores with other seeds."""
    seeds = [*found.get("other_seeds", {}).values()]
    lines = [
        [
            each["name"], f"{each['bytes'] / 1e6:,.0f}", percent(each["score"]),
            f"{100 * each['interval'][0]:.1f} to {100 * each['interval'][1]:.1f}",
            ", ".join(f"{100 * scores[each['name']]:.1f}" for scores in seeds),
            f"{each['tokens_per_second']:,.0f}", f"{each['memory_bytes'] / 1e6:,.0f}",
        ]
        for each in found["forms"]
    ]  # fmt: skip
    heads = ["weights", "MB", "right labels", "95 % interval", "seeds 1, 2"]
    return table([*heads, "tokens a second", "memory, MB"], lines)


def form_result(found: Found) -> str:
    """Return the scores of the largest and the smallest form."""
    first, *_, last = found["forms"]
    return f"{percent(first['score'])} {first['name']}, {percent(last['score'])} {last['name']}"


def paint(axes: Any, colours: Colours, found: Found) -> None:
    """Draw the score of each form against the size of the file."""
    for each in found["forms"]:
        size, score = each["bytes"] / 1e6, 100 * each["score"]
        low, high = (100 * end for end in each["interval"])
        axes.plot([size, size], [low, high], color=colours["grid"], linewidth=3)
        colour = colours["front" if each["name"].startswith("q4") else "point"]
        axes.plot(size, score, "o", color=colour, markersize=11)
        axes.text(size, high + 1.5, each["name"], color=colours["text"], ha="center")
    axes.set(
        xlabel="file, MB",
        ylabel="right labels on unseen messages, %",
        ylim=(30, 100),
        xlim=(80, 290),
    )


USE = Use(
    "device",
    "A small model for a device",
    "messages",
    "right labels",
    "Rows: Fernspoke Cycles, written for luthier, Apache-2.0. The company is invented.",
    tuple(f"demo/{name}" for name in ("validation.jsonl", "README.md", *ROWS[:2])),
    "Right labels of a chat model against the size of its file, from 16 to 4 bits",
    paint,
    collect,
    form_table,
    form_result,
)
