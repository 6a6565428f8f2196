"""A small convolutional network with random weights: luthier against a plain PyTorch loop.

    python benchmarks/small_cnn_vs_torch.py DATA/mnist10k [--epochs 2]

``small-cnn`` on handwritten digits, batch 32, float32 (bfloat16 if the processor multiplies
bfloat16), one thread. Both sides start with the same weights, read the rows in the same order, and
use AdamW with the same rates and clipping. The plain loop uses channels last, fused AdamW, and
images resized once. Without augmentation its images are one tensor; with augmentation its
`DataLoader` applies luthier's augmentation with Pillow, image by image. The sides run in turns,
step by step in one process. The table has times and the accuracy on the test images.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

import luthier
from children import table
from luthier.data.augmentation import Augmentation
from luthier.data.inputs import Media, read_processor
from luthier.data.loader import RowOrder
from luthier.engine.machine import choose_machine
from luthier.engine.metrics import Reporter
from luthier.engine.optimizers import schedule_factor
from luthier.library.models import find
from luthier.media.augmentation import change_image
from luthier.media.processors import ImageProcessor
from luthier.models.load import load_model
from luthier.models.networks.heads import Head

BATCH, RATE, WARMUP = 32, 2e-3, 0.05
Images = NDArray[np.uint8]


class Turns(Reporter):
    """A reporter that runs a step of the plain loop after each of luthier's, and records both."""

    def __init__(self, other: Iterator[float]) -> None:
        self.other = other
        self.seconds: list[tuple[float, float]] = []
        self.losses: list[tuple[float, float]] = []
        self.began = time.perf_counter()

    def metrics(self, line: Mapping[str, Any], steps: int) -> None:
        """After each step."""
        if line["event"] != "train":
            return
        ended = time.perf_counter()
        loss = next(self.other)
        after = time.perf_counter()
        self.seconds.append((ended - self.began, after - ended))
        self.losses.append((line["loss"], loss))
        self.began = time.perf_counter()


def read(path: Path) -> tuple[Images, list[str]]:
    """Images and labels."""
    with np.load(path) as arrays:
        return arrays["images"], [str(label) for label in arrays["labels"]]


def pixels(processor: ImageProcessor, images: Images) -> Tensor:
    """Return all images as network input, ``[N, 3, H, W]``."""
    media = (Media("image", "row", array=image) for image in images)
    return torch.from_numpy(np.stack([processor.array(each) for each in media]))


class Changed(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Resized images, augmented on each access."""

    def __init__(self, processor: ImageProcessor, images: Images, targets: list[int]) -> None:
        media = (Media("image", "row", array=image) for image in images)
        self.resized = [processor.resize(each) for each in media]
        self.targets, self.augmentation = targets, Augmentation.usual("image")
        self.mean = np.array(processor.mean, np.float32)
        self.std = np.array(processor.std, np.float32)
        self.random = np.random.default_rng(0)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        seen = change_image(self.augmentation, self.resized[index], self.random)
        values = (seen.astype(np.float32) / 255 - self.mean) / self.std
        return torch.from_numpy(values).permute(2, 0, 1), self.targets[index]


def start(base: Path, labels: list[str]) -> Any:
    """The network both sides begin with."""
    torch.manual_seed(0)
    head = Head("sequence_classification", tuple(labels))
    model: Any = load_model(base, torch.float32, torch.device("cpu"), head)
    return model.to(memory_format=torch.channels_last).train()


def plain_loop(
    model: Any, processor: ImageProcessor, rows: Any, labels: list[str], epochs: int, changed: bool
) -> Iterator[float]:
    """Train; the loss of each step."""
    images, names = rows
    machine = choose_machine(threads=1)
    targets = [labels.index(name) for name in names]
    order = RowOrder(len(images), BATCH, 0)
    steps = order.steps(epochs)
    if changed:
        loader = torch.utils.data.DataLoader(
            Changed(processor, images, targets),
            batch_sampler=[order.batch(step) for step in range(steps)],
        )
        batches: Iterator[Any] = iter(loader)
    else:
        held = pixels(processor, images).contiguous(memory_format=torch.channels_last)
        target_N = torch.tensor(targets)
        chosen = (torch.tensor(order.batch(step)) for step in range(steps))
        batches = ((held[each], target_N[each]) for each in chosen)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.0, fused=True)
    lower = machine.dtype != torch.float32
    for step, (inputs, target) in enumerate(batches):
        inputs = inputs.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", machine.dtype, enabled=lower):
            loss = F.cross_entropy(model(inputs).logits.float(), target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = RATE * schedule_factor("cosine", step, steps, WARMUP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield loss.item()


def tune(data: Path, labels: list[str], epochs: int, changed: bool, turns: Turns) -> Any:
    """The network by luthier."""
    fields: dict[str, Any] = {} if changed else {"data__augmentation": {}}
    result = luthier.tune(
        data,
        base="small-cnn",
        name=f"bench-{time.time_ns()}",
        reporter=turns,
        data__validation_share=0,
        training__epochs=epochs,
        training__batch_size=BATCH,
        training__learning_rate=RATE,
        training__warmup_ratio=WARMUP,
        training__threads=1,
        training__baseline_seconds=0,
        training__seed=0,
        training__refit=False,
        **fields,
    )
    head = Head("sequence_classification", tuple(labels))
    return load_model(find(result.model_id).folder, torch.float32, torch.device("cpu"), head)


@torch.no_grad()
def accuracy(model: Any, read_NCHW: Tensor, labels: list[str], names: list[str]) -> float:
    """Return the share of correctly classified test images."""
    model.eval()
    best = [model(part).logits.argmax(-1) for part in read_NCHW.split(200)]
    right: int = sum(
        labels[place] == name for place, name in zip(torch.cat(best), names, strict=True)
    )
    return right / len(names)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--epochs", type=int, default=2)
    options = parser.parse_args()
    base = find("small-cnn", print).folder
    train, test = options.data / "train.npz", read(options.data / "test.npz")
    rows = read(train)
    labels = sorted(set(rows[1]))
    processor = read_processor(base)
    assert isinstance(processor, ImageProcessor)
    tested = pixels(processor, test[0])
    out = []
    with tempfile.TemporaryDirectory() as home:
        (Path(home) / "models").mkdir()
        (Path(home) / "models" / "base").symlink_to(base.parent)
        os.environ["LUTHIER_HOME"] = home
        for changed in (False, True):
            other = start(base, labels)
            loop = plain_loop(other, processor, rows, labels, options.epochs, changed)
            turns = Turns(loop)
            own = tune(train, labels, options.epochs, changed, turns)
            ours, theirs = ([pair[side] for pair in turns.seconds[5:]] for side in (0, 1))
            step = [statistics.median(each) * 1e3 for each in (ours, theirs)]
            loss = [statistics.fmean(pair[side] for pair in turns.losses[-50:]) for side in (0, 1)]
            right = [accuracy(each, tested, labels, test[1]) for each in (own, other)]
            out.append(
                [
                    "as luthier makes them" if changed else "none",
                    f"{step[0]:.0f} / {step[1]:.0f}",
                    f"**{step[1] / step[0]:.2f}x**",
                    f"{sum(theirs) / sum(ours):.2f}x",
                    f"{loss[0]:.3f} / {loss[1]:.3f}",
                    f"{right[0]:.2%} / {right[1]:.2%}",
                ]
            )
    header = ["changes to images", "step, ms (luthier / PyTorch)", "ratio", "of all steps"]
    print(table([*header, "loss of the last 50 steps", "accuracy, test"], out))


if __name__ == "__main__":
    main()
