"""GRPO with a real reward: SMS spam, classified with one exact word.

The base model never generates the format. A first tuning on 48 replies teaches the format. GRPO
then uses the right word as its only reward, on 432 other messages. The test has 200 unseen
messages, half of them spam.

    python benchmarks/grpo_reward.py DATA/sms_spam
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path

import luthier

ASK = "Is this text message spam or ham? Answer with one word in lower case: spam or ham."
FIRST = 48


def asked(path: Path, count: int, rng: random.Random) -> list[dict[str, str]]:
    rows = [json.loads(line) for line in path.read_text().split("\n") if line]
    chosen = []
    for label in ("spam", "ham"):
        some = [row for row in rows if row["label"] == label]
        rng.shuffle(some)
        chosen += some[: count // 2]
    rng.shuffle(chosen)
    return [
        {"prompt": f"Message:\n{row['text']}\n\n{ASK}", "expected": row["label"]} for row in chosen
    ]


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="folder with train.jsonl and test.jsonl")
    parser.add_argument("--steps", type=int, default=90)
    given = parser.parse_args()
    rng = random.Random(3)
    train = asked(given.data / "train.jsonl", 480, rng)
    test = asked(given.data / "test.jsonl", 200, rng)
    with tempfile.TemporaryDirectory() as folder:
        held = write(Path(folder) / "held.jsonl", test)
        first = [{"prompt": row["prompt"], "completion": row["expected"]} for row in train[:FIRST]]
        sft = luthier.tune(
            write(Path(folder) / "first.jsonl", first), name="spam-form", training__epochs=1,
            training__batch_size=8, data__validation_share=0,
        )  # fmt: skip
        grpo = luthier.tune(
            write(Path(folder) / "prompts.jsonl", train[FIRST:]), base=sft.model_id, name="spam-grpo",
            data__validation=held, objective__method="grpo", objective__max_completion_tokens=6,
            objective__num_generations=8, objective__beta=0.0, objective__grader__method="exact",
            training__batch_size=8, training__max_steps=given.steps, training__evaluate_every=15,
            training__patience=0,
        )  # fmt: skip
        for line in (Path(grpo.run_dir) / "metrics.jsonl").read_text().splitlines():
            event = json.loads(line)
            if event["event"] == "validation":
                print(f"step {event['step']:3}: held-out reward {event['reward']:.3f}")
        for model in (sft.model_id, grpo.model_id):
            found = luthier.evaluate(model, held, graders=["exact"], max_tokens=6)
            print(
                f"{model}: {found.scores['exact']:.1%} of {len(found.rows)} greedy answers are right"
            )


if __name__ == "__main__":
    main()
