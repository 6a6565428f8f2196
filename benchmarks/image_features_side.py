"""Head of a frozen image network, trained by the Hugging Face Trainer in float32.

Usage: python image_features_side.py FOLDER ROWS.npz EPOCHS BATCH RATE

FOLDER has the network with its head. Prints the seconds of each epoch and the loss of each step.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForImageClassification, Trainer, TrainingArguments

from luthier.data.inputs import Media, read_processor
from luthier.models.networks import classic as nets
from peer import SETTINGS, Clock


class EpochClock(Clock):
    """Notes the end of each epoch, and when the first begins."""

    def __init__(self) -> None:
        super().__init__()
        self.ends: list[float] = []

    def on_train_begin(self, *args: object, **kwargs: object) -> None:
        self.ends.append(time.perf_counter())

    def on_epoch_end(self, *args: object, **kwargs: object) -> None:
        self.ends.append(time.perf_counter())


class FrozenTrainer(Trainer):
    """A Trainer that leaves batch norms unchanged and stores each step's loss with all digits."""

    exact: list[float]

    def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        model.base_model.eval()
        scores = model(args[0]["pixel_values"]).logits
        loss = torch.nn.functional.cross_entropy(scores, args[0]["labels"])
        self.exact.append(float(loss.detach()))
        return loss


def main() -> None:
    folder, source, epochs, batch, rate = sys.argv[1:6]
    torch.set_num_threads(1)
    nets.register()
    from pathlib import Path

    processor = read_processor(Path(folder))
    assert processor is not None
    model = AutoModelForImageClassification.from_pretrained(folder)
    model = model.to(memory_format=torch.channels_last)
    model.base_model.requires_grad_(False)
    places = model.config.label2id
    with np.load(source) as arrays:
        rows = [
            {
                "pixel_values": torch.from_numpy(
                    processor.array(Media("image", "row", array=image))
                ),
                "labels": places[str(label)],
            }
            for image, label in zip(arrays["images"], arrays["labels"], strict=True)
        ]
    with tempfile.TemporaryDirectory() as scratch:
        clock = EpochClock()
        trainer = FrozenTrainer(
            model=model,
            args=TrainingArguments(
                output_dir=scratch,
                num_train_epochs=float(epochs),
                per_device_train_batch_size=int(batch),
                learning_rate=float(rate),
                remove_unused_columns=False,
                **{**SETTINGS, "bf16": False},
            ),
            train_dataset=rows,
            callbacks=[clock],
        )
        trainer.exact = []
        trainer.train()
    seconds = [b - a for a, b in zip(clock.ends, clock.ends[1:], strict=False)]
    print(json.dumps({"epochs": seconds, "losses": trainer.exact}))


main()
