"""Classifier of the Hugging Face Trainer with all layers, half of the layers, or the head alone.

Usage: python classify_side.py MODEL ROWS.jsonl EPOCHS CASE RATE
"""

from __future__ import annotations

import json
import sys
import tempfile

from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from peer import SETTINGS, Clock


def main() -> None:
    folder, source, epochs, case, rate = sys.argv[1:6]
    with open(source, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    labels = sorted({row["label"] for row in rows})
    tokenizer = AutoTokenizer.from_pretrained(folder)
    data = Dataset.from_list(
        [
            {"input_ids": tokenizer(row["text"])["input_ids"], "labels": labels.index(row["label"])}
            for row in rows
        ]
    )
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(labels))
    frozen = {"full": 0, "freeze 50 % bottom": 3, "feature extraction": 6}[case]
    if frozen:
        model.bert.embeddings.requires_grad_(False)
    for layer in model.bert.encoder.layer[:frozen]:
        layer.requires_grad_(False)
    with tempfile.TemporaryDirectory() as scratch:
        clock = Clock()
        Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=scratch,
                num_train_epochs=float(epochs),
                per_device_train_batch_size=16,
                learning_rate=float(rate),
                **SETTINGS,
            ),
            train_dataset=data,
            data_collator=DataCollatorWithPadding(tokenizer),
            callbacks=[clock],
        ).train()
    print(json.dumps({"seconds": clock.seconds, "losses": clock.losses}))


main()
