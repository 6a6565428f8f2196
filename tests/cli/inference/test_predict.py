"""Tuning and prediction with the commands."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from command_line import Answer
from PIL import Image

ROWS = 240


@pytest.fixture
def series(tmp_path: Path) -> Path:
    """Return a series with a daily cycle and hourly values."""
    noise = np.random.default_rng(0).normal(0, 0.1, ROWS)
    lines = [
        f"2026-01-{1 + hour // 24:02} {hour % 24:02}:00:00,{math.sin(hour / 24 * math.tau) + each}"
        for hour, each in enumerate(noise)
    ]
    path = tmp_path / "load.csv"
    path.write_text("\n".join(["timestamp,value", *lines, ""]))
    return path


def test_time_series_needs_no_base_option(luthier_home: Path, tmp_path: Path, series: Path) -> None:
    answer = Answer("inspect", str(series))
    named = Answer("inspect", str(series), "--base", "small-window-vae")
    assert named.out == answer.out
    assert answer.code == 0 and "vae on small-window-vae" in answer.out
    assert answer.out.count("not checked: ") == 1
    assert "Tokens of a row" not in answer.out and "What the model sees" not in answer.out
    answer = Answer(
        "tune", str(series), "--name", "load", "--set", "training.epochs=1",
        "--set", "training.max_steps=4",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    assert answer.err.count("Chosen for this run") == 1
    assert "data.augmentation" not in answer.err
    assert re.search(r"objective.threshold=[-\d.]+ +from the scores of \d+ rows", answer.err)
    assert "luthier predict small-window-vae:load --input series.csv" in answer.out

    refused = Answer("predict", "small-window-vae:load", str(series))
    assert refused.code == 2 and f"--input {series}" in refused.err
    scored = Answer(
        "predict", "small-window-vae:load", "--input", str(series), "--output",
        str(tmp_path / "scores.jsonl"),
    )  # fmt: skip
    assert scored.code == 0, scored.err
    lines = Answer("predict", "small-window-vae:load", "--input", str(series), "--output", "-").out
    assert lines == (tmp_path / "scores.jsonl").read_text() and not Path("-").exists()
    assert re.search(
        r"\d+ rows are anomalous \(score above [-\d.]+\); 47 rows",
        scored.out + scored.err,
    )


def test_predict_rejects_folder_as_text(luthier_home: Path, tmp_path: Path) -> None:
    answer = Answer("predict", "any:model", str(tmp_path))
    assert answer.code == 2 and "--input" in answer.err
    assert "Unknown custom model" in Answer("predict", "any:model", "x" * 5_000).err


@pytest.mark.parametrize(
    ("base", "method"), [("small-vae", "vae"), ("small-dcgan", "gan"), ("small-unet", "diffusion")]
)
def test_base_selects_objective_for_unlabelled_images(
    luthier_home: Path, tmp_path: Path, base: str, method: str
) -> None:
    for number in range(4):
        pixels = np.full((9, 9, 3), 40 * number, np.uint8)
        path = tmp_path / "pictures" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(path)
    answer = Answer("inspect", str(path.parent), "--base", base)
    assert f"{method} on {base}" in answer.out, answer.err
    tuned = Answer(
        "tune", str(path.parent), "--base", base, "--name", "x", "--set", "training.max_steps=1",
        "--set", "data.image_size=16",
    )  # fmt: skip
    assert f"objective={method} " in tuned.err
    assert tuned.code == 2 and "3 x 32 x 32" in tuned.err


def test_inspect_shows_example_for_clip(
    luthier_home: Path, family_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    rows = []
    for number in range(4):
        Image.fromarray(np.full((16, 16, 3), 40 * number, np.uint8)).save(
            tmp_path / f"{number}.png"
        )
        rows.append(json.dumps({"image": f"{number}.png", "caption": f"grey {number}"}))
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(rows))
    answer = Answer("inspect", str(data), "--base", str(family_folder("clip")))
    assert "contrastive on" in answer.out and "<image>" in answer.out, answer.err


def test_least_certain_rows_come_first(luthier_home: Path, tmp_path: Path) -> None:
    import luthier

    words = {"bike": ("chain", "pedal", "saddle"), "shop": ("invoice", "refund", "parcel")}
    rows = [
        {"text": f"my {word} number {n}", "label": label}
        for label, some in words.items()
        for word in some
        for n in range(6)
    ]
    luthier.tune(rows, base="tfidf", name="doors", data__validation_share=0)
    pool = tmp_path / "pool.jsonl"
    texts = ["my chain and saddle", "my pedal and invoice", "my refund and parcel"]
    pool.write_text("".join(json.dumps({"text": text, "id": text[3:5]}) + "\n" for text in texts))
    options = ("--least-certain", "2", "--output", str(tmp_path / "next.jsonl"))
    answer = Answer("predict", "tfidf:doors", "--input", str(pool), *options)
    assert answer.code == 0, answer.err
    chosen = [json.loads(line) for line in (tmp_path / "next.jsonl").read_text().splitlines()]
    assert len(chosen) == 2 and chosen[0]["text"] == texts[1] and chosen[0]["id"] == "pe"
    margins = [abs(2 * row["predicted"]["scores"]["bike"] - 1) for row in chosen]
    assert margins == sorted(margins)
    for wrong in (("--top", "1"), ("--processes", "2")):
        refused = Answer("predict", "tfidf:doors", "--input", str(pool), *options, *wrong)
        assert refused.code == 2 and "least_certain" in refused.err
    alone = Answer("predict", "tfidf:doors", "my chain", "--least-certain", "2")
    assert alone.code == 2 and "`input`" in alone.err


def test_alarms_of_files_name_their_times(luthier_home: Path, tmp_path: Path) -> None:
    import luthier

    values = np.random.default_rng(0).normal(50, 1, 200)
    values[120:150] += 100
    lines = ["label,time,level", *(f"0,2026-01-01 {n // 60:02}:{n % 60:02},{value}"
                                   for n, value in enumerate(values))]  # fmt: skip
    folder = tmp_path / "hours"
    folder.mkdir()
    (tmp_path / "normal.csv").write_text("\n".join(lines[:121]))
    for name in ("a.csv", "b.csv"):
        (folder / name).write_text("\n".join(lines[:140]))
    luthier.tune(tmp_path / "normal.csv", base="z-score", name="pump")
    output = tmp_path / "scores.jsonl"
    command = ("predict", "z-score:pump", "--input", str(folder), "--output", str(output))
    plain = json.loads(Answer(*command, "--json").out)
    assert plain["alarms"]["count"] == 2
    runs = plain["alarms"]["runs"]
    assert [Path(run["file"]).name for run in runs] == ["a.csv", "b.csv"]
    assert {run["end"] for run in runs} == {"2026-01-01 02:18"}
    scores = [json.loads(line)["predicted"] for line in output.read_text().splitlines()]
    assert sum(run["rows"] for run in runs) == sum(each["anomalous"] is True for each in scores)
    printed = Answer(*command, "--overwrite").out
    assert printed.count("2026-01-01 02:18") == 2
    assert luthier.predict("z-score:pump", input=str(folder)).plain()["alarms"] == plain["alarms"]
