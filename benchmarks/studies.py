"""Claims of textbooks, tested with the presets of ``luthier study`` on public rows.

    python benchmarks/studies.py DATA PRESET SET [--seeds 2] [--write]

``DATA`` has the folders of public sets. The rows of SET are written to a temporary folder, the
preset runs on them, and ``docs/claims.json`` keeps the table with paired differences from the
preset's reference configuration. ``--write`` alone writes tables and figure of ``docs/claims.md``.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

import luthier
from children import table
from defaults import DECODER, ENCODER, Rows, rows_of, write_rows
from luthier.engine.metrics import SCORES, Reporter
from luthier.evaluation.significance import CHANCE
from luthier.workflows.figures import draw
from luthier.workflows.study.presets import PRESETS
from luthier.workflows.study.results import Study, StudyRow

ROOT = Path(__file__).parent.parent
PAGE, STORED, FIGURE = (ROOT / "docs" / f"claims.{end}" for end in ("md", "json", "svg"))
WRITTEN = "written by benchmarks/studies.py"
TEXTS, SENTENCES, PHOTOGRAPHS, INTENTS = 300, 200, 50, 6
REFERENCES = {
    "methods": "full", "layers": "all layers", "rate": "1", "rows": "1.0", "domain": "task alone",
    "replay": "no replay", "student": "student, rows alone", "augmentation": "none",
    "prompts": "tuned", "bits": "16 bits",
}  # fmt: skip
"""Configuration by preset that the other configurations are compared with."""
FIGURES = {
    "processor_seconds": ("CPU s", 1.0, ",.0f"),
    "peak_memory_bytes": ("GB", 1e9, ".2f"),
    "trained_weights": ("trained", 1.0, ",.0f"),
    "saved_bytes": ("MB", 1e6, ",.1f"),
    "milliseconds": ("ms", 1.0, ",.1f"),
    "prompt_tokens": ("tokens", 1.0, ",.0f"),
}
"""Heading, unit and form of the figures."""
Found = dict[str, Any]


@dataclass(frozen=True)
class Rowset:
    """Rows of a public set: files of the task, of an earlier task, and of text without labels."""

    title: str
    prepare: Callable[[Path, Path], Mapping[str, Path]]
    """Writes ``train``, ``validation``, ``earlier``, ``replay`` and ``text`` to a folder."""
    base: str = ENCODER
    steps: int = 24
    settings: Mapping[str, Any] = field(default_factory=dict)


def prepare_text(data: Path, folder: Path) -> Mapping[str, Path]:
    def labelled(name: str, first: int, last: int) -> Rows:
        rows = rows_of(data / "sentiment_sentences" / f"{name}.jsonl")[first:last]
        return [{"text": row["text"], "label": row["label"]} for row in rows]

    topics = data / "sib200_en"
    rest = [{"text": row["text"]} for row in labelled("train", TEXTS, 2377)]
    return {
        "train": write_rows(labelled("train", 0, TEXTS), folder / "train.jsonl"),
        "validation": write_rows(labelled("test", 0, TEXTS), folder / "test.jsonl"),
        "earlier": topics / "test.jsonl",
        "replay": write_rows(rows_of(topics / "train.jsonl")[:TEXTS], folder / "replay.jsonl"),
        "text": write_rows(rest, folder / "text.jsonl"),
    }


def prepare_entities(data: Path, folder: Path) -> Mapping[str, Path]:
    rows = rows_of(data / "ncbi_disease" / "train.jsonl")
    held = rows_of(data / "ncbi_disease" / "test.jsonl")[:SENTENCES]
    social = data / "wnut17"
    text = [{"text": " ".join(row["tokens"])} for row in rows[SENTENCES : 5 * SENTENCES]]
    return {
        "train": write_rows(rows[:SENTENCES], folder / "train.jsonl"),
        "validation": write_rows(held, folder / "test.jsonl"),
        "earlier": write_rows(rows_of(social / "test.jsonl")[:SENTENCES], folder / "earlier.jsonl"),
        "replay": write_rows(rows_of(social / "train.jsonl")[:SENTENCES], folder / "replay.jsonl"),
        "text": write_rows(text, folder / "text.jsonl"),
    }


def prepare_images(data: Path, folder: Path) -> Mapping[str, Path]:
    cells, signs = data / "bccd_cells", data / "sign_digits"
    whole = np.load(cells / "train.npz")
    first = np.concatenate([np.flatnonzero(whole["labels"] == k)[:PHOTOGRAPHS] for k in range(3)])
    np.savez(folder / "train.npz", images=whole["images"][first], labels=whole["labels"][first])
    return {
        "train": folder / "train.npz",
        "validation": cells / "test.npz",
        "earlier": signs / "test.npz",
        "replay": signs / "train.npz",
    }


def prepare_replies(data: Path, folder: Path) -> Mapping[str, Path]:
    def pairs(name: str, most: int) -> Rows:
        rows = rows_of(data / "banking77" / f"{name}.jsonl")
        chosen = sorted({row["label"] for row in rows})[:INTENTS]
        by_label = [[row for row in rows if row["label"] == label][:most] for label in chosen]
        return [
            {"prompt": row["text"], "completion": row["label"].replace("_", " ")}
            for each in zip(*by_label, strict=True)
            for row in each
        ]

    rows = pairs("train", 20)
    names = ", ".join(sorted({row["completion"] for row in rows}))
    brief = folder / "brief.txt"
    brief.write_text(f"Name the intent of the bank customer's question. The intents are: {names}.")
    return {
        "train": write_rows(rows, folder / "train.jsonl"),
        "validation": write_rows(pairs("test", 6), folder / "test.jsonl"),
        "prompts": brief,
    }


SETS = {
    "text": Rowset("sentiment_sentences, 300 rows", prepare_text),
    "entities": Rowset("ncbi_disease, 200 sentences", prepare_entities),
    "images": Rowset(
        "bccd_cells, 150 images", prepare_images, "efficientnet-lite0",
        settings={"data.image_size": 64},
    ),
    "replies": Rowset("banking77, six intents as replies", prepare_replies, DECODER, steps=24),
}  # fmt: skip
FILES = {"replay": "replay", "domain": "text", "prompts": "prompts"}
"""File of a preset."""
FORGETTING = ("methods", "rate", "replay")
"""Presets with a claim about forgetting."""


def measure(data: Path, preset: str, name: str, seeds: int) -> Found:
    """Run a preset on a set, and return the table."""
    chosen = SETS[name]
    # The same folder each time, so that a repeated study reuses measurements.
    folder = Path(tempfile.gettempdir()) / "luthier-studies" / name
    folder.mkdir(parents=True, exist_ok=True)
    files = chosen.prepare(data, folder)
    given = f"{preset}={files[FILES[preset]]}" if preset in FILES else preset
    fields = {
        "base": chosen.base, "validation": str(files["validation"]),
        "training.max_steps": chosen.steps, "training.evaluate_every": chosen.steps // 3,
        "training.threads": 1, **chosen.settings,
    }  # fmt: skip
    earlier = files.get("earlier") if preset in FORGETTING else None
    words = ["luthier", "study", files["train"], "--preset", given, "--seeds", seeds]
    words += ["--earlier", earlier] if earlier else []
    for key, value in fields.items():
        words += ["--set", f"{key}={value}"] if "." in key else [f"--{key}", value]
    command = shlex.join(map(str, words)).replace(f"{folder}/", "").replace(str(data), "DATA")
    print("$", command, flush=True)
    found = luthier.study(
        str(files["train"]), preset=given, seeds=seeds, earlier=earlier,
        reporter=Lines(), **{key.replace(".", "__"): value for key, value in fields.items()},
    )  # fmt: skip
    print(found.verdict(), flush=True)
    return {
        "command": command,
        "luthier": version("luthier"),
        "held_out": found.held_out,
        "seeds": seeds,
        "verdict": found.verdict(),
        "rows": [plain_row(found, preset, row) for row in found.rows],
    }


class Lines(Reporter):
    """Prints stages and notes."""

    def stage(self, text: str) -> None:
        print(text, flush=True)

    note = stage


def short(row: StudyRow) -> str:
    """Return the name of a configuration without the key of a number."""
    return row.name.rpartition("learning_rate_multiplier ")[2].rpartition("train_share ")[2]


def plain_row(found: Study, preset: str, row: StudyRow) -> Found:
    """Return score, difference from the reference, and costs of a configuration."""
    name = short(row)
    if not row.is_measured:
        return {"name": name, "reason": row.reason}
    plain: Found = {
        "name": name, "measure": row.measure, "value": row.value, "error": row.error,
        "is_share": row.is_share, "gain": row.gain, "kept": found.kept(row),
        **{key: row.figure(key) for key in FIGURES},
    }  # fmt: skip
    reference = next((r for r in found.measured if short(r) == REFERENCES[preset]), row)
    if row is not reference:
        plain["difference"], plain["difference_error"], _ = found.difference(row, reference)
    for key in ("forgotten", "earlier"):
        if (value := row.figure(key)) is not None:
            plain |= {key: value, f"{key}_error": row.error_of(key)}
    return plain


def text_of(value: float, error: float, is_share: bool, sign: str = "") -> str:
    scale, form = (100, f"{sign}.1f") if is_share else (1, f"{sign}.3f")
    text = f"{scale * value:{form}} ± {scale * error:{form.removeprefix('+')}}"
    return f"**{text}**" if sign and abs(value) > CHANCE * error else text


def difference_of(row: Found, key: str, is_share: bool) -> str:
    """Return a difference with its error; empty if not measured."""
    return text_of(row[key], row[f"{key}_error"], is_share, "+") if key in row else ""


def preset_table(preset: str, found: Mapping[str, Found]) -> str:
    """Return the table of a preset over its sets."""
    columns: list[list[str]] = []
    for name, result in found.items():
        for row in result["rows"]:
            if "reason" in row:
                columns.append([name, row["name"], row["reason"].splitlines()[0]])
                continue
            share = row["is_share"]
            cells = [name, row["name"], text_of(row["value"], row["error"], share)]
            cells.append(difference_of(row, "difference", share))
            cells.append(difference_of(row, "earlier", True))
            for key, (_, unit, form) in FIGURES.items():
                value = row.get(key)
                cells.append("" if value is None else f"{value / unit:{form}}")
            columns.append(cells)
    heads = ["rows", "configuration", "score", f"vs. {REFERENCES[preset]}", "earlier task"]
    heads += [heading for heading, _, _ in FIGURES.values()]
    columns = [row + [""] * (len(heads) - len(row)) for row in columns]
    shown = [n for n in range(len(heads)) if any(row[n] for row in columns)]
    return table([heads[n] for n in shown], [[row[n] for n in shown] for row in columns])


def section(preset: str, found: Mapping[str, Found]) -> str:
    """Return tables and commands of a preset."""
    commands = "\n".join(each["command"] for each in found.values())
    facts = "; ".join(
        f"{name}: {SETS[name].title}, {each['held_out']} held-out rows, "
        f"{SCORES.get(measure_of(each), measure_of(each))}, seeds: {each['seeds']}"
        for name, each in found.items()
    )
    return f"{preset_table(preset, found)}\n\n{facts}\n\n```text\n{commands}\n```"


def measure_of(found: Found) -> str:
    return next((row["measure"] for row in found["rows"] if "measure" in row), "")


def differences(stored: Mapping[str, Found]) -> list[tuple[str, float, float]]:
    """Return name, difference and error of the configurations with a score in percent.

    Prompts are left out, because replies of an untuned base are 100 points worse.
    """
    return [
        (f"{preset}, {name}: {row['name']}", 100 * row["difference"], 100 * row["difference_error"])
        for preset, sets in stored.items()
        for name, each in sets.items()
        for row in each["rows"]
        if row.get("is_share") and "difference" in row and preset != "prompts"
    ]


def paint(
    axes: Any, colours: Mapping[str, str], points: Sequence[tuple[str, float, float]]
) -> None:
    """Draw each difference with its 95 % interval, coloured if beyond chance."""
    axes.figure.set_size_inches(8, 0.2 * len(points) + 1)
    for place, (_, value, error) in enumerate(reversed(points)):
        colour = colours["front" if abs(value) > CHANCE * error else "point"]
        axes.errorbar(value, place, xerr=CHANCE * error, fmt="o", markersize=4, color=colour)
    axes.axvline(0, color=colours["grid"], linewidth=1)
    names = [name for name, _, _ in reversed(points)]
    axes.set_yticks(range(len(points)), names, fontsize=8)
    axes.set(xlabel="points of score more than the reference", ylim=(-1, len(points)))


def write_page() -> None:
    """Write the tables of the page and the figure."""
    stored = json.loads(STORED.read_text())
    text = PAGE.read_text()
    for preset, found in stored.items():
        claim = f"> {PRESETS[preset].claim}"
        body = f"<!-- {preset}: {WRITTEN} -->\n{claim}\n\n{section(preset, found)}\n<!-- end -->"
        mark = re.compile(rf"<!-- {preset}: .*?<!-- end -->", re.S)
        text = mark.sub(lambda _, body=body: body, text)  # type: ignore[misc]
    PAGE.write_text(text)
    draw(FIGURE, lambda axes, colours: paint(axes, colours, differences(stored)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", nargs="?", type=Path)
    parser.add_argument("preset", nargs="?", choices=PRESETS)
    parser.add_argument("set", nargs="?", choices=SETS)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    if not given.set and not given.write:
        parser.error("name DATA, PRESET and SET, or --write")
    if given.set:
        found = measure(given.data, given.preset, given.set, given.seeds)
        stored = json.loads(STORED.read_text()) if STORED.is_file() else {}
        stored.setdefault(given.preset, {})[given.set] = found
        ordered = {preset: stored[preset] for preset in PRESETS if preset in stored}
        STORED.write_text(json.dumps(ordered, indent=1, ensure_ascii=False) + "\n")
    if given.write:
        write_page()


if __name__ == "__main__":
    main()
