"""TRL's DPOTrainer or RewardTrainer with default code, in a separate environment.

Usage: python preferences_side.py OBJECTIVE MODEL ROWS.jsonl STEPS SETTING RATE where OBJECTIVE is
dpo or reward_model, and SETTING is defaults or best.
"""

from __future__ import annotations

import json
import sys

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

from peer import train


def main() -> None:
    objective, folder, rows, steps, setting, rate = sys.argv[1:7]
    best, learns_rewards = setting == "best", objective == "reward_model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    dtype = torch.bfloat16 if best else torch.float32
    if learns_rewards:
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=1, dtype=dtype
        )
        model.config.pad_token_id = tokenizer.pad_token_id
        task, config_of, trainer_of, own = "SEQ_CLS", RewardConfig, RewardTrainer, {}
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        task, config_of, trainer_of, own = "CAUSAL_LM", DPOConfig, DPOTrainer, {"beta": 0.1}
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type=task)
    with open(rows, encoding="utf-8") as file:
        data = Dataset.from_list([json.loads(line) for line in file])
    batches = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    train(
        trainer_of,
        config_of,
        steps,
        rate,
        {"max_length": None, **own, **(batches if best else {"per_device_train_batch_size": 8})},
        model=model,
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=lora,
    )


main()
