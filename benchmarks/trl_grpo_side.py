"""TRL's GRPOTrainer with default code, in a separate environment.

Usage: python trl_grpo_side.py MODEL ROWS.jsonl STEPS PROMPTS GENERATIONS TOKENS SETTING RATE where
SETTING is defaults or best.
"""

from __future__ import annotations

import json
import sys
import tempfile
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from peer import SETTINGS, Clock


def similar(completions: list[Any], expected: list[str], **_: Any) -> list[float]:
    """Return the share of the expected words in a completion, so that rewards differ in every
    group."""
    rewards = []
    for completion, wanted in zip(completions, expected, strict=True):
        said, words = set(completion[0]["content"].split()), set(wanted.split())
        rewards.append(len(said & words) / len(words) + len(said) * 1e-4)
    return rewards


class Lengths(Clock):
    """Keeps the mean length of the completions of each step too."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens: list[float] = []

    def on_log(self, *args: object, logs: dict[str, float] | None = None, **kwargs: object) -> None:
        super().on_log(*args, logs=logs, **kwargs)
        if logs and "completions/mean_length" in logs:
            self.tokens.append(float(logs["completions/mean_length"]))


def main() -> None:
    folder, rows, steps, prompts, generations, tokens, setting, rate = sys.argv[1:9]
    best = setting == "best"
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16 if best else torch.float32
    )
    with open(rows, encoding="utf-8") as file:
        read = [json.loads(line) for line in file]
    data = Dataset.from_list(
        [
            {"prompt": [{"role": "user", "content": r["prompt"]}], "expected": r["expected"]}
            for r in read
        ]
    )
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    with tempfile.TemporaryDirectory() as scratch:
        config = GRPOConfig(
            output_dir=scratch,
            max_steps=int(steps),
            learning_rate=float(rate),
            per_device_train_batch_size=int(prompts) * int(generations),
            num_generations=int(generations),
            max_completion_length=int(tokens),
            shuffle_dataset=False,
            seed=0,
            **SETTINGS,
            **({"gradient_checkpointing": False} if best else {}),
        )
        clock = Lengths()
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=similar,
            args=config,
            train_dataset=data,
            processing_class=AutoTokenizer.from_pretrained(folder),
            peft_config=lora,
            callbacks=[clock],
        )
        trainer.train()
    print(json.dumps({"seconds": clock.seconds, "losses": clock.losses, "tokens": clock.tokens}))


main()
