"""Run the commands of a use-case page, and write its numbers and figures.

    python benchmarks/use_cases.py NAME [--write]

The shell blocks of ``docs/use-cases/NAME.md`` run in an empty folder and a new LUTHIER_HOME with the
base models of the current one. ``NAME.json`` next to the page keeps scores, intervals, processor
seconds and sizes. Figures, tables and sentences between markers, the index page and ``index.json``
are written from that file; ``--write`` writes them without a run.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import io
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
from matplotlib.patches import Rectangle

from children import table
from defaults import new_home, rows_of, write_rows
from luthier.workflows.figures import draw, paint_bars

ROOT = Path(__file__).parent.parent
PAGES = ROOT / "docs" / "use-cases"
PACKAGE = ROOT / "src" / "luthier"
BLOCK = re.compile(r"(<!-- not run: [^\n]+ -->\n)?^```sh\n(.*?)^```", re.M | re.S)
WRITTEN = "written by benchmarks/use_cases.py"
MEASURED = ("tune", "compare", "evaluate", "predict", "study")
"""Commands whose JSON object is stored."""
Found = dict[str, Any]
Colours = dict[str, str]


@dataclass(frozen=True)
class Bench:
    """Folder and LUTHIER_HOME of a run."""

    folder: Path
    home: Path
    steps: list[Found]
    """Commands that ran."""

    def run(self, command: str) -> Found:
        """Return processor seconds and result of a command, by its words."""
        words = shlex.split(re.sub(r"^(\w+=\S+ )+", "", command))
        as_json = words[0] == "luthier" and words[1] in MEASURED and "--output" not in words
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = {**os.environ, "LUTHIER_HOME": str(self.home), "PATH": path}
        print("$", command, flush=True)
        began = time.perf_counter()
        with tempfile.TemporaryFile("w+") as out:
            child = subprocess.Popen(
                ["bash", "-euc", command + " --json" * as_json],
                cwd=self.folder, env=environment, stdout=out,
            )  # fmt: skip
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
            out.seek(0)
            text = out.read()
        if child.returncode:
            sys.exit(f"{command} failed:\n{text}")
        found: Found = {
            "command": command,
            "processor_seconds": round(usage.ru_utime + usage.ru_stime, 1),
            "seconds": round(time.perf_counter() - began, 1),
            "peak_bytes": usage.ru_maxrss * 1024,
        }
        if as_json:
            result = json.loads(text)
            found["result"] = {
                name: value for name, value in result.items() if str(self.home) not in str(value)
            }
        self.steps.append(found)
        return found


@dataclass(frozen=True)
class Use:
    """A use case: its rows, and how its page shows the results."""

    name: str
    title: str
    unit: str
    """Plural noun of the held-out rows."""
    measure: str
    """The compared score in words."""
    credit: str
    files: tuple[str, ...]
    """Paths in the package."""
    alt: str
    """Text for readers without the figure."""
    paint: Callable[[Any, Colours, Found], None]
    collect: Callable[[Bench], Found]
    """Measurements beyond the page's commands: rows, a wrong answer, a curve."""

    @property
    def page(self) -> Path:
        """Return the page."""
        return PAGES / f"{self.name}.md"

    @property
    def commands(self) -> list[str]:
        """Return the page's commands, without lines that install extras."""
        blocks = [body for skipped, body in BLOCK.findall(self.page.read_text()) if not skipped]
        lines = "".join(blocks).splitlines()
        return [line for line in lines if line and not line.startswith("pip install")]


def run(use: Use, tuned: Path | None = None) -> Found:
    """Run the commands of the page, and return what they measured.

    ``tuned`` is the folder of the model, if the command of tuning ran before.
    """
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder, "work"), new_home(Path(folder)), [])
        bench.folder.mkdir()
        for command in use.commands:
            if tuned is not None and " tune " in command:
                bench.steps.append(adopt(tuned, bench.home, command))
            else:
                bench.run(command)
        steps = [*bench.steps]
        further = use.collect(bench)
    return {
        "name": use.name,
        "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
        "versions": {
            name: version(name) for name in ("luthier", "torch", "transformers", "scikit-learn")
        }
        | {"python": platform.python_version()},
        "steps": steps,
        **further,
    }


def adopt(tuned: Path, home: Path, command: str) -> Found:
    """Copy a model under the name of ``command``, and return the seconds of its training."""
    name = command.split("--name ")[1].split()[0]
    target = home / "models" / "custom" / tuned.parent.name / name
    shutil.copytree(tuned, target)
    record = target / "luthier.json"
    record.write_text(record.read_text().replace(f":{tuned.name}", f":{name}"))
    seconds = json.loads(record.read_text())["metrics"]["seconds"]
    return {"command": command, "processor_seconds": 0.0, "seconds": seconds, "before": True}


def comparison(found: Found) -> Found:
    """Return the result of the last `luthier compare`, or of the page's own comparison."""
    if "compared" in found:
        own: Found = found["compared"]
        return own
    results = [step["result"] for step in found["steps"] if "compare" in step["command"]]
    last: Found = results[-1]
    return last


def ends(contenders: Sequence[Found]) -> tuple[Found, Found]:
    """Return the best tuned and the best untuned contender."""
    tuned = next(each for each in contenders if each["technique"].startswith("fine-tuning"))
    return tuned, next(each for each in contenders if "fine-tuning" not in each["technique"])


def percent(score: float) -> str:
    return f"{100 * score:.1f} %"


