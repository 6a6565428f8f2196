"""TRL's GKDTrainer with default code, in a separate environment.

Usage: python gkd_side.py STUDENT TEACHER ROWS.jsonl STEPS CASE RATE where CASE is lora or full.
"""

from __future__ import annotations

import json
import sys

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.experimental.gkd import GKDConfig, GKDTrainer

from peer import train


def main() -> None:
    student, teacher, rows, steps, case, rate = sys.argv[1:7]
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    frozen = torch.bfloat16 if case == "lora" else torch.float32
    with open(rows, encoding="utf-8") as file:
        data = Dataset.from_list([json.loads(line) for line in file])
    settings = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "max_length": 1024,
        "lmbda": 0.0,
        "beta": 0.0,
        "temperature": 1.0,
        "gradient_checkpointing": False,
    }
    train(
        GKDTrainer,
        GKDConfig,
        steps,
        rate,
        settings,
        model=AutoModelForCausalLM.from_pretrained(student, dtype=frozen),
        teacher_model=AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.bfloat16),
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(student),
        peft_config=lora if case == "lora" else None,
    )


main()
