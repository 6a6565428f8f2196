"""Step times and losses of a run of transformers' Trainer; imported by both peers' sides."""

from __future__ import annotations

import time

from transformers import TrainerCallback


class Clock(TrainerCallback):
    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []

    def on_step_begin(self, *args: object, **kwargs: object) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, *args: object, **kwargs: object) -> None:
        self.seconds.append(time.perf_counter() - self.started)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))
