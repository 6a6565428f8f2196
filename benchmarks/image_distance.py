"""Fréchet distance of two sets of images, or of the halves of one, in a classifier's features.

    python benchmarks/image_distance.py small-cnn:judge DATA/mnist10k/test.npz [MADE] [--size 32]

The distance between two halves of real images is the lower limit for generated images of that
number. All images are resized to ``size`` x ``size`` first. The longer set is cut to the length of
the shorter.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from luthier.data.prompts import load_inputs
from luthier.data.shapes.media import MediaRow
from luthier.engine.machine import choose_machine
from luthier.library.models import find, load
from luthier.media.objectives.generative import features_of, frechet_distance
from luthier.media.processors import ImageProcessor
from luthier.models.load import as_network

AT_ONCE = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("classifier")
    parser.add_argument("images", nargs="+")
    parser.add_argument("--size", type=int, default=32)
    options = parser.parse_args()
    machine, stored = choose_machine("float32", 1), find(options.classifier)
    network = as_network(load(stored, machine.dtype, machine.device), machine.device, machine.dtype)
    network.chat = stored.chat
    network.model.eval()
    processor = ImageProcessor(options.size, options.size)
    sets: list[Any] = []
    for source in options.images:
        rows = [row for _, row in load_inputs(source)]
        order = np.random.default_rng(0).permutation(len(rows)).tolist()
        media = [row.media for row in (rows[place] for place in order) if isinstance(row, MediaRow)]
        pixels = [processor.resize(each) for each in media]
        parts = [pixels[start : start + AT_ONCE] for start in range(0, len(pixels), AT_ONCE)]
        sets.append(np.concatenate([features_of(network, part) for part in parts]))
    if len(sets) == 1:
        sets = np.array_split(sets[0], 2)
    count = min(map(len, sets))
    distance = frechet_distance(sets[0][:count], sets[1][:count])
    print(f"{distance:.1f} between {count:,} images of each")


if __name__ == "__main__":
    main()
