"""Classifier of texts or of words by the Hugging Face Trainer, in float32, from given weights.

Usage: python reading_side.py FOLDER TRAIN.jsonl TEST.jsonl EPOCHS RATE

FOLDER has the network with its head; its configuration names the labels. Prints the loss of each
step and the prediction for each test row.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import defaultdict
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, Trainer, TrainingArguments

from peer import SETTINGS


def examples(rows: list[dict[str, Any]], tokenizer: Any, place: dict[str, int]) -> list[Any]:
    place = defaultdict(int, place)  # of test rows, labels are not looked at
    made = []
    for row in rows:
        if "text" in row:
            ids = tokenizer(row["text"])["input_ids"]
            made.append({"input_ids": ids, "labels": place[row["label"]]})
            continue
        encoded = tokenizer(row["tokens"], is_split_into_words=True)
        words = encoded.word_ids()
        first = [word is not None and word != words[i - 1] for i, word in enumerate(words)]
        pairs = zip(words, first, strict=True)
        labels = [place[row["tags"][word]] if new else -100 for word, new in pairs]
        made.append({"input_ids": encoded["input_ids"], "labels": labels})
    return made


class Recording(Trainer):
    """A Trainer that stores each step's loss with all digits."""

    losses: list[float]

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss: Any = super().compute_loss(*args, **kwargs)
        self.losses.append(float(loss.detach()))
        return loss


@torch.no_grad()
def answers(model: Any, rows: list[Any], names: dict[int, str]) -> list[Any]:
    found = list[Any]()
    for row in rows:
        best = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].argmax(-1)
        if isinstance(row["labels"], int):
            found.append({"label": names[int(best)]})
        else:
            pairs = zip(best.tolist(), row["labels"], strict=True)
            found.append({"tags": [names[index] for index, label in pairs if label >= 0]})
    return found


def main() -> None:
    folder, train, test, epochs, rate = sys.argv[1:6]
    torch.set_num_threads(1)
    config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    sides = []
    for source in (train, test):
        with open(source, encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        sides.append(examples(rows, tokenizer, config.label2id))
    words = config.architectures[0].endswith("ForTokenClassification")
    kind = "TokenClassification" if words else "SequenceClassification"
    model = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(folder)
    collator = "DataCollatorForTokenClassification" if words else "DataCollatorWithPadding"
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Recording(
            model=model,
            args=TrainingArguments(
                output_dir=scratch,
                num_train_epochs=float(epochs),
                per_device_train_batch_size=16,
                learning_rate=float(rate),
                **{**SETTINGS, "bf16": False},
            ),
            train_dataset=sides[0],
            data_collator=getattr(transformers, collator)(tokenizer),
        )
        trainer.losses = []
        trainer.train()
    said = answers(model.eval(), sides[1], config.id2label)
    print(json.dumps({"losses": trainer.losses, "answers": said}))


main()
