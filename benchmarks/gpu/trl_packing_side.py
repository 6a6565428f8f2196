"""Training by TRL's SFTTrainer with packing, one case after another: prints one JSON line per case.

Usage: python trl_packing_side.py CASES.json [liger]
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from cases import run_cases
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer


class Clock(TrainerCallback):
    """Seconds and loss of each step, after the device has finished."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []

    def on_step_begin(self, *args: object, **kwargs: object) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, *args: object, **kwargs: object) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.began)

    def on_log(self, *args: object, logs: dict[str, float] | None = None, **kwargs: object) -> None:
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))


def train(case: dict[str, Any]) -> dict[str, Any]:
    """Return seconds and loss of each step, and the rows per step."""
    full = case["adaptation"] == "full"
    # Trained weights in float32 under autocast, which `bf16` expects; frozen weights in bfloat16.
    model = AutoModelForCausalLM.from_pretrained(
        case["network"],
        dtype=torch.float32 if full else torch.bfloat16,
        attn_implementation="sdpa",
    )
    lines = Path(case["rows"]).read_text().splitlines()
    clock = Clock()
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    with tempfile.TemporaryDirectory() as scratch:
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                output_dir=scratch,
                max_steps=case["steps"],
                learning_rate=case["rate"],
                lr_scheduler_type="cosine",
                warmup_steps=0,
                logging_steps=1,
                report_to=[],
                save_strategy="no",
                bf16=True,
                use_cpu=not torch.cuda.is_available(),
                packing=True,
                max_length=case["pack"],
                per_device_train_batch_size=case["packs"],
                gradient_checkpointing=False,
                use_liger_kernel="liger" in sys.argv[2:],
                seed=0,
            ),
            train_dataset=Dataset.from_list([json.loads(line) for line in lines]),
            processing_class=AutoTokenizer.from_pretrained(case["network"]),
            peft_config=None if full else lora,
            callbacks=[clock],
        )
        packs = len(trainer.train_dataset)
        trainer.train()
    return {
        "seconds": clock.seconds,
        "losses": clock.losses,
        "rows_per_step": case["packs"] * len(lines) / packs,
        "memory_bytes": 0,
    }


run_cases(train)
