"""Text recognition on rendered lines in several fonts with noise.

    python benchmarks/image_to_text.py DATA [--fonts A.ttf B.ttf ...] [--held-out C.ttf] [--rows
        24000]
        [--output FOLDER] [--set training.epochs=3 ...]

DATA has ``sib200_vi`` and ``d2l_vi``, Vietnamese sentences with separate texts for training and
test. Test lines that also occur in training are removed. Sentences are cut into lines of three to
six words and at most 40 characters. Each line has its own font, size, ink, ground, slant, blur and
noise. The same test lines are rendered in the fonts of the training lines and in ``--held-out``, an
unseen font. Fonts are matplotlib's DejaVu by default.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import sys
import tempfile
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from children import run

SETS = ("sib200_vi", "d2l_vi")
LONGEST = 40
MARKS = "ÀÁÂÃÈÉÊÌÍÒÓÔÕÙÚÝàáâãèéêìíòóôõùúýĂăĐđĨĩŨũƠơƯư–“”"
LETTERS = {*map(chr, range(32, 127)), *MARKS, *map(chr, range(0x1EA0, 0x1EFA))}
"""Characters of the lines. Lines with other characters, such as code and formulas, are removed."""
DEJAVU = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSerif",
    "DejaVuSerif-Bold",
)  # fmt: skip
HELD_OUT = "DejaVuSerif-Italic"


def matplotlib_font(name: str) -> Path:
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"


def lines_of(data: Path, split: str, rng: random.Random) -> list[str]:
    """Distinct lines of text, in random order."""
    found = dict[str, None]()
    for name in SETS:
        for row in (data / name / f"{split}.jsonl").read_text().split("\n"):
            words = unicodedata.normalize("NFC", json.loads(row)["text"] if row else "").split()
            while words:
                count = rng.randint(3, 6)
                line, words = " ".join(words[:count]), words[count:]
                letters = sum(character.isalpha() for character in line)
                if line.count(" ") >= 2 and len(line) <= LONGEST and {*line} <= LETTERS:
                    found |= {line: None} if letters > 0.6 * len(line) else {}
    lines = sorted(found)
    rng.shuffle(lines)
    return lines


def render(text: str, font: Path, rng: random.Random) -> Image.Image:
    """Render a line in grey, like a bad scan."""
    size = rng.randint(24, 36)
    face = ImageFont.truetype(str(font), size)
    left, _, right, _ = face.getbbox(text)
    margin, ink, ground = rng.randint(4, 10), rng.randint(0, 90), rng.randint(170, 255)
    width = round(right - left) + 2 * margin
    image = Image.new("L", (width, sum(face.getmetrics()) + margin), ground)
    ImageDraw.Draw(image).text((margin - left, margin // 2), text, font=face, fill=ink)
    image = image.rotate(rng.uniform(-1.5, 1.5), Image.Resampling.BICUBIC, fillcolor=ground)
    if rng.random() < 0.5:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.2)))
    noise = np.random.default_rng(rng.getrandbits(32)).normal(
        0, rng.uniform(0, 18), image.size[::-1]
    )
    return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))


def write(folder: Path, lines: Sequence[str], fonts: Sequence[Path], rng: random.Random) -> Path:
    """Write the lines as a Hugging Face image folder."""
    folder.mkdir(parents=True)
    with (folder / "metadata.jsonl").open("w") as metadata:
        for number, line in enumerate(lines):
            name = f"{number}.png"
            render(line, rng.choice(fonts), rng).save(folder / name)
            row = json.dumps({"file_name": name, "text": line}, ensure_ascii=False)
            metadata.write(f"{row}\n")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--fonts", nargs="+", type=Path, default=[*map(matplotlib_font, DEJAVU)])
    parser.add_argument("--held-out", type=Path, default=matplotlib_font(HELD_OUT))
    parser.add_argument("--rows", type=int, default=24_000)
    parser.add_argument("--test-rows", type=int, default=1_000)
    parser.add_argument("--base", default="small-ocr")
    parser.add_argument("--name", default="lines")
    parser.add_argument("--set", nargs="*", default=[], help="settings of luthier tune")
    parser.add_argument("--output", type=Path, help="where the images are written")
    args = parser.parse_args()
    folder = args.output or Path(tempfile.mkdtemp())
    rng = random.Random(0)
    train = lines_of(args.data, "train", rng)
    known = {*train}
    test = [line for line in lines_of(args.data, "test", rng) if line not in known]
    test = test[: args.test_rows]
    print(f"{len(train):,} lines to learn from, {args.rows:,} of them are written to {folder}")
    write(folder / "train", train[: args.rows], args.fonts, rng)
    tests = {
        "fonts of the training lines": write(folder / "test", test, args.fonts, rng),
        args.held_out.stem: write(folder / "test-held-out", test, [args.held_out], rng),
    }
    luthier = [sys.executable, "-m", "luthier"]
    settings = [word for each in args.set for word in ("--set", each)]
    tune = ["tune", str(folder / "train"), "--base", args.base, "--name", args.name, *settings]
    report = run([*luthier, *tune, "--json"]).report
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(json.dumps(report))
    print(f"tuned in {spent.ru_utime + spent.ru_stime:.0f} s of CPU")
    for name, path in tests.items():
        found = run([*luthier, "evaluate", f"{args.base}:{args.name}", str(path), "--json"]).report
        print(name, json.dumps(found["scores"]), json.dumps(found.get("errors", {})))


if __name__ == "__main__":
    main()