def sentence(use: Use, found: Found) -> str:
    """Return the result in one sentence: the loser first if the tuned model does not win."""
    if "headline" in found:
        return str(found["headline"])
    compared = comparison(found)
    tuned, rival = ends(compared["contenders"])
    own = f"{use.measure} {percent(tuned['score'])} of the tuned model"
    other = f"{percent(rival['score'])} of the best rival, {rival['name']}"
    where = f"on {compared['rows']:,} unseen {use.unit}"
    if compared["worth_it"]:
        return f"Tuning is worth it: {own} against {other}, {where}."
    if compared["worth_it"] is False:
        return f"**Do not tune for this**: {own} against {other}, {where}."
    return f"**A cheap rival may be as good**: {own} against {other}, {where}."


def result_table(found: Found) -> str:
    """Return the table of the contenders, with processor seconds and size of the tuned model."""
    tuning = [s for s in found["steps"] if " tune " in s["command"] and "before" not in s]
    lines = []
    for each in comparison(found)["contenders"]:
        low, high = each["interval"]
        own = [s for s in tuning if s["result"].get("model_id") == each["name"]]
        name = f"**{each['name']}** (tuned)" if own else each["name"]
        lines.append([
            name, percent(each["score"]), f"{100 * low:.1f} to {100 * high:.1f}",
            f"{own[0]['processor_seconds']:,.0f}" if own else "",
            "" if each["seconds"] is None else f"{1000 * each['seconds']:,.1f}",
            f"{each['model_bytes'] / 1e6:,.0f}" if each["model_bytes"] else "",
        ])  # fmt: skip
    heads = ["", "score", "95 % interval", "tuning, processor s", "ms an answer", "MB"]
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    total = sum(step["processor_seconds"] for step in found["steps"])
    shown = form_table(found) if "forms" in found else table(heads, lines)
    before = [f" but the tuning ({s['seconds']:,.0f} s)" for s in found["steps"] if "before" in s]
    return (
        f"{shown}\n\nAll commands{''.join(before)}: {total:,.0f} processor seconds on "
        f"two shared cores, {found['date']}, with {versions}. [All numbers]({found['name']}.json)"
    )


def fill(text: str, name: str, body: str) -> str:
    """Replace the part between the markers of ``name``; a page may lack the part."""
    begin, end = f"<!-- {name}: {WRITTEN} -->\n", f"<!-- end of {name} -->"
    if begin not in text:
        return text
    before, rest = text.split(begin)
    return f"{before}{begin}{body.strip()}\n{end}{rest.split(end)[1]}"


def picture(name: str, alt: str, width: int | None = None) -> str:
    """Return the figure, for light and for dark pages."""
    size = f' width="{width}"' if width else ""
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{name}-dark.svg">'
        f'<img src="{name}.svg" alt="{alt}"{size}></picture>'
    )


def write(use: Use, found: Found) -> None:
    """Write the figure and the generated parts of the page."""
    draw(PAGES / f"{use.name}.svg", lambda axes, colours: use.paint(axes, colours, found), True)
    text = use.page.read_text()
    parts = {
        "result": f"{sentence(use, found)}\n\n{picture(use.name, use.alt)}",
        "rows": "```json\n" + "\n".join(found["rows"]) + "\n```",
        "table": result_table(found),
        "wrong answer": f"```text\n{found.get('wrong', '')}\n```",
        "verdict": comparison(found)["verdict"]
        if "compared" in found
        else f"`compare` says: {comparison(found)['verdict']}",
        "facts": found.get("facts", ""),
        "source": f"{use.credit} The notice is next to the rows that `luthier examples` writes.",
    }
    for name, body in parts.items():
        text = fill(text, name, body)
    use.page.write_text(text)


def inside(path: str) -> str:
    """Return the path of a sample file in the folder that `luthier examples` writes."""
    parts = Path(path).parts
    return "/".join(parts[2 if parts[0] == "examples" else 1 :]).removesuffix(".xz")


def write_index() -> None:
    """Write ``index.json`` and the cards of the index page, from the stored results."""
    entries, cards, lines = [], [], []
    for use in USES.values():
        if not use.page.is_file():
            continue
        entry: Found = {
            "name": use.name, "title": use.title, "result": "", "measure": use.measure,
            "page": f"use-cases/{use.name}.md", "figure": f"use-cases/{use.name}.svg",
            "data": f"use-cases/{use.name}.json", "credit": use.credit, "commands": use.commands,
            "files": {path: inside(path) for path in use.files},
        }  # fmt: skip
        stored = PAGES / f"{use.name}.json"
        if stored.is_file():
            found = json.loads(stored.read_text())
            compared = comparison(found)
            tuned, rival = ends(compared["contenders"])
            entry |= {
                "result": f"{percent(tuned['score'])} tuned, {percent(rival['score'])} best rival",
                "tuned": tuned["score"], "rival": rival["score"], "worth_it": compared["worth_it"],
                "date": found["date"], "versions": found["versions"],
            }  # fmt: skip
            link = picture(use.name, use.alt, 360)
            cards.append(
                f"## [{use.title}]({use.name}.md)\n\n[{link}]({use.name}.md)\n\n{sentence(use, found)}"
            )
            ends_of = [
                f"{percent(each['score'])} ({100 * each['interval'][0]:.1f} to "
                f"{100 * each['interval'][1]:.1f})"
                for each in (tuned, rival)
            ]
            lines.append([
                f"[{use.name}](use-cases/{use.name}.md)", use.measure,
                f"{compared['rows']:,} {use.unit}", ends_of[0], ends_of[1], rival["name"],
                f"{sum(step['processor_seconds'] for step in found['steps']):,.0f}",
            ])  # fmt: skip
        entries.append(entry)
    # The package needs the file without a checkout; docs/use-cases/index.json is a link to it.
    (PACKAGE / "examples" / "index.json").write_text(
        json.dumps(entries, indent=1, ensure_ascii=False) + "\n"
    )
    index = PAGES / "index.md"
    index.write_text(fill(index.read_text(), "cards", "\n\n".join(cards)))
    results = ROOT / "docs" / "results.md"
    heads = ["use case", "score", "test rows", "tuned", "best rival", "rival", "processor s"]
    results.write_text(fill(results.read_text(), "use cases", table(heads, lines)))


