"""sentence-transformers on the rows of ``retrieval_vs_sentence_transformers.py``.

Usage: python retrieval_side.py MODEL ROWS.jsonl STEPS BATCH RATE
"""

from __future__ import annotations

import json
import sys
import tempfile

from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch.utils.data import BatchSampler, SequentialSampler

from peer import SETTINGS, Clock


def rows_in_order(dataset: Dataset, batch_size: int, **_: object) -> BatchSampler:
    return BatchSampler(SequentialSampler(dataset), batch_size, drop_last=True)


def main() -> None:
    folder, path, steps, batch, rate = sys.argv[1:6]
    with open(path, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    model = SentenceTransformer(folder, device="cpu")
    for module in model.modules():
        if hasattr(module, "p"):
            module.p = 0.0  # equal losses need a network without dropout
    columns = {
        "anchor": [row["query"] for row in rows],
        "positive": [row["positive"] for row in rows],
        "negative": [row["negatives"][0] for row in rows],
    }
    clock = Clock()
    with tempfile.TemporaryDirectory() as scratch:
        SentenceTransformerTrainer(
            model=model,
            args=SentenceTransformerTrainingArguments(
                output_dir=scratch,
                max_steps=int(steps),
                per_device_train_batch_size=int(batch),
                learning_rate=float(rate),
                weight_decay=0.0,
                seed=0,
                batch_sampler=rows_in_order,
                **SETTINGS,
            ),
            train_dataset=Dataset.from_dict(columns),
            loss=MultipleNegativesRankingLoss(model),
            callbacks=[clock],
        ).train()
    print(json.dumps({"seconds": clock.seconds, "losses": clock.losses}))


main()
