"""Lines of a medieval manuscript, with Tesseract as rival."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import subprocess
import time
import zipfile
from typing import Any

import numpy as np
from PIL import Image

from defaults import rows_of
from luthier.evaluation.transcription import character_errors
from pages.bench import Bench, Colours, Found, Use, comparison, percent

COUNTS = (30,)
"""Training lines of the curve, in addition to no line and all lines."""
LANGUAGE, SCALE = "eng", 2
"""Language and enlargement for Tesseract, best of eng and frm and of 1, 2 and 3 on 20 training
lines."""


def read_with_tesseract(bench: Bench, expected: list[str]) -> Found | None:
    """Return Tesseract as a contender; None if not installed."""
    program = shutil.which("tesseract")
    if program is None:
        return None
    texts, seconds = [], 0.0
    with zipfile.ZipFile(bench.folder / "rows" / "test.zip") as archive:
        for line in archive.read("metadata.jsonl").decode().splitlines():
            image = Image.open(io.BytesIO(archive.read(json.loads(line)["file_name"])))
            pixels = io.BytesIO()
            image.resize((image.width * SCALE, image.height * SCALE)).save(pixels, "PNG")
            began = time.perf_counter()
            done = subprocess.run(
                [program, "-", "-", "-l", LANGUAGE, "--psm", "7"], input=pixels.getvalue(),
                capture_output=True, check=True, env={**os.environ, "OMP_THREAD_LIMIT": "1"},
            )  # fmt: skip
            seconds += time.perf_counter() - began
            texts.append(done.stdout.decode().strip())
    score = character_errors(zip(texts, expected, strict=True))
    return {
        "name": f"Tesseract ({LANGUAGE})", "technique": "zero-shot", "score": score.value,
        "interval": [*score.interval], "seconds": seconds / len(texts), "model_bytes": 0,
    }  # fmt: skip


def curve_point(bench: Bench, count: int) -> Found:
    """Tune on ``count`` lines, and return the error rate of the test lines."""
    part = bench.folder / f"train-{count}"
    with zipfile.ZipFile(bench.folder / "rows" / "train.zip") as archive:
        archive.extractall(part)
    lines = (part / "metadata.jsonl").read_text().splitlines(keepends=True)
    (part / "metadata.jsonl").write_text("".join(lines[:count]))
    bench.run(f"luthier tune {part} --base pp-ocrv6-small --name lines-{count} --epochs 8")
    found = bench.run(f"luthier evaluate pp-ocrv6-small:lines-{count} rows/test.zip")
    result = found["result"]
    return {"lines": count, "score": result["scores"]["cer"]}


def collect(bench: Bench) -> Found:
    """Read the test lines with Tesseract, and measure models of fewer training lines."""
    answers = rows_of(bench.folder / "answers.jsonl")
    before = rows_of(bench.folder / "before.jsonl")
    compared = comparison({"steps": bench.steps})
    rival = read_with_tesseract(bench, [each["expected"] for each in answers])
    contenders = [*compared["contenders"], *([rival] if rival else [])]
    tuned = next(each for each in contenders if each["technique"] == "fine-tuning")
    with zipfile.ZipFile(bench.folder / "rows" / "train.zip") as archive:
        rows = archive.read("metadata.jsonl").decode().splitlines()
    with zipfile.ZipFile(bench.folder / "rows" / "test.zip") as archive:
        image = archive.read(answers[0]["image"].rpartition("/")[2])
    errors = [character_errors([(each["text"], each["expected"])]).value for each in answers]
    worst = answers[int(np.argmax(errors))]
    unchanged = next(each for each in contenders if each["name"] == "pp-ocrv6-small")
    curve = [{"lines": 0, "score": unchanged["score"]}]
    curve += [curve_point(bench, count) for count in COUNTS]
    curve.append({"lines": len(rows), "score": tuned["score"]})
    points = ", ".join(f"{percent(each['score'])} with {each['lines']}" for each in curve)
    return {
        "rows": rows[:2],
        "wrong": f"{worst['image']}\nanswer:   {worst['text']}\nexpected: {worst['expected']}",
        "compared": {
            **compared, "contenders": sorted(contenders, key=lambda each: each["score"]),
            "verdict": f"`compare` says: {compared['verdict']}",
        },
        "curve": curve,
        "facts": f"Character errors by training lines: {points}.",
        "line": {
            "image": base64.b64encode(image).decode(), "expected": answers[0]["expected"],
            "before": before[0]["text"], "after": answers[0]["text"],
        },
    }  # fmt: skip


def paint(axes: Any, colours: Colours, found: Found) -> None:
    """Draw a line of the manuscript with its readings, and the error rate against lines."""
    axes.set_axis_off()
    line = found["line"]
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(line["image"]))).convert("L"))
    top = axes.inset_axes([0, 0.86, 1, 0.14])
    top.imshow(pixels, cmap="gray", vmin=0, vmax=255)
    top.set_axis_off()
    parts = {"before": "point", "after": "front", "expected": "right"}
    for place, (name, colour) in enumerate(parts.items()):
        height = 0.8 - 0.075 * place
        axes.text(0, height, name, color=colours["text"], transform=axes.transAxes)
        axes.text(
            0.14, height, line[name], color=colours[colour], family="monospace",
            transform=axes.transAxes,
        )  # fmt: skip
    below = axes.inset_axes([0.08, 0.1, 0.9, 0.46])
    below.patch.set_alpha(0)
    counts = [point["lines"] for point in found["curve"]]
    scores = [100 * point["score"] for point in found["curve"]]
    below.plot(counts, scores, "o-", color=colours["front"], label="tuned")
    for each, style in zip(untuned(found), ("--", ":"), strict=False):
        name = re.sub("^pp-.*", "unchanged", each["name"])
        below.axhline(100 * each["score"], ls=style, color=colours["point"], label=name)
    below.set(xlabel="training lines", ylabel="character errors, %", ylim=(0, None))
    below.set_xticks(counts)
    below.tick_params(colors=colours["text"])
    below.xaxis.label.set_color(colours["text"])
    below.yaxis.label.set_color(colours["text"])
    for spine in below.spines.values():
        spine.set_color(colours["grid"])
    below.legend(frameon=False, labelcolor=colours["text"], loc="upper right", fontsize=9)


def untuned(found: Found) -> list[Found]:
    return [each for each in comparison(found)["contenders"] if each["technique"] == "zero-shot"]


USE = Use(
    "old-scripts",
    "Lines of old scripts",
    "lines",
    "character errors",
    "Lines: CREMMA Medieval (Pinche 2022), CC BY 4.0, codex 660 of the University of Pennsylvania; "
    "cut, scaled to 48 pixels, WebP.",
    tuple(f"examples/old-scripts/{name}" for name in ("train.zip", "test.zip", "NOTICE.md")),
    "A line of a manuscript read before and after tuning, and character errors by training lines",
    paint,
    collect,
)