def first_rows(bench: Bench, count: int = 2) -> list[str]:
    return (bench.folder / "rows" / "train.jsonl").read_text().split("\n")[:count]


def wrong_label(bench: Bench) -> str:
    """Return the most certain wrong label of `evaluate --output`."""
    answers = rows_of(bench.folder / "answers.jsonl")
    wrong = [answer for answer in answers if answer["label"] != answer["expected"]]
    worst = max(wrong, key=lambda answer: answer["scores"][answer["label"]])
    certain = worst["scores"][worst["label"]]
    shown = next(worst[key] for key in ("text", "image", "audio") if key in worst)
    return (
        re.sub("\n+", "\n", shown) + "\n"
        f"answer:   {worst['label']} ({percent(certain)} certain)\n"
        f"expected: {worst['expected']}"
    )


INTENTS = 20
PER_INTENT = (5, 10, 20, 40)


def collect_routes(bench: Bench) -> Found:
    """Measure fewer rows per intent, and TF-IDF with logistic regression."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    train = rows_of(bench.folder / "rows" / "train.jsonl")
    test = rows_of(bench.folder / "rows" / "test.jsonl")
    (tune,) = (each for each in USES["route-messages"].commands if " tune " in each)
    curve = []
    compared = comparison({"steps": bench.steps})
    for count in reversed(PER_INTENT):
        rows = train[: INTENTS * count]
        if len(rows) < len(train):
            write_rows(rows, bench.folder / "part.jsonl")
            bench.run(f"{tune} --name part{count}".replace("rows/train.jsonl", "part.jsonl"))
            model = f"all-minilm-l6-v2:part{count}"
            compared = bench.run(f"luthier compare rows/test.jsonl --tuned {model}")["result"]
        by_name = {each["name"]: each for each in compared["contenders"]}
        tuned, _ = ends(compared["contenders"])
        words = make_pipeline(
            TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=10)
        )
        words.fit([row["text"] for row in rows], [row["label"] for row in rows])
        score = words.score([row["text"] for row in test], [row["label"] for row in test])
        error = 1.96 * (score * (1 - score) / len(test)) ** 0.5
        probe = by_name["logistic regression on the base model"]
        curve.append({
            "rows_per_class": count,
            "tuned": [tuned["score"], *tuned["interval"]],
            "logistic regression on embeddings": [probe["score"], *probe["interval"]],
            "TF-IDF": [score, score - error, score + error],
        })  # fmt: skip
    return {"rows": first_rows(bench), "wrong": wrong_label(bench), "curve": curve[::-1]}


def paint_curve(
    axes: Any, colours: Colours, found: Found, rows: str = "training rows per intent"
) -> None:
    """Draw accuracy against rows per class, a line for each method."""
    names = [name for name in found["curve"][0] if not name.startswith("rows")]
    places = [point["rows_per_class"] for point in found["curve"]]
    for name, colour in zip(names, ("front", "point", "right"), strict=False):
        scores = [point[name] for point in found["curve"]]
        axes.plot(places, [100 * s[0] for s in scores], "o-", color=colours[colour], label=name)
        axes.fill_between(
            places, [100 * s[1] for s in scores], [100 * s[2] for s in scores],
            color=colours[colour], alpha=0.15,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xticks(places, [str(place) for place in places])
    axes.minorticks_off()
    axes.set(xlabel=rows, ylabel="accuracy on unseen rows, %")
    axes.legend(frameon=False, labelcolor=colours["text"], loc="lower right")


def collect_copies(bench: Bench) -> Found:
    """Compare cosines of the tuned model, of the base model and of TF-IDF on labelled pairs."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    from luthier.evaluation.preferences import area_under_curve
    from luthier.evaluation.significance import Statistic

    base, tuned = (rows_of(bench.folder / name) for name in ("base.jsonl", "answers.jsonl"))
    train = rows_of(bench.folder / "rows" / "train.jsonl")
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    words.fit([text for row in train for text in (row["query"], row["positive"])])
    sides = (words.transform([each[side] for each in base]) for side in ("query", "document"))
    one, other = sides
    score_of = {
        "all-minilm-l6-v2:copies": [each["score"] for each in tuned],
        "the base model": [each["score"] for each in base],
        "TF-IDF": np.asarray(one.multiply(other).sum(1)).ravel().tolist(),
    }
    same_N = np.array([each["expected"] > 0.5 for each in base])
    size = sum(
        each.stat().st_size
        for each in (bench.home / "models" / "base" / "all-minilm-l6-v2").glob("*.safetensors")
    )
    found = {}
    for name, scores in score_of.items():
        score_N = np.array(scores)
        found[name] = Statistic.of(
            lambda row_K, score_N=score_N: area_under_curve(score_N[row_K], same_N[row_K]),
            len(base),
        )
    contenders = [
        {
            "name": name, "technique": technique, "score": found[name].value,
            "interval": list(found[name].interval), "seconds": None, "model_bytes": bytes_,
        }
        for name, technique, bytes_ in zip(
            found, ("fine-tuning", "zero-shot", "simple baselines"), (size, size, 0), strict=True
        )
    ]  # fmt: skip
    contenders.sort(key=lambda each: -each["score"])
    own, rival = ends(contenders)
    own_N, rival_N = (np.array(score_of[each["name"]]) for each in (own, rival))
    gain = Statistic.of(
        lambda row_K: (
            area_under_curve(own_N[row_K], same_N[row_K])
            - area_under_curve(rival_N[row_K], same_N[row_K])
        ),
        len(base),
        is_share=False,
    )
    low, high = gain.interval
    worth_it = (gain.value > 0) if low > 0 or high < 0 else None
    similar = [each for each in tuned if each["similar"]]
    wrong = next(each for each in tuned if each["similar"] != (each["expected"] > 0.5))
    threshold = max(each["score"] for each in tuned if not each["similar"])
    pair = (bench.folder / "rows" / "test.jsonl").read_text().split("\n")[0]
    hits = sum(each["expected"] > 0.5 for each in similar)
    return {
        "rows": [*first_rows(bench, 1), pair],
        "wrong": f"{wrong['query']}\n{wrong['document']}\n"
        f"answer:   {'similar' if wrong['similar'] else 'not similar'} (cosine {wrong['score']:.3f})\n"
        f"expected: {'similar' if wrong['expected'] > 0.5 else 'not similar'}",
        "compared": {
            "contenders": contenders, "rows": len(base), "worth_it": worth_it,
            "verdict": f"The AUC of the tuned model minus the AUC of {rival['name']} is "
            f"{100 * gain.value:+.1f} points (95 % interval {100 * low:+.1f} to {100 * high:+.1f}), on "
            f"{len(base)} pairs by paired bootstrap.",
        },
        "facts": f"At the threshold that training chose, {hits} of {int(same_N.sum())} copies are "
        f"found, and {len(similar) - hits} of {int((~same_N).sum())} other pairs are false alarms.",
        "scores": {"same": same_N.tolist(), **score_of},
        "threshold": threshold,
    }  # fmt: skip


