"""Runs of each shell block of the guide (slow), page by page in one folder.

Blocks after ``<!-- not run: reason -->`` and lines that install extras are skipped. The files of a
page are short samples, and trainings end after two steps, so that most lines take seconds.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import wave
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from luthier.files import luthier_home

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "src" / "luthier" / "demo"
PAGES = sorted(
    page for part in ("guide", "use-cases") for page in (ROOT / "docs" / part).glob("*.md")
)
BLOCK = re.compile(r"(<!-- not run: [^\n]+ -->\n)?^```(sh|python)\n(.*?)^```", re.M | re.S)
FEW_STEPS = "--set training.max_steps=2"
FEW_ROWS = (
    "find rows -name '*.jsonl' -exec sed -i 61q {} ';' -name test.jsonl -exec sed -i 12q {} ';'\n"
    "for each in $(find rows -name '*.gz'); do zcat $each | head -2 | gzip > few; mv few $each; done"
)
HOME = luthier_home()


def runnable(page: Path) -> list[tuple[str, str]]:
    """Return language and text of each runnable block; none for pages about the service."""
    found = []
    for skipped, language, body in BLOCK.findall(page.read_text()):
        body = re.sub(r"^luthier examples .*", rf"\g<0>\n{FEW_ROWS}", body, flags=re.M)
        body = re.sub(
            r"\bluthier (tune|pretrain|distil|search|study) ", rf"\g<0>{FEW_STEPS} ", body
        )
        lines = [line for line in body.splitlines() if not line.startswith("pip install")]
        if not skipped and any(lines) and not (language == "python" and "client" in body):
            found.append((language, "\n".join(lines)))
    return found


def sample(name: str, rows: int) -> list[dict[str, Any]]:
    lines = (DEMO / name).read_text().splitlines()
    return [json.loads(line) for line in lines[:: len(lines) // rows][:rows]]


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_files(folder: Path) -> None:
    """Create the reader's own data files of the pages."""
    (folder / "handbook").mkdir()
    (folder / "handbook" / "leave.md").write_text(
        "# Leave\n\nEverybody has thirty days of leave each year."
    )
    write(
        folder / "my.jsonl", sample("train.jsonl", 60)
    )  # of fewer `inspect` warns, and ends with 1
    write(folder / "held-out.jsonl", sample("validation.jsonl", 10))
    write(folder / "old.jsonl", sample("test.jsonl", 20))
    write(folder / "more.jsonl", sample("test.jsonl", 30))
    write(folder / "pairs.jsonl", sample("preferences.jsonl", 32))
    write(folder / "held-out-pairs.jsonl", sample("preferences.jsonl", 40)[1::5])
    write(folder / "labelled.jsonl", sample("routes-train.jsonl", 80))
    write(folder / "labelled-test.jsonl", sample("routes-test.jsonl", 30))
    write(
        folder / "texts.jsonl", ({"text": row["text"]} for row in sample("routes-train.jsonl", 200))
    )
    words, tags = ["Families", "with", "cancer"], ["O", "O", "B-Disease"]
    write(
        folder / "diseases.jsonl",
        ({"tokens": [str(n), *words], "tags": ["O", *tags]} for n in range(40)),
    )
    asked = {"question": "Is the sky blue?", "choices": ["no", "yes"], "answer": 1}
    write(folder / "choices.jsonl", ({**asked, "task": task} for task in "aabb"))
    chats = sample("train.jsonl", 80)
    pairs = [{"anchor": row["prompt"], "positive": row["completion"]} for row in chats]
    write(folder / "pairs-of-texts.jsonl", pairs[:60])
    write(folder / "pairs-of-texts-test.jsonl", pairs[60:])
    write(
        folder / "two-texts.jsonl",
        ({"text": row["anchor"], "other": row["positive"]} for row in pairs[60:]),
    )
    write(
        folder / "questions.jsonl",
        ({"query": row["anchor"], "positive": row["positive"]} for row in pairs[:30]),
    )
    leave = {"question": "How many days of leave?", "answer": "thirty days"}
    write(folder / "answers.jsonl", [leave])
    write(folder / "documents.jsonl", ({"text": row["positive"]} for row in pairs))
    write(
        folder / "candidates.jsonl",
        ({"query": row["anchor"], "document": row["positive"]} for row in pairs[60:]),
    )
    for name, side in (("queries", "anchor"), ("corpus", "positive")):
        write(
            folder / f"{name}.jsonl",
            ({"_id": str(n), "text": row[side]} for n, row in enumerate(pairs[60:])),
        )
    (folder / "qrels.tsv").write_text("".join(f"{n}\t{n}\t1\n" for n in range(len(pairs[60:]))))
    sums = [(one, other) for one in range(1, 7) for other in range(1, 7)]
    write(
        folder / "prompts.jsonl",
        ({"prompt": f"What is {a} plus {b}?", "expected": str(a + b)} for a, b in sums),
    )
    random = np.random.default_rng(0)
    parts = {
        "tyre": ("trail", "road", "city", "snow"),
        "chain": ("nine", "ten", "eleven", "single"),
    }
    items = {part: [f"{kind} {part}" for kind in kinds] for part, kinds in parts.items()}
    for name, count in (("histories", 40), ("histories-test", 10)):
        chosen = [
            random.permutation(items[("tyre", "chain")[n % 2]]).tolist() for n in range(count)
        ]
        write(folder / f"{name}.jsonl", ({"history": c[:2], "item": c[2]} for c in chosen))
    (folder / "catalogue.txt").write_text("\n".join([*items["tyre"], *items["chain"]]))
    (folder / "data").mkdir()
    with (folder / "data" / "rows.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["question", "reply"])
        rows.writerows([row["prompt"], row["completion"]] for row in chats[:40])
    with (folder / "tickets.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["body"], *([row["prompt"]] for row in chats[:10])])
    make_media(folder)
    for name, source in (("corpus.txt", "docs/results.md"), ("handbook.txt", "README.md")):
        shutil.copy(ROOT / source, folder / name)
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    for name in ("README.md", "CHANGELOG.md"):  # copies: a page writes its model card to README.md
        shutil.copy(ROOT / name, folder / name)
    for name in ("docs", "src"):
        (folder / name).symlink_to(ROOT / name)


def make_media(folder: Path) -> None:
    """Create captioned images of three shapes, two files of digit strokes, and high and low tones."""
    random = np.random.default_rng(0)
    for name, count in (("digits", 100), ("test", 20)):
        labels_N = np.arange(count) % 10
        images_N = np.zeros((count, 28, 28), np.uint8)
        for image, label in zip(images_N, labels_N, strict=True):
            image[4:24, 2 * label + 3 : 2 * label + 6] = random.integers(180, 255)
        np.savez(folder / f"{name}.npz", images=images_N, labels=labels_N)
    Image.fromarray(255 - images_N[0]).save(folder / "part-0417.png")
    for name in ("ordinary", "series"):
        lines = [f"{n},{np.sin(n / 4) + random.normal(0, 0.1):.3f}\n" for n in range(600)]
        (folder / f"{name}.csv").write_text("timestamp,value\n" + "".join(lines))
    pump = [f"{n},{random.normal(38):.2f},{random.normal(5.7, 0.1):.2f}\n" for n in range(200)]
    (folder / "pump.csv").write_text("time,flow,pressure\n" + "".join(pump))
    for part, count in (("", 60), ("-test", 10)):
        path = folder / f"lines{part}"
        rows = [
            {"file_name": f"{number}.png", "text": str(random.integers(10, 10**9))}
            for number in range(1, count + 1)
        ]
        write(path / "metadata.jsonl", rows)
        for row in rows:
            picture = Image.new("L", (160, 32), 255)
            ImageDraw.Draw(picture).text(
                (4, 4), row["text"], font=ImageFont.load_default(20), fill=0
            )
            picture.save(path / row["file_name"])
    captions = list[dict[str, Any]]()
    for part, count in (("", 8), ("-test", 2)):
        for number in range(1, count + 1):
            for shape in ("bars", "disc", "ring"):
                picture = Image.new("RGB", (64, 48), tuple(random.integers(0, 90, 3).tolist()))
                draw, left = ImageDraw.Draw(picture), int(random.integers(0, 30))
                box = (left, 8, left + 30, 38)
                if shape == "bars":
                    for y in range(8, 38, 8):
                        draw.rectangle((left, y, left + 30, y + 3), fill="yellow")
                else:
                    fill = "yellow" if shape == "disc" else None
                    draw.ellipse(box, fill=fill, outline="yellow", width=4)
                path = folder / f"photos{part}" / shape / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                picture.save(path)
                captions.append(
                    {"image": str(path.relative_to(folder)), "caption": f"a yellow {shape}"}
                )
            for tone, pitch in (("low", 300), ("high", 1200)):
                path = folder / f"sounds{part}" / tone / f"{number}.wav"
                path.parent.mkdir(parents=True, exist_ok=True)
                times = np.arange(4000) / 8000
                wave_T = np.sin(2 * np.pi * pitch * random.uniform(0.8, 1.2) * times)
                wave_T = 0.5 * wave_T + 0.01 * random.standard_normal(4000)
                with wave.open(str(path), "wb") as file:
                    file.setparams((1, 2, 8000, 0, "NONE", ""))
                    file.writeframes((wave_T * 32767).astype("<i2").tobytes())
    (folder / "recordings").mkdir()
    for name in ("recordings/forest", "recordings/lake", "night"):
        tones = [
            folder / "sounds" / tone / f"{n}.wav" for n in range(1, 9) for tone in ("low", "high")
        ]
        with wave.open(str(folder / f"{name}.wav"), "wb") as file:
            file.setparams((1, 2, 8000, 0, "NONE", ""))
            for path in tones:
                with wave.open(str(path)) as tone_file:
                    file.writeframes(tone_file.readframes(4000) + bytes(8000))
        events = [f"{n}\t{n + 0.5}\t{path.parent.name}\n" for n, path in enumerate(tones)]
        if name != "night":
            (folder / f"{name}.txt").write_text("".join(events))
    with (folder / "recordings.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["audio", "label", "speaker"])
        for number in range(1, 9):
            table.writerows(
                [f"sounds/{tone}/{number}.wav", tone, number] for tone in ("low", "high")
            )
    write(folder / "captions.jsonl", captions)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_blocks_of_page_run(page: Path, tmp_path: Path) -> None:
    bases = HOME / "models" / "base"
    if not bases.is_dir():
        pytest.skip("no base models here: `luthier models pull` fetches them")
    todo = runnable(page)
    if not todo:
        pytest.skip("nothing on this page is run here")
    folder, home = tmp_path / "work", tmp_path / "home"
    folder.mkdir()
    make_files(folder)
    shutil.copytree(bases, home / "models" / "base", copy_function=os.link)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    bodies = "\n".join(body for _, body in todo)
    if "my-first-model" in bodies and "--name my-first-model" not in bodies:
        # Model of the first README commands, used by later pages.
        todo.insert(0, ("sh", f"luthier tune my.jsonl --name my-first-model {FEW_STEPS}"))
    for language, body in todo:
        done = subprocess.run(
            ["bash", "-euxc", body] if language == "sh" else [sys.executable, "-c", body],
            env={**os.environ, "LUTHIER_HOME": str(home), "PATH": path},
            cwd=folder, capture_output=True, text=True, check=False, timeout=1800,
        )  # fmt: skip
        assert done.returncode == 0, f"{body}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
