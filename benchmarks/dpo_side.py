"""TRL's side of the comparison: DPOTrainer as published, run in its own environment.

Usage: python dpo_side.py MODEL ROWS.jsonl STEPS SETTING RATE
where SETTING is defaults or best.
"""

from __future__ import annotations

import json
import sys
import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from peer import SETTINGS, Clock


def main() -> None:
    folder, rows, steps, setting, rate = sys.argv[1:6]
    best = setting == "best"
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16 if best else torch.float32
    )
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    with open(rows, encoding="utf-8") as file:
        data = Dataset.from_list([json.loads(line) for line in file])
    batches = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    with tempfile.TemporaryDirectory() as scratch:
        config = DPOConfig(
            output_dir=scratch,
            max_steps=int(steps),
            learning_rate=float(rate),
            max_length=None,
            beta=0.1,
            seed=0,
            **SETTINGS,
            **(batches if best else {"per_device_train_batch_size": 8}),
        )
        clock = Clock()
        trainer = DPOTrainer(
            model=model,
            args=config,
            train_dataset=data,
            processing_class=AutoTokenizer.from_pretrained(folder),
            peft_config=lora,
            callbacks=[clock],
        )
        trainer.train()
    print(json.dumps({"seconds": clock.seconds, "losses": clock.losses}))


main()
