"""Continued pre-training of all weights at 512 tokens by the Hugging Face Trainer.

Usage: python hf_side.py MODEL TEXT.jsonl STEPS RATE
"""

from __future__ import annotations

import json
import sys
import tempfile

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from peer import SETTINGS, Clock


def main() -> None:
    folder, source, steps, rate = sys.argv[1:5]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    stream: list[int] = []
    with open(source, encoding="utf-8") as file:
        for line in file:
            stream += [*tokenizer.encode(json.loads(line)["text"]), tokenizer.eos_token_id]
    pieces = [stream[i : i + 512] for i in range(0, 512 * 4 * int(steps), 512)]
    data = Dataset.from_list([{"input_ids": ids, "labels": ids} for ids in pieces])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as scratch:
        clock = Clock()
        Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=scratch,
                max_steps=int(steps),
                per_device_train_batch_size=4,
                learning_rate=float(rate),
                **SETTINGS,
            ),
            train_dataset=data,
            data_collator=default_data_collator,
            callbacks=[clock],
        ).train()
    print(json.dumps({"seconds": clock.seconds, "losses": clock.losses}))


main()
