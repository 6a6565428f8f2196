"""TRL's SFTTrainer with default code, in a separate environment.

Usage: python trl_side.py MODEL ROWS.jsonl STEPS SETTING RATE where SETTING is lora-defaults,
lora-best, full-defaults or full-best.
"""

from __future__ import annotations

import json
import sys

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from peer import train


def main() -> None:
    folder, rows, steps, setting, rate = sys.argv[1:6]
    adapt, kind = setting.split("-")
    best = kind == "best"
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16 if best else torch.float32
    )
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    with open(rows, encoding="utf-8") as file:
        data = Dataset.from_list([json.loads(line) for line in file])
    batches = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
    train(
        SFTTrainer,
        SFTConfig,
        steps,
        rate,
        {"max_length": None, **(batches if best else {"per_device_train_batch_size": 16})},
        model=model,
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=lora if adapt == "lora" else None,
    )


main()