def paint_copies(axes: Any, colours: Colours, found: Found) -> None:
    """Draw the cosines of copies and of other pairs, with the chosen threshold."""
    same_N = np.array(found["scores"]["same"])
    score_N = np.array(found["scores"]["all-minilm-l6-v2:copies"])
    borders = np.linspace(min(score_N.min(), 0), 1, 31)
    for chosen_N, name, colour in ((same_N, "copies", "right"), (~same_N, "other pairs", "front")):
        axes.hist(score_N[chosen_N], borders, color=colours[colour], alpha=0.6, label=name)
    axes.axvline(found["threshold"], color=colours["text"], linestyle="--", label="threshold")
    axes.set(xlabel="cosine of the tuned model", ylabel="pairs")
    axes.legend(frameon=False, labelcolor=colours["text"], loc="upper left")


PER_CLASS = (5, 10, 20)
SHOWN = 4
"""Test pictures of each class in the figure."""


def collect_pictures(bench: Bench) -> Found:
    """Measure fewer pictures of each class, and select the first test pictures of each class."""
    (tune,) = (each for each in USES["pictures"].commands if " tune " in each)
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
        by_name = {each["name"]: each for each in compared["contenders"]}
        probe = by_name["logistic regression on the base model"]
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


def paint_pictures(axes: Any, colours: Colours, found: Found) -> None:
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


Words = list[tuple[str, str]]
"""Words of a line with the name of their colour."""
COLUMNS = 78
"""Characters of a line in a figure."""


def paint_words(axes: Any, colours: Colours, paragraphs: Sequence[Words]) -> None:
    """Write paragraphs of coloured words, wrapped to the width of the figure."""
    axes.set_axis_off()
    place, line = 0, 0
    lines = list[tuple[int, int, str, str]]()
    for paragraph in paragraphs:
        for word, colour in paragraph:
            if place and place + len(word) > COLUMNS:
                place, line = 0, line + 1
            lines.append((place, line, word, colour))
            place += len(word) + 1
        place, line = 0, line + 2
    # At least 16 lines, so that a short text is not stretched over the figure.
    axes.set(xlim=(0, COLUMNS), ylim=(max(line, 16), -1))
    for place, line, word, colour in lines:
        weight = "normal" if colour == "text" else "bold"
        axes.text(
            place, line, word.replace("$", r"\$"), family="monospace", fontsize=11.5,
            color=colours[colour], weight=weight, va="top",
        )  # fmt: skip


DAYS = "monday|tuesday|wednesday|thursday|friday|saturday|sunday|tomorrow|today"
NUMBERS = (
    "two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|fifteen|twenty|thirty|forty|fifty|"
    "sixty|ninety|hundred"
)
FACT = re.compile(rf"\d|\b({NUMBERS}|{DAYS})\b", re.I)


def invented(answer: Found) -> set[str]:
    """Return numbers and days of a reply that neither the prompt nor the expected reply has."""
    known = set(re.findall(r"\w+", f"{answer['prompt']} {answer['expected']}".lower()))
    words = answer["reply"].split()
    return {
        word for word in words
        if FACT.search(word) and not known & set(re.findall(r"\w+", word.lower()))
    }  # fmt: skip


