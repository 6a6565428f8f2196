"""Sounds in long recordings: clips, a classifier with a background class, events found.

    python benchmarks/long_recordings.py DATA [--seeds 3] [--base band-means]

``DATA`` has the folder ``esc10_nature``. Its clips of two seconds are put into recordings of quiet
noise with pauses of two to six seconds: three recordings train, and one of other clips is the test.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import soundfile

import luthier
from luthier.media.cutting import BACKGROUND

RATE, SECONDS, PAUSE = 8000, 150, (2.0, 6.0)
NOISE, LOUDNESS = 0.003, 0.5
Event = tuple[float, float, str]


def write_recording(
    archive: zipfile.ZipFile, names: list[str], path: Path, rng: np.random.Generator
) -> list[Event]:
    """Write a recording with the clips ``names`` and its label track; return the events."""
    samples = rng.normal(0, NOISE, SECONDS * RATE).astype(np.float32)
    at, events = PAUSE[0], list[Event]()
    for name in names:
        clip, _ = soundfile.read(io.BytesIO(archive.read(name)), dtype="float32")
        length = len(clip) / RATE
        if at + length > SECONDS:
            break
        first = int(at * RATE)
        samples[first : first + len(clip)] += LOUDNESS * clip
        events.append((at, at + length, Path(name).name.rpartition("_")[0]))
        at += length + rng.uniform(*PAUSE)
    soundfile.write(path, samples, RATE)
    track = "".join(f"{start:.3f}\t{end:.3f}\t{label}\n" for start, end, label in events)
    path.with_suffix(".txt").write_text(track)
    return events


def run(data: Path, base: str, seed: int) -> dict[str, float]:
    """Return accuracy of clips, share of events found and correctly named, and false alarms."""
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for split in ("train", "test"):
            (folder / split).mkdir()
            with zipfile.ZipFile(data / "esc10_nature" / f"{split}.zip") as archive:
                clips = rng.permutation([n for n in archive.namelist() if n.endswith(".wav")])
                for part, start in enumerate(range(0, len(clips), 20)):
                    path = folder / split / f"{part}.flac"
                    events = write_recording(archive, [*clips[start : start + 20]], path, rng)
            luthier.convert(folder / split, folder / f"{split}.zip")
        tuned = luthier.tune(
            folder / "train.zip",
            base=base,
            name=f"recordings-{seed}",
            data__group_column="recording",
        )
        with zipfile.ZipFile(folder / "test.zip") as archive:
            rows = [json.loads(line) for line in archive.read("metadata.jsonl").splitlines()]
        found = luthier.predict(tuned.model_id, input=str(folder / "test.zip")).to_rows()
        luthier.remove_model(tuned.model_id)
    labels = [row["predicted"]["label"] for row in found]
    named = [
        {label for row, label in zip(rows, labels, strict=True)
         if row["label"] != BACKGROUND and start - 0.5 <= row["start_time"] < end}
        for start, end, _ in events
    ]  # fmt: skip
    wanted = [event[2] for event in events]
    is_quiet = [row["label"] == BACKGROUND for row in rows]
    alarms = [label != BACKGROUND for label, quiet in zip(labels, is_quiet, strict=True) if quiet]
    return {
        "clips": len(rows), "background": float(np.mean(is_quiet)),
        "accuracy": float(np.mean([r["label"] == got for r, got in zip(rows, labels, strict=True)])),
        "events": len(events),
        "found": float(np.mean([bool(each - {BACKGROUND}) for each in named])),
        "named": float(np.mean([want in each for want, each in zip(wanted, named, strict=True)])),
        "false_alarms": float(np.mean(alarms)),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--base", default="band-means")
    chosen = parser.parse_args()
    for seed in range(chosen.seeds):
        print(json.dumps(run(chosen.data, chosen.base, seed)), flush=True)


if __name__ == "__main__":
    main()
