"""Blood cells from few pictures."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any
from zipfile import ZipFile

from defaults import rows_of
from luthier.evaluation.baselines import LINEAR_PROBE, method_name
from pages.bench import (
    PACKAGE,
    Bench,
    Colours,
    Found,
    Use,
    comparison,
    ends,
    paint_curve,
    wrong_label,
)

PER_CLASS = (5, 10, 20)


SHOWN = 4
"""Test pictures of each class in the figure."""


def collect(bench: Bench) -> Found:
    """Measure fewer pictures of each class, and select the first test pictures of each class."""
    (tune,) = (each for each in USE.commands if " tune " in each)
    compared, curve = comparison({"steps": bench.steps}), []
    for count in reversed(PER_CLASS):
        if count < PER_CLASS[-1]:
            with (
                ZipFile(bench.folder / "rows" / "train.zip") as whole,
                ZipFile(bench.folder / "part.zip", "w") as part,
            ):
                for name in whole.namelist():
                    if int(Path(name).stem) <= count:
                        part.writestr(name, whole.read(name))
            bench.run(f"{tune} --name part{count}".replace("rows/train.zip", "part.zip"))
            model = f"efficientnet-lite0:part{count}"
            compared = bench.run(f"luthier compare rows/test.zip --tuned {model}")["result"]
        tuned, _ = ends(compared["contenders"])
        by_name = {method_name(each["name"]): each for each in compared["contenders"]}
        probe = by_name[LINEAR_PROBE]
        curve.append({
            "rows_per_class": count,
            "tuned": [tuned["score"], *tuned["interval"]],
            "logistic regression on the base": [probe["score"], *probe["interval"]],
        })  # fmt: skip
    answers = rows_of(bench.folder / "answers.jsonl")
    shown = [
        {"file": answer["image"].removeprefix("test.zip/"), **answer}
        for answer in answers if int(Path(answer["image"]).stem) <= SHOWN
    ]  # fmt: skip
    return {
        "rows": [
            json.dumps({"image": f"train.zip/{cell}/01.png", "label": cell})
            for cell in ("red", "platelet")
        ],
        "wrong": wrong_label(bench),
        "curve": curve[::-1],
        "shown": [{name: each[name] for name in ("file", "label", "expected")} for each in shown],
    }


def paint(axes: Any, colours: Colours, found: Found) -> None:
    """Draw a test picture of each class with its answer, and accuracy against rows per class."""
    from PIL import Image

    axes.set_axis_off()
    with ZipFile(PACKAGE / "examples" / "pictures" / "test.zip") as archive:
        for place, each in enumerate(found["shown"]):
            row, column = divmod(place, SHOWN)
            tile = axes.inset_axes([0.13 * column, 0.69 - 0.35 * row, 0.12, 0.24])
            tile.imshow(Image.open(io.BytesIO(archive.read(each["file"]))))
            tile.set_axis_off()
            is_right = each["label"] == each["expected"]
            text = each["label"] if is_right else f"{each['label']}, not {each['expected']}"
            tile.set_title(text, color=colours["right" if is_right else "front"], fontsize=10)
    curve = axes.inset_axes([0.64, 0.12, 0.36, 0.84])
    curve.patch.set_alpha(0)
    paint_curve(curve, colours, found, "training pictures per class")
    curve.tick_params(colors=colours["text"])
    for label in (curve.xaxis.label, curve.yaxis.label):
        label.set_color(colours["text"])
    for spine in curve.spines.values():
        spine.set_color(colours["grid"])


USE = Use(
    "pictures",
    "Pictures from few examples",
    "cells",
    "accuracy",
    "Rows: BCCD Dataset (Shenggan; images from cosmicad and akshaylamba), MIT; a cut.",
    tuple(f"examples/pictures/{name}" for name in ("train.zip", "test.zip", "NOTICE.md")),
    "Twelve blood cells with answers, and accuracy against training pictures per class",
    paint,
    collect,
)
