"""Kinds of sounds."""

from __future__ import annotations

import json
from typing import Any

from matplotlib.patches import Rectangle

from defaults import rows_of
from pages.bench import Bench, Colours, Found, Use, wrong_label


def collect(bench: Bench) -> Found:
    """Count the answers for each kind of sound, of the rival and of the network."""
    found: Found = {"wrong": wrong_label(bench), "confusion": {}}
    names = sorted({each["expected"] for each in rows_of(bench.folder / "answers.jsonl")})
    for title, file in (("band means", "answers-bands.jsonl"), ("network", "answers.jsonl")):
        answers = rows_of(bench.folder / file)
        found["confusion"][title] = [
            [sum(e["expected"] == one and e["label"] == other for e in answers) for other in names]
            for one in names
        ]
    rows = [
        {"audio": f"train.zip/{name}/01.ogg", "label": name} for name in ("dog", "fire_crackling")
    ]
    return found | {"names": names, "rows": [json.dumps(row) for row in rows]}


def paint(axes: Any, colours: Colours, found: Found) -> None:
    """Draw the confusion matrices of the rival and of the network next to each other."""
    axes.set_axis_off()
    names = [name.replace("_", " ") for name in found["names"]]
    for place, (title, counts) in enumerate(found["confusion"].items()):
        tile = axes.inset_axes([0.16 + 0.47 * place, 0.22, 0.37, 0.68])
        tile.patch.set_alpha(0)
        for row, line in enumerate(counts):
            for column, count in enumerate(line):
                colour = colours["right" if row == column else "front"]
                share = count / max(1, sum(line))
                tile.add_patch(
                    Rectangle((column - 0.5, row - 0.5), 1, 1, color=colour, alpha=0.75 * share)
                )
                if count:
                    tile.text(
                        column, row, str(count), ha="center", va="center", color=colours["text"]
                    )
        tile.set(xlim=(-0.5, len(names) - 0.5), ylim=(len(names) - 0.5, -0.5))
        right = sum(line[row] for row, line in enumerate(counts))
        tile.set_title(f"{title}: {right} of {sum(map(sum, counts))}", color=colours["text"])
        tile.set_xticks(range(len(names)), names, rotation=40, ha="right")
        tile.set_yticks(range(len(names)), names if not place else [""] * len(names))
        tile.tick_params(colors=colours["text"], length=0)
        for spine in tile.spines.values():
            spine.set_color(colours["grid"])


USE = Use(
    "sounds",
    "Sounds of nature",
    "clips",
    "accuracy",
    "Clips: ESC-10 (Piczak 2015), each CC0 or CC BY 3.0; a cut. Authors are in credits.jsonl.",
    tuple(
        f"examples/sounds/{name}"
        for name in ("train.zip", "test.zip", "credits.jsonl", "NOTICE.md")
    ),
    "Answers for each kind of sound, of band means and of a small network",
    paint,
    collect,
)
