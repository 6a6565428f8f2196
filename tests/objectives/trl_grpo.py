"""TRL's GRPO losses of given log-probabilities. Runs in TRL's environment: tensors in, numbers out.

Usage: python trl_grpo.py < JSON
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
from trl import GRPOTrainer


class Accelerator:
    """A single process, so that nothing is gathered."""

    num_processes = 1

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def reduce(self, tensor: torch.Tensor, reduction: str) -> torch.Tensor:
        return tensor


def trainer_of(case: dict[str, Any], logp: torch.Tensor) -> GRPOTrainer:
    trainer = GRPOTrainer.__new__(GRPOTrainer)
    settings = {
        "beta": case["beta"],
        "epsilon_low": case["epsilon"],
        "epsilon_high": case["epsilon_high"],
        "loss_type": case["loss_type"],
        "max_completion_length": case["max_completion_length"],
        "importance_sampling_level": "token",
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "use_vllm": False,
        "aux_loss_enabled": False,
        "_entropy_bonus_enabled": False,
        "current_gradient_accumulation_steps": 1,
        "model": SimpleNamespace(training=True),
        "accelerator": Accelerator(),
        "args": SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        "_metrics": defaultdict(lambda: defaultdict(list)),
        "_get_per_token_logps_and_entropies": lambda *a, **k: (logp, torch.zeros_like(logp), None),
    }
    for name, value in settings.items():
        object.__setattr__(trainer, name, value)
    return trainer


def main() -> None:
    given = json.load(sys.stdin)
    tensors = {name: torch.tensor(value) for name, value in given["tensors"].items()}
    found = []
    for case in given["cases"]:
        logp = tensors["logp"].clone().requires_grad_()
        mask = tensors["mask"].int()
        ids = torch.zeros_like(mask)
        inputs = {
            "prompt_ids": ids[:, :1],
            "prompt_mask": torch.ones_like(ids[:, :1]),
            "completion_ids": ids,
            "completion_mask": mask,
            "advantages": tensors["advantages"],
            "old_per_token_logps": tensors["old"],
            "ref_per_token_logps": tensors["reference"],
            "num_items_in_batch": mask.sum(),
        }
        loss = GRPOTrainer._compute_loss(trainer_of(case, logp), None, inputs)
        (gradient,) = torch.autograd.grad(loss, logp)
        found.append({"loss": float(loss.detach()), "gradient": gradient.tolist()})
    print(json.dumps(found))


main()
