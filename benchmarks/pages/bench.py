"""Runs of use-case pages: commands, stored results, figures and tables."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from children import table
from defaults import new_home, rows_of
from luthier.evaluation.significance import Difference
from luthier.workflows.figures import draw

ROOT = Path(__file__).parents[2]
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
    table: Callable[[Found], str] | None = None
    """The table of the page, if not scores, processor seconds and sizes of the contenders."""
    result: Callable[[Found], str] | None = None
    """The result in a few words, if not the scores of the tuned model and of its best rival."""

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


@contextmanager
def new_bench() -> Iterator[Bench]:
    """Yield an empty folder and a new LUTHIER_HOME."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder, "work"), new_home(Path(folder)), [])
        bench.folder.mkdir()
        yield bench


def run(use: Use) -> Found:
    """Run the commands of the page, and return what they measured."""
    with new_bench() as bench:
        for command in use.commands:
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


def scores_with(use: Use, seed: int) -> dict[str, float]:
    """Return the score of each contender if the page's trainings use another seed."""
    with new_bench() as bench:
        for command in use.commands:
            bench.run(command.replace("luthier tune", f"luthier tune --seed {seed}"))
        found: Found = {"steps": [*bench.steps]}
        if not any("compare" in step["command"] for step in bench.steps):
            found |= use.collect(bench)
    return {each["name"]: each["score"] for each in comparison(found)["contenders"]}


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


def scores_of_seeds(found: Found) -> list[float]:
    """Return the scores of the tuned model, a seed each; one score if no other seed ran."""
    tuned, _ = ends(comparison(found)["contenders"])
    return [
        tuned["score"],
        *(each[tuned["name"]] for each in found.get("other_seeds", {}).values()),
    ]


def sentence(use: Use, found: Found) -> str:
    """Return the result in one sentence: the loser first if the tuned model does not win."""
    if "headline" in found:
        return str(found["headline"])
    compared = comparison(found)
    tuned, rival = ends(compared["contenders"])
    own = f"{use.measure} {percent(tuned['score'])} of the tuned model"
    other = f"{percent(rival['score'])} of the best rival, {rival['name']}"
    where = f"on {compared['rows']:,} unseen {use.unit}"
    return f"{opening(compared['worth_it'])}: {own} against {other}, {where}."


def opening(worth_it: bool | None) -> str:
    """Return the first words about a comparison; ``None`` is a difference within chance."""
    if worth_it is None:
        return "**A cheap rival may be as good**"
    return "Tuning is worth it" if worth_it else "**Do not tune for this**"


def worth(gain: Difference) -> bool | None:
    """Return whether a gain over the rival is positive; ``None`` within chance."""
    return gain.value > 0 if gain.significant else None


def contender_table(found: Found) -> str:
    """Return the table of the contenders, with processor seconds and size of the tuned model."""
    tuning = [step for step in found["steps"] if " tune " in step["command"]]
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
    return table(heads, lines)


def result_table(use: Use, found: Found) -> str:
    """Return the table of the page, with the versions and the processor seconds of all commands."""
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    total = sum(step["processor_seconds"] for step in found["steps"])
    shown = use.table(found) if use.table else contender_table(found)
    scores, seeds = scores_of_seeds(found), ""
    if len(scores) > 1 and not use.table:
        seeds = f"Tuned with {len(scores)} seeds: {', '.join(map(percent, scores))}. "
    return (
        f"{shown}\n\n{seeds}All commands: {total:,.0f} processor seconds on "
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
        "table": result_table(use, found),
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


ROWS = ("train.jsonl", "test.jsonl", "NOTICE.md")
PACKED = ("train.jsonl.xz", "test.jsonl.xz", "NOTICE.md")
