"""Spoken digits of unseen speakers, against logistic regression on the same spectrograms.

    python benchmarks/spoken_digits.py DATA/fsdd [--speakers theo george ...] [--seeds 0 1] [--set
        ...]

DATA/fsdd has ``train.zip`` and ``test.zip`` with files named ``{digit}_{speaker}_{number}.wav``.
All recordings of one speaker are the test of a model of all other speakers, each speaker in turn.
Without ``--seeds`` only the regression is fitted.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch

from children import run, table
from luthier.data.inputs import Media
from luthier.evaluation.linear import fit_logistic
from luthier.media.decoding import read_samples
from luthier.media.processors import AudioProcessor

RATE = 8000
FRAMES = 20
"""Number of frames per word for logistic regression, whatever the word's duration."""


def read(data: Path) -> dict[str, bytes]:
    """The recordings by name."""
    found = dict[str, bytes]()
    for name in ("train.zip", "test.zip"):
        with zipfile.ZipFile(data / name) as archive:
            members = [each for each in archive.namelist() if each.endswith(".wav")]
            found |= {Path(each).name: archive.read(each) for each in members}
    return found


def features(data: bytes) -> np.ndarray:
    """The spectrogram ``[bins * FRAMES]`` of a whole word."""
    media = Media("audio", "word", data=data)
    seconds = len(read_samples(media)[0]) / RATE
    values = AudioProcessor(RATE, seconds).array(media)[0]
    parts = np.array_split(values, FRAMES, axis=1)
    return np.concatenate([part.mean(1) if part.size else values[:, -1] for part in parts])


def rival(sounds: dict[str, bytes], speaker: str) -> float:
    """Accuracy of logistic regression on ``speaker``."""
    given = torch.tensor(
        np.stack([features(each) for each in sounds.values()]), dtype=torch.float32
    )
    digit = torch.tensor([int(name[0]) for name in sounds])
    tested = torch.tensor([speaker in name for name in sounds])
    model = fit_logistic(given[~tested], digit[~tested], 10, penalty=0.1)
    right = model.scores(given[tested]).argmax(-1) == digit[tested]
    return float(right.float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--speakers", nargs="*")
    parser.add_argument("--seeds", nargs="*", type=int, default=[])
    parser.add_argument("--set", nargs="*", default=[], help="settings of luthier tune")
    args = parser.parse_args()
    sounds = read(args.data)
    speakers = args.speakers or sorted({name.split("_")[1] for name in sounds})
    luthier = [sys.executable, "-m", "luthier"]
    settings = [f"data.sampling_rate={RATE}", *args.set]
    rows, measured = list[list[str]](), dict[int, list[float]]()
    for speaker in speakers:
        line = [speaker, f"{rival(sounds, speaker):.1%}"]
        with tempfile.TemporaryDirectory() as folder:
            for name, data in sounds.items():
                part = Path(folder, "test" if speaker in name else "train", name[0])
                part.mkdir(parents=True, exist_ok=True)
                (part / name).write_bytes(data)
            for seed in args.seeds:
                own = [f"training.seed={seed}", *settings]
                name = f"{speaker}-{seed}"
                command = ["tune", f"{folder}/train", "--name", name, "--json"]
                run([*luthier, *command, *(word for each in own for word in ("--set", each))])
                command = ["evaluate", f"small-audio-cnn:{name}", f"{folder}/test", "--json"]
                found = run([*luthier, *command]).report["scores"]["accuracy"]
                measured.setdefault(seed, []).append(found)
                line.append(f"{found:.1%}")
                print(speaker, seed, found, flush=True)
        rows.append(line)
    print(table(["speaker never heard", "regression", *map(str, args.seeds)], rows))
    for seed, scores in measured.items():
        print(f"seed {seed}: mean {statistics.fmean(scores):.1%}")


if __name__ == "__main__":
    main()