def collect_chats(bench: Bench) -> Found:
    """Select a right reply, a reply with an invented fact and a wrong reply."""
    answers = rows_of(bench.folder / "answers.jsonl")
    right = [each for each in answers if each["scores"]["first_line"] == 1]
    wrong = next(each for each in answers if each["scores"]["first_line"] == 0)
    shown = [
        next(each for each in right if not invented(each)),
        next(each for each in [*right, *answers] if invented(each)),
    ]
    write_rows(
        [{"prompt": each["prompt"], "completion": each["expected"]} for each in shown],
        bench.folder / "few.jsonl",
    )
    bench.run(
        "luthier evaluate smollm2-135m-instruct few.jsonl --max-tokens 60 --output before.jsonl"
    )
    before = [each["reply"] for each in rows_of(bench.folder / "before.jsonl")]
    return {
        "rows": first_rows(bench),
        "wrong": f"{wrong['prompt']}\nanswer:   {wrong['reply'].strip()}\n"
        f"expected: {wrong['expected']}",
        "shown": [{**each, "before": text} for each, text in zip(shown, before, strict=True)],
        "facts": f"{sum(bool(invented(each)) for each in answers)} of {len(answers)} replies have a "
        "number or a day that neither the message nor the expected reply contains.",
    }


def paint_chats(axes: Any, colours: Colours, found: Found) -> None:
    """Write messages, replies of the base model and tuned replies, with invented facts in red."""
    paragraphs = list[Words]()
    for each in found["shown"]:
        before = " ".join(each["before"].split()[:24])
        red = invented(each)
        paragraphs += [
            [("customer", "point"), *((word, "text") for word in each["prompt"].split())],
            [("base model", "point"), *((word, "text") for word in [*before.split(), "…"])],
            [
                ("tuned", "right"),
                *((word, "front" if word in red else "text") for word in each["reply"].split()),
            ],
        ]
    paint_words(axes, colours, paragraphs)


ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
)
ONES += " sixteen seventeen eighteen nineteen"
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
VALUES = {word: value for value, word in enumerate(ONES.split())}
VALUES |= {word: 10 * value for value, word in enumerate(TENS.split(), 2)}
ROUGE = {"rouge_1": "ROUGE-1", "rouge_2": "ROUGE-2", "rouge_l": "ROUGE-L"}


def numbers(text: str) -> set[int]:
    """Return the numbers of a text, in digits or in English words below one hundred."""
    found, before = list[int](), 0
    for word in re.findall(r"\d+|[a-z]+", text.lower()):
        value = int(word) if word.isdigit() else VALUES.get(word, -1)
        if 0 < value < 10 and before in range(20, 100, 10) and not word.isdigit():
            value += found.pop()
        before = 0 if word.isdigit() else value
        if value >= 0:
            found.append(value)
    return {*found}


def rouge_sentence(compared: Found) -> str:
    """Return ROUGE-1, 2 and L of the tuned model and of the best rival."""
    values = [
        ", ".join(f"{100 * each['scores'][name]:.1f}" for name in ROUGE)
        for each in ends(compared["contenders"])
    ]
    return (
        f"{', '.join(ROUGE.values())}: {values[0]} % of the tuned model, {values[1]} % of the "
        "best rival."
    )


def collect_summaries(bench: Bench) -> Found:
    """Count dropped and invented numbers, and select a conversation with a dropped number."""
    answers = rows_of(bench.folder / "answers.jsonl")
    compared = comparison({"steps": bench.steps})
    for each in answers:
        note, reply = numbers(each["expected"]), numbers(each["reply"])
        each["dropped"] = sorted(note - reply)
        each["invented"] = sorted(reply - note - numbers(each["prompt"]))
    dropped = [each for each in answers if each["dropped"]]
    with_numbers = [each for each in answers if numbers(each["expected"])]
    made_up = [each for each in answers if each["invented"]]
    wrong = min(made_up or answers, key=lambda each: each["scores"]["rouge_l"])
    return {
        "rows": first_rows(bench),
        "wrong": f"{wrong['prompt']}\nanswer:   {wrong['reply'].strip()}\n"
        f"expected: {wrong['expected']}",
        "shown": min(dropped, key=lambda each: len(each["prompt"])),
        "facts": f"{rouge_sentence(compared)} {len(dropped)} of {len(with_numbers)} "
        f"notes with numbers lose a number in the reply, and {len(made_up)} of {len(answers)} replies "
        "have a number that neither the conversation nor the note contains.",
    }


def paint_summaries(axes: Any, colours: Colours, found: Found) -> None:
    """Write a conversation, its note with the dropped numbers in red, and the reply."""
    shown = found["shown"]

    def words(name: str, colour: str, text: str, marked: Sequence[int]) -> Words:
        found = [(name, colour)]
        for word in text.split():
            found.append((word, "front" if numbers(word) & {*marked} else "text"))
        return found

    paint_words(axes, colours, [
        words("conversation", "point", shown["prompt"], ()),
        words("note", "right", shown["expected"], shown["dropped"]),
        words("tuned", "right", shown["reply"], shown["invented"]),
    ])  # fmt: skip


