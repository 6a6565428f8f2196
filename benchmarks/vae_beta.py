"""Sweep of the VAE's ``beta``: reconstruction error, divergence, latents in use, samples.

    python benchmarks/vae_beta.py DATA/mnist10k [--beta 0.5 1 2 4 8] [--epochs 3] [--picture
        beta.png]

One autoencoder per ``beta``, all other settings by default. Nats and latents in use are measured on
the held-out rows, the mean squared error of pixels from 0 to 1 on the test images. A row of the
image is one ``beta``: eight test images next to their reconstructions, then samples.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import luthier
from children import table
from luthier.data.prompts import load_inputs
from luthier.media.image_grid import encode_png, grid

SHOWN, SAMPLES = 8, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--beta", type=float, nargs="+", default=[0.5, 1, 2, 4, 8])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--name", default="beta", help="models are called so, and after their beta")
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    rows = [row for _, row in load_inputs(str(options.data / "test.npz"))]
    out, shown = [], []
    for beta in options.beta:
        started = time.monotonic()
        result = luthier.tune(
            options.data / "train.npz",
            name=f"{options.name}-{beta:g}",
            objective={"method": "vae", "beta": beta},
            training__epochs=options.epochs,
            training__threads=1,
        )
        seconds = time.monotonic() - started
        lines = Path(result.run_dir, "metrics.jsonl").read_text().splitlines()
        measured = [json.loads(line) for line in lines if '"validation"' in line]
        last = min(measured, key=lambda line: line["loss"])
        generator = luthier.load(result.model_id).image_generator
        copies = generator.reconstruct(rows)
        error = sum(each.error for each in copies) / len(copies)
        for each in copies[:SHOWN]:
            shown += [each.original, each.copy]
        shown += [each.pixels for each in generator.sample(SAMPLES, seed=1)]
        out.append(
            [
                f"{beta:g}",
                f"{last['reconstruction']:.1f}",
                f"{last['kl']:.1f}",
                str(last["active_units"]),
                f"{error:.4f}",
                f"{seconds:.0f}",
            ]
        )
        print(out[-1], flush=True)
        if options.picture:
            options.picture.write_bytes(encode_png(grid(shown, 2 * SHOWN + SAMPLES)))
    header = ["`beta`", "copies, nats", "divergence, nats", "latents in use"]
    print(table([*header, "mean squared error, test", "seconds"], out))


if __name__ == "__main__":
    main()
