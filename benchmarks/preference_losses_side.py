"""TRL's losses and gradients on given token ids, in TRL's environment.

Usage: python preference_losses_side.py POLICY REFERENCE REWARD ROWS.json where ROWS.json has
{"prompt", "chosen", "rejected"} as lists of token ids, and the folders are Hugging Face
directories. Prints the loss and the gradient norm of each method.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

PAIRS = [{"prompt": "a b", "chosen": "c d", "rejected": "e"}] * 4
THUMBS = [{"prompt": "a b", "completion": "c d", "label": n % 2 == 0} for n in range(4)]
DPO: dict[str, dict[str, Any]] = {
    "sigmoid": {"loss_type": ["sigmoid"]},
    "hinge": {"loss_type": ["hinge"]},
    "ipo": {"loss_type": ["ipo"]},
    "length_normalised": {"loss_type": ["sigmoid_norm"]},
    "sft": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
}


def padded(sides: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
    """Return prompts with replies, padded on the right, with the masks of tokens and of replies."""
    longest = max(len(prompt) + len(answer) for prompt, answer in sides)
    ids = [[*p, *a] + [0] * (longest - len(p) - len(a)) for p, a in sides]
    there = [[1] * (len(p) + len(a)) + [0] * (longest - len(p) - len(a)) for p, a in sides]
    answer = [[0] * len(p) + [1] * len(a) + [0] * (longest - len(p) - len(a)) for p, a in sides]
    names = ("input_ids", "attention_mask", "completion_mask")
    return {n: torch.tensor(v) for n, v in zip(names, (ids, there, answer), strict=True)}


def options(scratch: str) -> dict[str, Any]:
    return {"output_dir": scratch, "report_to": [], "use_cpu": True, "bf16": False, "beta": 0.1}


def measured(model: Any, loss: torch.Tensor) -> dict[str, float]:
    model.zero_grad()
    loss.backward()
    total = sum(
        float(w.grad.double().square().sum()) for w in model.parameters() if w.grad is not None
    )
    return {"loss": float(loss.detach()), "gradient_norm": total**0.5}


def main() -> None:
    policy, reference, reward, rows = sys.argv[1:5]
    pairs = json.loads(Path(rows).read_text())
    tokenizer = AutoTokenizer.from_pretrained(policy)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    sides = [(p["prompt"], p[side]) for side in ("chosen", "rejected") for p in pairs]
    found: dict[str, Any] = {}

    def load(folder: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    with tempfile.TemporaryDirectory() as scratch:
        shared: dict[str, Any] = {"processing_class": tokenizer}
        for name, fields in DPO.items():
            trainer = DPOTrainer(
                model=load(policy),
                ref_model=load(reference),
                args=DPOConfig(**options(scratch), **fields),
                train_dataset=Dataset.from_list(PAIRS),
                **shared,
            )
            loss = trainer._compute_loss(trainer.model, padded(sides), False)
            found[f"dpo {name}"] = measured(trainer.model, loss)
        found["kto"] = kto(load(policy), load(reference), sides, options(scratch), shared)
        trainer = ORPOTrainer(
            model=load(policy),
            args=ORPOConfig(**options(scratch)),
            train_dataset=Dataset.from_list(PAIRS),
            **shared,
        )
        found["odds_ratio"] = odds_ratio(trainer, pairs)
        plain = {k: v for k, v in options(scratch).items() if k != "beta"}
        model = AutoModelForSequenceClassification.from_pretrained(reward, dtype=torch.float32)
        trainer = RewardTrainer(
            model=model,
            args=RewardConfig(**plain, center_rewards_coefficient=0.01),
            train_dataset=Dataset.from_list(PAIRS),
            **shared,
        )
        batch = padded(sides)
        batch.pop("completion_mask")
        # transformers reads the last token that does not fill up, which must not be the end of a turn.
        trainer.model.config.pad_token_id = 0
        batch["margin"] = torch.full((len(pairs),), 0.3)
        found["reward_model"] = measured(trainer.model, trainer.compute_loss(trainer.model, batch))
    print(json.dumps(found))


def kto(
    model: Any,
    reference: Any,
    sides: list[tuple[list[int], list[int]]],
    fields: dict[str, Any],
    shared: dict[str, Any],
) -> dict[str, float]:
    """Return KTO's losses: chosen replies first, all desirable; the KL pair is the reply of the
    previous row."""
    trainer = KTOTrainer(
        model=model,
        ref_model=reference,
        args=KTOConfig(**fields, desirable_weight=1.0, undesirable_weight=1.5,
                       train_sampling_strategy="sequential"),
        train_dataset=Dataset.from_list(THUMBS),
        **shared,
    )  # fmt: skip
    shifted = [(p, sides[n - 1][1]) for n, (p, _) in enumerate(sides)]
    batch = padded(sides)
    batch |= {f"KL_{name}": value for name, value in padded(shifted).items()}
    count = len(sides)
    batch["label"] = torch.tensor([n < count // 2 for n in range(count)])
    return measured(trainer.model, trainer._compute_loss(trainer.model, batch, False))


def odds_ratio(trainer: Any, pairs: list[dict[str, list[int]]]) -> dict[str, float]:
    """Return the mean of ORPO's second term. TRL's first term trains on the prompt, unlike the
    paper."""
    batch: dict[str, Any] = {}
    for side in ("chosen", "rejected"):
        made = padded([(pair["prompt"], pair[side]) for pair in pairs])
        batch[f"{side}_input_ids"] = made["input_ids"]
        batch[f"{side}_attention_mask"] = made["attention_mask"]
        batch[f"{side}_labels"] = made["input_ids"].masked_fill(made["completion_mask"] == 0, -100)
    with torch.no_grad():
        chosen, rejected = trainer.concatenated_forward(trainer.model, batch)[:2]
        losses = trainer.odds_ratio_loss(chosen, rejected)[0]
    return {"loss": -float(losses.mean())}


main()
