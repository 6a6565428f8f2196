"""Pictures in a drawing style, with the picture of the nearest caption as rival."""

from __future__ import annotations

import base64
import io
import json
import re
import zipfile
from typing import Any

import numpy as np
from PIL import Image

from luthier.evaluation.significance import RowScores, paired_differences
from pages.bench import Bench, Colours, Found, Use, opening, percent, worth

COUNT = 4
"""Generated pictures of a caption."""
SHOWN = 8
"""Captions of the figure."""
STRIP = (0, 250, 500, 1000, 1500, 2000)
"""Steps of the strip."""
RIVAL = "picture of the nearest caption"
Pictures = list[tuple[str, bytes]]
"""Caption and file of each picture."""


def pictures_of(bench: Bench, name: str) -> Pictures:
    with zipfile.ZipFile(bench.folder / "rows" / f"{name}.zip") as archive:
        rows = map(json.loads, archive.read("metadata.jsonl").decode().splitlines())
        return [(row["text"], archive.read(row["file_name"])) for row in rows]


def words_of(caption: str) -> set[str]:
    return {*re.findall(r"\w+", caption)}


def nearest_caption(caption: str, pictures: Pictures) -> int:
    """Return the picture whose caption shares most words (Jaccard)."""
    words = words_of(caption)
    shares = [len(words & words_of(text)) / len(words | words_of(text)) for text, _ in pictures]
    return int(np.argmax(shares))


def embed(bench: Bench, name: str, files: list[bytes]) -> Any:
    """Return unit vectors of pictures by an encoder that saw none of the pictures."""
    folder = bench.folder / name
    folder.mkdir()
    for place, content in enumerate(files):
        image = Image.open(io.BytesIO(content)).convert("RGB")
        image.save(folder / f"{place:03}.png")
    bench.run(f"luthier embed efficientnet-lite0 {name} --output {name}.npy")
    vectors = np.load(bench.folder / f"{name}.npy")
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def collect(bench: Bench) -> Found:
    """Generate pictures of held-out captions, and find the wanted picture among all held-out ones."""
    train, test = pictures_of(bench, "train"), pictures_of(bench, "test")
    made = []
    for place, (caption, _) in enumerate(test):
        folder = f"made/{place:02}"
        bench.run(
            f'luthier sample small-unet:faces --prompt "{caption}" --count {COUNT} '
            f"--seed {place} --output {folder}"
        )
        made += [path.read_bytes() for path in sorted((bench.folder / folder).rglob("*.png"))]
    near = [train[nearest_caption(caption, train)][1] for caption, _ in test]
    wanted, known, generated, rival = (
        embed(bench, name, files)
        for name, files in (
            ("wanted", [content for _, content in test]), ("known", [c for _, c in train]),
            ("generated", made), ("rival", near),
        )
    )  # fmt: skip
    own = np.repeat(np.arange(len(test)), COUNT)
    right = (generated @ wanted.T).argmax(1) == own
    scores = {
        "small-unet:faces": RowScores.of(right.reshape(-1, COUNT).mean(1)),
        RIVAL: RowScores.of((rival @ wanted.T).argmax(1) == np.arange(len(test))),
    }
    gain = paired_differences({"": (scores[RIVAL], scores["small-unet:faces"])})[""]
    to_known = (generated @ known.T).max(1)
    copies = float(np.mean(to_known > (generated * wanted[own]).sum(1)))
    worst = int(np.argmin((generated * wanted[own]).sum(1).reshape(-1, COUNT).mean(1)))
    closest = (generated @ known.T).reshape(len(test), COUNT, -1).mean(1).argmax(1)
    tuned, other = scores["small-unet:faces"], scores[RIVAL]
    (size,) = (s["result"]["saved_bytes"] for s in bench.steps if "--name faces" in s["command"])
    return {
        "rows": rows_of_archive(bench)[:2],
        "wrong": f"caption: {test[worst][0]}\n"
        f"answer:  a picture like the training picture “{train[closest[worst]][0]}”",
        "headline": f"{opening(worth(gain))}: "
        f"the pictures have the style, and {percent(copies)} of {len(made)} are closer to a training "
        f"picture than to the wanted one. The wanted picture is recognized in "
        f"{percent(tuned.value)}, and in {percent(other.value)} of the {RIVAL}.",
        "compared": {
            "contenders": [
                {"name": name, "technique": "fine-tuning" if name != RIVAL else "other",
                 "score": each.value, "interval": list(each.interval), "seconds": None,
                 "model_bytes": size if name != RIVAL else 0}
                for name, each in sorted(scores.items(), key=lambda item: -item[1].value)
            ],
            "rows": len(test),
            "worth_it": worth(gain),
            "verdict": f"The tuned model against the {RIVAL}, by pairs of {len(test)} captions: "
            f"{100 * gain.value:+.1f} ± {100 * gain.error:.1f} points "
            f"({'significant' if gain.significant else 'not significant'}).",
        },
        "strip": strip_of(bench),
        "shown": [
            {"caption": caption, "wanted": plain(content), "made": plain(made[COUNT * place]),
             "near": plain(near[place])}
            for place, (caption, content) in [*enumerate(test)][:SHOWN]
        ],
    }  # fmt: skip


