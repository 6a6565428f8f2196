"""Nearest images by pixels: the baseline for embeddings of images.

    python benchmarks/pixel_neighbours.py DATA/sign_digits/test.npz [--size 32]

Each image is resized to ``size`` x ``size`` pixels; similarity is the cosine of the values from 0
to 1. The scores are those of ``luthier evaluate`` on an embedding model.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from luthier.data.inputs import Media
from luthier.evaluation.retrieval import ClassRetrieval
from luthier.media.processors import ImageProcessor


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--size", type=int, default=32)
    options = parser.parse_args()
    processor = ImageProcessor(options.size, options.size)
    with np.load(options.data) as arrays:
        media = [Media("image", "row", array=image) for image in arrays["images"]]
        labels = [str(label) for label in arrays["labels"]]
    pixels = np.stack([processor.resize(each).ravel() / 255 for each in media])
    pixels /= np.linalg.norm(pixels, axis=1, keepdims=True)
    for name, score in ClassRetrieval.of(pixels, labels).scores.items():
        print(f"{name} {score:.1%}")


if __name__ == "__main__":
    main()