def spans(tags: Sequence[str]) -> set[tuple[int, int]]:
    """Return first and last word of each entity of BIO tags."""
    found, begin = set[tuple[int, int]](), None
    for place, tag in enumerate([*tags, "O"]):
        if begin is not None and not tag.startswith("I-"):
            found.add((begin, place - 1))
            begin = None
        if tag != "O" and begin is None:
            begin = place
    return found


def collect_entities(bench: Bench) -> Found:
    """Select the sentence with right, missed and invented entities, and a wrong sentence."""
    rows = rows_of(bench.folder / "rows" / "test.jsonl")
    answers = rows_of(bench.folder / "answers.jsonl")
    marked = list[tuple[Found, set[Any], set[Any]]]()
    for row, answer in zip(rows, answers, strict=True):
        marked.append((row, spans(row["tags"]), spans(answer["tags"])))
    kinds = [
        (bool(true & given) + bool(true - given) + bool(given - true), -len(row["tokens"]), place)
        for place, (row, true, given) in enumerate(marked)
    ]
    row, true, given = marked[max(kinds)[2]]
    names = lambda chosen, row: [" ".join(row["tokens"][a : b + 1]) for a, b in sorted(chosen)]  # noqa: E731
    wrong, expected, found = next(each for each in marked if each[1] and not each[1] & each[2])
    return {
        "rows": first_rows(bench),
        "wrong": f"{' '.join(wrong['tokens'])}\nanswer:   {names(found, wrong)}\n"
        f"expected: {names(expected, wrong)}",
        "sentence": {
            "tokens": row["tokens"], "right": sorted(true & given),
            "missed": sorted(true - given), "invented": sorted(given - true),
        },
    }  # fmt: skip


ENTITY_COLOURS = {"right": "right", "missed": "point", "invented": "front"}


def paint_entities(axes: Any, colours: Colours, found: Found) -> None:
    """Write a sentence with right, missed and invented entities in colour."""
    marked = found["sentence"]
    words = [(word, "text") for word in marked["tokens"]]
    for kind, colour in ENTITY_COLOURS.items():
        for first, last in marked[kind]:
            for place in range(first, last + 1):
                words[place] = (words[place][0], colour)
    paint_words(axes, colours, [words, [*ENTITY_COLOURS.items()]])


WITHOUT, WITH = "task alone", "text first"
"""Configurations of the preset `domain`."""


def collect_domain(bench: Bench) -> Found:
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


def paint_domain(axes: Any, colours: Colours, found: Found) -> None:
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


SPAM = "spam"


