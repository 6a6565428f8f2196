"""Settings, training, times and losses shared by the peers' scripts."""

from __future__ import annotations

import json
import tempfile
import time
from typing import Any

from transformers import TrainerCallback

SETTINGS: dict[str, Any] = {
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0,
    "logging_steps": 1,
    "report_to": [],
    "save_strategy": "no",
    "bf16": True,
    "use_cpu": True,
    "train_sampling_strategy": "sequential",
}
"""bfloat16 autocast on the processor, rows in the order of the file, nothing saved or reported."""


class Clock(TrainerCallback):
    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []

    def on_step_begin(self, *args: object, **kwargs: object) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, *args: object, **kwargs: object) -> None:
        self.seconds.append(time.perf_counter() - self.started)

    def on_log(self, *args: object, logs: dict[str, float] | None = None, **kwargs: object) -> None:
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))


def train(
    trainer_of: Any, config_of: Any, steps: str, rate: str, settings: dict[str, Any], **given: Any
) -> None:
    """Train with the peer's trainer and ``settings``, and print seconds and losses of the steps."""
    with tempfile.TemporaryDirectory() as scratch:
        config = config_of(
            output_dir=scratch,
            max_steps=int(steps),
            learning_rate=float(rate),
            seed=0,
            **SETTINGS,
            **settings,
        )
        clock = Clock()
        trainer_of(args=config, callbacks=[clock], **given).train()
    print(json.dumps({"seconds": clock.seconds, "losses": clock.losses}))