def rows_of_archive(bench: Bench) -> list[str]:
    with zipfile.ZipFile(bench.folder / "rows" / "train.zip") as archive:
        return archive.read("metadata.jsonl").decode().splitlines()


def strip_of(bench: Bench) -> list[Found]:
    """Train again with held-out rows, and return the grids that the run draws of their captions."""
    bench.run(
        "luthier tune rows/train.zip --objective diffusion --name strip --validation rows/test.zip "
        "--set training.max_steps=2000 --set training.evaluate_every=250"
    )
    grids = bench.home / "runs" / "small-unet" / "strip" / "grids"
    return [
        {"step": step, "image": plain((grids / f"{step:06}.png").read_bytes(), 34)}
        for step in STRIP
    ]


def plain(content: bytes, edge: int | None = None) -> str:
    """Return a picture, or its upper left corner, for JSON."""
    image = Image.open(io.BytesIO(content)).convert("RGB")
    if edge:
        image = image.crop((2, 2, edge, edge))
    made = io.BytesIO()
    image.save(made, "WEBP", quality=92)
    return base64.b64encode(made.getvalue()).decode()


def show(axes: Any, place: tuple[float, float, float, float], content: str) -> None:
    image = Image.open(io.BytesIO(base64.b64decode(content)))
    part = axes.inset_axes(place)
    part.imshow(np.asarray(image), interpolation="none")
    part.set_axis_off()


def paint(axes: Any, colours: Colours, found: Found) -> None:
    """Draw one caption over the steps, and wanted, generated and nearest pictures."""
    axes.set_axis_off()

    def write(x: float, y: float, text: str, align: str = "right") -> None:
        axes.text(
            x, y, text, color=colours["text"], ha=align, va="center", fontsize=10,
            transform=axes.transAxes,
        )  # fmt: skip

    write(0.16, 0.9, "steps")
    for place, each in enumerate(found["strip"]):
        left = 0.2 + 0.13 * place
        show(axes, (left, 0.82, 0.1, 0.16), each["image"])
        write(left + 0.05, 0.79, f"{each['step']:,}", "center")
    for row, (key, name) in enumerate(
        (("wanted", "wanted"), ("made", "tuned"), ("near", "nearest\ncaption"))
    ):
        below = 0.5 - 0.2 * row
        write(0.16, below + 0.08, name)
        for place, each in enumerate(found["shown"]):
            show(axes, (0.19 + 0.1 * place, below, 0.09, 0.16), each[key])


USE = Use(
    "drawing-style",
    "Pictures in a drawing style",
    "captions",
    "recognized pictures",
    "Pictures: EmojiTwo, CC BY 4.0, based on EmojiOne 2.2; 32 x 32 pixels, WebP.",
    tuple(f"examples/drawing-style/{name}" for name in ("train.zip", "test.zip", "NOTICE.md")),
    "A picture over the training steps, and wanted, generated and nearest pictures of new captions",
    paint,
    collect,
)