def collect_mail(bench: Bench) -> Found:
    """Measure precision and recall of spam at each threshold, and of TF-IDF."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import precision_recall_curve
    from sklearn.pipeline import make_pipeline

    bench.run("luthier convert rows/test test.jsonl")
    train, test = (rows_of(bench.folder / f"{split}.jsonl") for split in ("train", "test"))
    answers = rows_of(bench.folder / "answers.jsonl")
    words = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=10)
    )
    words.fit([row["text"] for row in train], [row["label"] for row in train])
    place = [*words.classes_].index(SPAM)
    is_spam = [row["label"] == SPAM for row in test]
    curves = {}
    for name, scores in (
        ("tuned", [each["scores"][SPAM] for each in answers]),
        ("TF-IDF", words.predict_proba([row["text"] for row in test])[:, place]),
    ):
        precision, recall, _ = precision_recall_curve(is_spam, scores)
        curves[name] = [recall[:-1].tolist(), precision[:-1].tolist()]
    points = {}
    for name, given in (
        ("stored", [each["label"] == SPAM for each in answers]),
        ("likeliest", [max(each["scores"], key=each["scores"].get) == SPAM for each in answers]),
    ):
        hits = sum(one and other for one, other in zip(given, is_spam, strict=True))
        points[name] = [hits, sum(given), sum(is_spam)]
    hits, called, spam = points["stored"]
    hits_before, called_before, _ = points["likeliest"]
    shown = [next(row for row in train if row["label"] == label) for label in ("invoice", SPAM)]
    return {
        "rows": [json.dumps(row, ensure_ascii=False) for row in shown],
        "wrong": wrong_label(bench),
        "curves": curves,
        "points": points,
        "facts": f"With the stored threshold, {hits} of {called} unseen mails called spam are spam, "
        f"and {hits} of {spam} spam mails are found. The likeliest label alone calls "
        f"{called_before} mails spam, {called_before - hits_before} of them by mistake.",
    }


def paint_mail(axes: Any, colours: Colours, found: Found) -> None:
    """Draw precision against recall of spam, with the stored threshold."""
    for (name, (recall, precision)), colour in zip(
        found["curves"].items(), ("front", "point"), strict=True
    ):
        axes.step(
            [100 * each for each in recall], [100 * each for each in precision],
            color=colours[colour], label=name, where="post",
        )  # fmt: skip
    hits, called, spam = found["points"]["stored"]
    axes.plot(
        100 * hits / spam, 100 * hits / max(called, 1), "o", markersize=11, color=colours["right"],
        label="stored threshold",
    )  # fmt: skip
    axes.axhline(98, color=colours["grid"], linestyle="--")
    axes.set(
        xlabel="spam mails found, %", ylabel="precision of spam on unseen mail, %", ylim=(-4, 104)
    )
    axes.legend(frameon=False, labelcolor=colours["text"], loc="upper right")


def collect_sounds(bench: Bench) -> Found:
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


def paint_sounds(axes: Any, colours: Colours, found: Found) -> None:
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


SENSORS = {"small-sensor-vae:pump": "network", "z-score:pump": "z-score"}
"""Models of the page, by name in the figure."""


def collect_sensors(bench: Bench) -> Found:
    """Collect values, faults and alarms of the test week, and the events of each model."""
    with (bench.folder / "rows" / "test.csv").open() as file:
        rows = list(csv.DictReader(file))
    files = dict(zip(SENSORS, ("answers.jsonl", "answers-z.jsonl"), strict=True))
    answers = {model: rows_of(bench.folder / name) for model, name in files.items()}
    alarms = {
        model: [place for place, each in enumerate(found) if each["anomalous"]]
        for model, found in answers.items()
    }
    labels = [row["label"] for row in rows]
    network = alarms["small-sensor-vae:pump"]
    false = next(place for place in network if labels[place] == "normal")
    contenders = comparison({"steps": bench.steps})["contenders"]
    scores = [each["scores"] for each in ends(contenders)]
    events = sum(
        a != b and b != "normal" for a, b in zip(["normal", *labels], labels, strict=False)
    )
    found = [
        f"{name} finds {round(events * each['events_found'])} of {events} events, and "
        f"{percent(each['precision'])} of the alarms are right"
        for each, name in zip(scores, SENSORS.values(), strict=True)
    ]
    score = answers["small-sensor-vae:pump"][false]["score"]
    return {
        "rows": [json.dumps(rows[place]) for place in (0, labels.index("leak"))],
        "wrong": f"{json.dumps(rows[false])}\nanswer:   anomalous (score {score:.1f})\n"
        "expected: normal",
        "facts": f"The {found[0]}; the {found[1]}.",
        "labels": labels,
        "values": {
            name: [float(row[name]) for row in rows]
            for name in rows[0]
            if name not in ("time", "label")
        },
        "alarms": alarms,
    }


def paint_sensors(axes: Any, colours: Colours, found: Found) -> None:
    """Draw the columns above each other with shaded faults, and a line of alarms per model."""
    places = np.arange(len(found["labels"])) / 144
    faulty = np.array([label != "normal" for label in found["labels"]])
    axes.fill_between(places, -2.6, 5.2, where=faulty, color=colours["point"], alpha=0.3, lw=0)
    names = []
    for height, (name, values) in enumerate(found["values"].items()):
        value_N = np.array(values)
        low, high = np.quantile(value_N, [0.001, 0.999])
        axes.plot(
            places, height + 0.9 * (value_N - low) / (high - low), color=colours["text"],
            linewidth=0.8,
        )  # fmt: skip
        names.append((height + 0.45, name))
    for line, (model, name), colour in zip(
        (-0.6, -1.8), SENSORS.items(), ("front", "right"), strict=True
    ):
        alarms = places[found["alarms"][model]]
        axes.vlines(alarms, line - 0.45, line + 0.45, color=colours[colour], linewidth=1.5)
        names.append((line, f"alarms of\n{name}"))
    axes.set_yticks([height for height, _ in names], [name for _, name in names])
    axes.set(xlabel="days of the test week; shaded: faults", ylim=(-2.6, 5.2), xlim=(0, 7))


def collect_purchases(bench: Bench) -> Found:
    """Find a customer whose next purchase is not among the first ten items of item counts."""
    from luthier.data.rows import load_rows
    from luthier.data.shapes.texts import History

    wrong = list[str]()
    for row in load_rows(str(bench.folder / "rows" / "test.jsonl")):
        assert isinstance(row, History)
        command = f"luthier nearest item-counts:counts rows/catalogue.txt {shlex.quote(row.text)}"
        bench.run(f"{command} --top 20 --json > nearest.json")
        found = json.loads((bench.folder / "nearest.json").read_text())
        texts = [str(each["name"]) for each in found["neighbours"]]
        new = [text for text in texts if text not in row.items][:10]
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


def paint_contenders(axes: Any, colours: Colours, found: Found) -> None:
    """Draw the score of each contender with its interval."""
    bars = [
        (each["name"], each["score"], tuple(each["interval"]), "fine-tuning" in each["technique"])
        for each in comparison(found)["contenders"]
    ]
    paint_bars(axes, colours, USES[found["name"]].measure, bars)


FORMS = ("bf16", "q8_0", "q4_k_m", "q4_0")
"""Types of GGUF weights."""
BOT = "smollm2-135m-instruct:bot"
FEW_BITS = "q4_k_m"


def collect_device(bench: Bench) -> Found:
    """Measure score, speed and memory of each form under one thread."""
    side = Path(__file__).with_name("device_side.py")

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
    """Return size, score, speed and memory of each form."""
    lines = [
        [
            each["name"], f"{each['bytes'] / 1e6:,.0f}", percent(each["score"]),
            f"{100 * each['interval'][0]:.1f} to {100 * each['interval'][1]:.1f}",
            f"{each['tokens_per_second']:,.0f}", f"{each['memory_bytes'] / 1e6:,.0f}",
        ]
        for each in found["forms"]
    ]  # fmt: skip
    heads = ["weights", "MB", "right labels", "95 % interval", "tokens a second", "memory, MB"]
    return table(heads, lines)


def paint_device(axes: Any, colours: Colours, found: Found) -> None:
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


ROWS = ("train.jsonl", "test.jsonl", "NOTICE.md")
PACKED = ("train.jsonl.xz", "test.jsonl.xz", "NOTICE.md")
MAILBOXES = ("invoice", "meeting", "spam", "support")

USES = {
    use.name: use
    for use in (
        Use(
            "route-messages",
            "Route messages by intent",
            "messages",
            "accuracy",
            "Rows: Banking77 (Casanueva et al. 2020, arXiv:2003.04807), CC BY 4.0; a cut of 20 of 77 "
            "intents.",
            tuple(f"examples/route-messages/{name}" for name in ROWS),
            "Accuracy against training rows per intent, for three methods",
            paint_curve,
            collect_routes,
        ),
        Use(
            "support-chatbot",
            "Support chatbot in house style",
            "messages",
            "right labels",
            "Rows: Fernspoke Cycles, written for luthier, Apache-2.0. The company is invented.",
            (
                *(f"demo/{name}" for name in ("validation.jsonl", "README.md", *ROWS[:2])),
                "examples/support-chatbot/instructions.txt",
            ),
            "Two messages with the replies of the base model and of the tuned model",
            paint_chats,
            collect_chats,
        ),
        Use(
            "copied-questions",
            "Copied questions and passages",
            "pairs",
            "AUC",
            "Rows: COVID-QA question pairs (Möller et al. 2020), Apache-2.0; a cut.",
            tuple(f"examples/copied-questions/{name}" for name in ROWS),
            "Histograms of the scores of copies and of other pairs, with the threshold",
            paint_copies,
            collect_copies,
        ),
        Use(
            "pictures",
            "Pictures from few examples",
            "cells",
            "accuracy",
            "Rows: BCCD Dataset (Shenggan; images from cosmicad and akshaylamba), MIT; a cut.",
            tuple(f"examples/pictures/{name}" for name in ("train.zip", "test.zip", "NOTICE.md")),
            "Twelve blood cells with answers, and accuracy against training pictures per class",
            paint_pictures,
            collect_pictures,
        ),
        Use(
            "diseases",
            "Diseases in medical records",
            "sentences",
            "entity F1",
            "Rows: NCBI disease corpus (Doğan et al. 2014; Crichton et al. 2017), CC BY 4.0; a cut.",
            tuple(f"examples/diseases/{name}" for name in PACKED),
            "A sentence with right, missed and invented names of diseases",
            paint_entities,
            collect_entities,
        ),
        Use(
            "summaries",
            "Summaries of conversations",
            "conversations",
            "ROUGE-L",
            "Rows: MTS-Dialog (Ben Abacha et al. 2023), CC BY 4.0; a cut.",
            tuple(f"examples/summaries/{name}" for name in ROWS),
            "A conversation with its note, a dropped number in red, and the reply of the tuned model",
            paint_summaries,
            collect_summaries,
        ),
        Use(
            "domain-text",
            "Text of the domain, then the task",
            "sentences",
            "entity F1",
            "Rows: SOFC-Exp corpus (Friedrich et al. 2020), CC BY 4.0; a cut. Papers: CC BY, their "
            "authors are listed in NOTICE.md.",
            tuple(f"examples/domain-text/{name}" for name in (*ROWS, "papers.jsonl.gz")),
            "Entity F1 with and without the text stage, with intervals and seeds",
            paint_domain,
            collect_domain,
        ),
        Use(
            "mail",
            "Sort an organisation's e-mail",
            "mails of unknown senders",
            "accuracy",
            "Mail: Fernspoke Cycles, written for luthier, Apache-2.0. People and companies are "
            "invented.",
            (
                *(f"examples/mail/{s}/{box}.mbox" for s in ("train", "test") for box in MAILBOXES),
                "examples/mail/NOTICE.md",
            ),
            "Precision against recall of spam, with the stored threshold",
            paint_mail,
            collect_mail,
        ),
        Use(
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
            paint_sounds,
            collect_sounds,
        ),
        Use(
            "sensors",
            "Faults of a machine from its sensors",
            "lines of a week with ten faults",
            "F1",
            "Values: a simulated pump, written for luthier (benchmarks/sensor_rows.py), Apache-2.0.",
            tuple(f"examples/sensors/{name}" for name in ("train.csv", "test.csv", "NOTICE.md")),
            "Five sensors over a week, shaded faults, and the alarms of a network and of z-scores",
            paint_sensors,
            collect_sensors,
        ),
        Use(
            "device",
            "A small model for a device",
            "messages",
            "right labels",
            "Rows: Fernspoke Cycles, written for luthier, Apache-2.0. The company is invented.",
            tuple(f"demo/{name}" for name in ("validation.jsonl", "README.md", *ROWS[:2])),
            "Right labels of a chat model against the size of its file, from 16 to 4 bits",
            paint_device,
            collect_device,
        ),
        Use(
            "recommendation",
            "Recommend the next purchase",
            "customers",
            "recall at 10",
            "Purchases: Fernspoke Cycles, drawn for luthier (benchmarks/purchase_rows.py), Apache-2.0.",
            tuple(f"examples/recommendation/{name}" for name in (*PACKED, "catalogue.txt")),
            "Recall at 10 of item counts, a tuned encoder and simple baselines",
            paint_contenders,
            collect_purchases,
        ),
    )
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("name", choices=[*USES])
    parser.add_argument("--tuned", type=Path, help="model of an earlier run of the same command")
    parser.add_argument("--write", action="store_true", help="write from the stored results")
    options = parser.parse_args()
    use = USES[options.name]
    stored = PAGES / f"{use.name}.json"
    if not options.write:
        write_index()  # `luthier examples` needs the name
        found = run(use, options.tuned)
        stored.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    write(use, json.loads(stored.read_text()))
    write_index()


if __name__ == "__main__":
    main()
