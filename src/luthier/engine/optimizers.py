"""AdamW with float32 master weights.

A trained weight lives twice: in the type the network computes with, and as a float32 master that
the optimizer moves. Updates of 1e-5 vanish in bfloat16, whose next number after 1 is 1.0078; trained
without masters, full fine-tuning ends at a visibly worse loss. The copy is rounded stochastically: to
nearest, it would stay at the base weight until the master has moved by half a spacing. Where the
network computes in float32 the weight is its own master.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from luthier.errors import Diverged
from luthier.models.rounding import Rounding

if TYPE_CHECKING:
    from luthier.recipe import Training


class MasterAdamW:
    """AdamW (Loshchilov & Hutter 2019) over float32 masters of the weights that train.

    Weight decay applies to matrices only, not to norms and biases.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], training: Training) -> None:
        self.weights = {name: weight for name, weight in named if weight.requires_grad}
        self.masters = {
            name: weight.data if weight.dtype == torch.float32 else weight.data.float()
            for name, weight in self.weights.items()
        }
        self._sums: dict[str, Tensor] = {}
        groups: list[dict[str, Any]] = [
            {"params": [m for m in self.masters.values() if m.dim() > 1]},
            {"params": [m for m in self.masters.values() if m.dim() < 2], "weight_decay": 0.0},
        ]
        self._adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=training.learning_rate or 0.0,
            betas=(training.beta1, training.beta2),
            eps=training.epsilon,
            weight_decay=training.weight_decay,
            fused=True,
        )
        self._max_norm = training.max_gradient_norm

    def collect(self) -> None:
        """Add the network's gradients to the float32 sums, and free them.

        Called after each micro-batch, so that sums over many of them do not round in bfloat16.
        """
        for name, weight in self.weights.items():
            if weight.grad is None:
                continue
            if name in self._sums:
                self._sums[name] += weight.grad
            else:
                self._sums[name] = weight.grad.float()
            weight.grad = None

    def step(self, learning_rate: float) -> float:
        """Clip, move the masters, copy them to the network; returns the gradient norm."""
        for name, master in self.masters.items():
            master.grad = self._sums.get(name)
        norm = nn.utils.clip_grad_norm_(
            self.masters.values(), self._max_norm or float("inf"), foreach=True
        )
        if not torch.isfinite(norm):
            raise Diverged(
                "a gradient is no longer finite. Lower the learning rate, or look for rows with "
                "extreme content; the last checkpoint is from before this step."
            )
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)
        self._sums.clear()
        self._publish()
        return float(norm)

    def state(self) -> dict[str, Tensor]:
        """All tensors that an exact resume needs, by name."""
        tensors = {f"master.{name}": master for name, master in self.masters.items()}
        for name, master in self.masters.items():
            for key, value in self._adamw.state[master].items():
                tensors[f"{key}.{name}"] = value
        return tensors

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Set masters, moments and the network's weights to a saved :meth:`state`."""
        for name, master in self.masters.items():
            master.copy_(tensors[f"master.{name}"])
            for key in ("step", "exp_avg", "exp_avg_sq"):
                if f"{key}.{name}" in tensors:
                    self._adamw.state[master][key] = tensors[f"{key}.{name}"].to(
                        "cpu" if key == "step" and master.device.type == "cpu" else master.device
                    )
        self._publish()

    def _publish(self) -> None:
        rounding = Rounding()
        for name, weight in self.weights.items():
            if weight.dtype != torch.float32:
                rounding.into(weight.data, self.masters[name])
