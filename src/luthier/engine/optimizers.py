"""AdamW and Adam with float32 master weights.

Each trained weight exists twice: in the network's type, and as a float32 master that the optimizer
moves. Updates of 1e-5 vanish in bfloat16, whose next number after 1 is 1.0078; without masters,
full fine-tuning ends at a visibly worse loss. The copy is rounded stochastically. With rounding to
nearest, the copy would stay at the base weight until the master has moved by half a spacing. If the
network computes in float32, the weight is the master.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from luthier.engine.embedding_rows import (
    GRADIENT,
    MASTER,
    MOMENTS,
    EmbeddingRows,
    whole_tables,
)
from luthier.errors import Diverged
from luthier.models.networks.layers import layer_positions
from luthier.models.process_group import ALONE, ProcessGroup
from luthier.models.rounding import Rounding
from luthier.models.sharding import (
    full_tensor,
    gather_to_first,
    is_sharded,
    local_shard,
    shard_like,
)

if TYPE_CHECKING:
    from luthier.recipe import Training


WARMUP_SHARE = 0.05
RISE_SHARE = 0.45
"""Share of a ``one_cycle`` run with a rising rate. The fall takes equally long; a tenth remains."""
CYCLE_START = 1 / 25
"""Factor at both ends of the cycle, as in fastai and PyTorch."""


_ROWS = "rows"
"""Key of the row numbers of an embedding table in the saved state."""


class MasterAdamW:
    """AdamW (Loshchilov & Hutter 2019) over float32 masters of the trained weights.

    - With ``training.optimizer = "adam"``, the weight decay is part of the gradient, as in Adam
      (Kingma & Ba 2015).
    - Weight decay applies to matrices only, not to norms and biases.
    - If ``training.layer_decay`` is below 1, ``layers`` names the blocks from bottom to top (see
      :func:`rate_shares`).
    - Weights named in ``heads`` train at ``training.head_rate_multiplier`` times the rate.
    - Of weights that are sharded over ``processes``, the optimizer stores the shard of this
      process.
    - Of ``tables`` (:func:`~luthier.engine.embedding_rows.embedding_tables`), the optimizer stores
      the rows with a gradient so far. Requires one process and no weight decay.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        training: Training,
        layers: Sequence[str] = (),
        heads: Collection[str] = (),
        processes: ProcessGroup = ALONE,
        tables: Collection[str] = (),
    ) -> None:
        if tables and (training.weight_decay or processes.size > 1):
            raise ValueError("`tables` requires one process and no weight decay")
        everything = dict(named)
        self.weights = {n: weight for n, weight in everything.items() if weight.requires_grad}
        self._tables = {n: EmbeddingRows(self.weights[n].data) for n in tables}
        # `float()` returns a float32 weight itself, so weight and master are then one tensor.
        self.masters = {
            n: self._tables[n][MASTER] if n in self._tables else local_shard(w.data).float()
            for n, w in self.weights.items()
        }
        self._processes = processes
        self._sums: dict[str, Tensor] = {}
        shares = rate_shares(everything, layers, training.layer_decay)
        shares |= {
            n: shares[n] * (training.head_rate_multiplier or 1.0) for n in heads if n in shares
        }
        self.shares = {name: shares[name] for name in self.weights}
        """Factor of the learning rate of each trained weight."""
        self._groups = _groups(self.masters, shares, training.weight_decay)
        self._is_decoupled = training.optimizer == "adamw"
        self._beta1, self._beta2 = training.beta1, training.beta2
        self._epsilon = training.epsilon
        self._state: dict[str, dict[str, Tensor]] = {}
        """State per weight with a gradient so far: ``step``, ``exp_avg`` and ``exp_avg_sq``, as in
        PyTorch."""
        self._max_norm = training.max_gradient_norm

    def collect(self) -> None:
        """Add the network's gradients to the float32 sums and free the gradients.

        Called after each micro-batch, so that sums over many micro-batches do not round in
        bfloat16.
        """
        for name, weight in self.weights.items():
            if weight.grad is None:
                continue
            gradient = local_shard(weight.grad)
            if (table := self._tables.get(name)) is not None:
                table.add(gradient)
                self._sums[name] = table[GRADIENT]
                # The fused kernel requires `step` on the device of the weight.
                self._state.setdefault(name, {"step": torch.zeros((), device=gradient.device)})
                self._update_views(name, table)
            elif name in self._sums:
                self._sums[name] += gradient
            else:
                self._sums[name] = gradient.float()
            weight.grad = None

    def _update_views(self, name: str, table: EmbeddingRows) -> None:
        """Update the views of master and moments after the table has grown."""
        self.masters[name] = table[MASTER]
        if name in self._state:
            self._state[name] |= {moment: table[moment] for moment in MOMENTS}

    def add_up(self) -> None:
        """Sum the gradients of all processes. Weights without a gradient in every process stay
        without.

        Gradients of sharded weights are summed during the backward pass.
        """
        processes = self._processes
        if processes.size == 1:
            return
        present = {name for each in processes.gather([*self._sums]) for name in each}
        for name in present - self._sums.keys():
            # An all-reduce needs the same tensors in every process; a missing gradient is 0.
            self._sums[name] = torch.zeros_like(self.masters[name])
        # Order of `weights`, not of `present`: every process must reduce in the same order.
        added = [n for n, weight in self.weights.items() if n in present and not is_sharded(weight)]
        processes.add_up([self._sums[name] for name in added])

    def step(self, learning_rate: float) -> float:
        """Clip the gradients, move the masters, copy the masters to the network, and return the
        gradient norm."""
        # The norm covers all weights before any weight moves, as in torch's clip_grad_norm_.
        norm = self._norm()
        # One non-finite gradient makes the norm non-finite, so one check covers all weights.
        if not torch.isfinite(norm):
            raise Diverged("the gradient is not finite")
        if self._max_norm and norm > self._max_norm:
            for name, gradient in self._sums.items():
                # `clip_grads_with_norm_` scales the `grad` of its parameters in place.
                self.masters[name].grad = gradient
            nn.utils.clip_grads_with_norm_(
                self.masters.values(), self._max_norm, norm, foreach=True
            )
            for name in self._sums:
                self.masters[name].grad = None
        for group in self._groups:
            self._move(group, learning_rate * group.share)
        for name in self._tables.keys() & self._sums.keys():
            # The sums of a table are a view of its buffer, so dropping the view is not enough.
            self._tables[name].clear()
        self._sums.clear()
        self.publish()
        return float(norm)

    def _move(self, group: _Group, rate: float) -> None:
        """Move the masters of ``group`` with a gradient."""
        # Weights without a gradient keep their moments, as in torch.optim.AdamW.
        names = [name for name in group.names if name in self._sums]
        for name in names:
            if name not in self._state:
                master = self.masters[name]
                self._state[name] = {
                    "step": torch.zeros((), device=master.device),
                    **{moment: torch.zeros_like(master) for moment in MOMENTS},
                }
        states = [self._state[name] for name in names]
        # The function, because the class `torch.optim.AdamW` imports torch's compiler in 0.55 s
        # (docs/log/engine.md).
        adam(
            [self.masters[name] for name in names],
            [self._sums[name] for name in names],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            decoupled_weight_decay=self._is_decoupled,
            amsgrad=False,
            maximize=False,
            lr=rate,
            beta1=self._beta1,
            beta2=self._beta2,
            eps=self._epsilon,
            weight_decay=group.weight_decay,
        )

    def _norm(self) -> Tensor:
        whole, parts = list[Tensor](), list[Tensor]()
        for name, weight in self.weights.items():
            if name in self._sums:
                (parts if is_sharded(weight) else whole).append(self._sums[name])
        norm = nn.utils.get_total_norm(whole, foreach=True)
        if parts:
            # |g|^2 = |g_whole|^2 + sum over processes p of |g_p|^2, because shards are disjoint.
            own = float(nn.utils.get_total_norm(parts, foreach=True))
            norm = torch.tensor(math.hypot(float(norm), math.sqrt(self._processes.sum(own**2))))
        return norm

    @property
    def bytes(self) -> int:
        """Size of the masters and moments of this process, in bytes."""
        # The master and both moments have equal sizes.
        return 3 * sum(master.nbytes for master in self.masters.values())

    def state(self) -> dict[str, Tensor]:
        """Return all tensors for an exact resume, by name.

        A collective call. Only the first process receives sharded weights, as whole tensors.
        """
        parts = []
        for name, master in self.masters.items():
            values = {MASTER: master, **self._state.get(name, {})}
            if (table := self._tables.get(name)) is not None:
                # A resume must keep the order of the rows, in which the norm is summed.
                values |= {_ROWS: table.ids}
            parts += [(f"{key}.{name}", value, self.weights[name]) for key, value in values.items()]
        return gather_to_first(parts)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Set masters, moments and the network's weights to a saved :meth:`state`.

        The network must be as before step 1, because checkpoints omit table rows that did not move.
        The number of processes may differ from the saved run, so a table may change between whole
        and by rows.
        """
        for name, master in self.masters.items():
            weight = self.weights[name]
            keys = [key for key in (MASTER, *MOMENTS) if f"{key}.{name}" in tensors]
            values = {key: tensors[f"{key}.{name}"] for key in keys}
            ids = tensors.get(f"{_ROWS}.{name}")
            state: dict[str, Tensor] = {}
            if f"step.{name}" in tensors:
                state["step"] = tensors[f"step.{name}"].to(master.device, copy=True)
            if (table := self._tables.get(name)) is not None:
                if ids is None:
                    table.restore_whole(values)
                else:
                    table.restore(ids, values)
            else:
                if ids is not None:
                    whole = full_tensor(local_shard(weight.data), weight)
                    values = whole_tables(ids, values, whole)
                master.copy_(shard_like(values.pop(MASTER), weight))
                for key, value in values.items():
                    # The fused kernel walks all tensors in memory order. Channels-last masters of
                    # convolutions differ in this order from tensors of a file.
                    state[key] = torch.empty_like(master).copy_(shard_like(value, weight))
            if state:
                self._state[name] = state
            if table is not None:
                self._update_views(name, table)
        self.publish()

    def publish(self) -> None:
        """Copy the masters to the network's weights."""
        rounding = Rounding()
        # The noise continues from weight to weight, and shards differ in length. Whole weights come
        # first, because replicated weights must be rounded alike in all processes.
        for name, weight in sorted(self.weights.items(), key=lambda each: is_sharded(each[1])):
            if name in self._tables:
                self._tables[name].publish(rounding)
            elif weight.dtype != torch.float32:
                rounding.into(local_shard(weight.data), self.masters[name])


def rate_shares(names: Iterable[str], layers: Sequence[str], decay: float) -> dict[str, float]:
    """Return the learning rate factor of each weight with layer-wise decay.

    - Above the layers (heads, the last norm): 1.
    - Layer ``i``, counted from the top starting with 1: ``decay ** i``.
    - Below all ``L`` layers (embeddings): ``decay ** (L + 1)``.

    Lower layers contain general features and need to move less. Howard & Ruder 2018,
    arXiv:1801.06146 (1/2.6 per layer); Clark et al. 2020, arXiv:2003.10555, appendix B (0.8 and
    0.9). A tied output head trains as the embedding. ``names`` are all weights in network order,
    including frozen weights, because weights before the first layer count as below.
    """
    if decay == 1 or not layers:
        return dict.fromkeys(names, 1.0)
    # Position 0 is below all layers, `top` is above: the exponent counts layers from the top.
    top = len(layers) + 1
    return {name: decay ** (top - at) for name, at in layer_positions(names, layers).items()}


@dataclass(frozen=True)
class _Group:
    """Weights with the same learning rate factor and weight decay."""

    names: list[str]
    share: float
    """Factor of the learning rate."""
    weight_decay: float


def _groups(
    masters: Mapping[str, Tensor], shares: Mapping[str, float], weight_decay: float
) -> list[_Group]:
    groups: dict[tuple[bool, float], list[str]] = {}
    for name, master in masters.items():
        groups.setdefault((master.dim() < 2, shares[name]), []).append(name)
    return [
        _Group(names, share, 0.0 if vector else weight_decay)
        for (vector, share), names in sorted(groups.items(), key=lambda item: item[0])
    ]


def schedule_factor(
    schedule: str,
    step: int,
    steps: int,
    warmup_ratio: float | None = None,
    warmup_steps: int | None = None,
    step_size: int | None = None,
    step_factor: float | None = None,
) -> float:
    """Return the learning rate factor for the 0-based optimizer step ``step`` of ``steps``.

    Linear warm-up over ``warmup_steps``, or over ``warmup_ratio`` of the steps (default
    ``WARMUP_SHARE``), followed by the schedule:

    - ``cosine`` or ``linear``: to zero at the end.
    - ``constant``: 1.
    - ``step``: multiplied by ``step_factor`` (default 0.1) after every ``step_size`` steps
      (default: each third of the steps). PyTorch's ``StepLR`` names these ``gamma`` and
      ``step_size``.
    - ``one_cycle``: see :func:`_one_cycle`; the default ``warmup_ratio`` is ``RISE_SHARE``.
    """
    if schedule == "one_cycle":
        if warmup_steps is not None:
            warmup_ratio = min(1.0, warmup_steps / steps)
        return _one_cycle(step / steps, RISE_SHARE if warmup_ratio is None else warmup_ratio)
    warmup = warmup_steps
    if warmup is None:
        warmup = math.ceil((WARMUP_SHARE if warmup_ratio is None else warmup_ratio) * steps)
    if step < warmup:
        # Step 0 moves the weights too, and step `warmup` is the first with a factor of 1.
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, steps - warmup)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    if schedule == "linear":
        return 1 - progress
    if schedule == "step":
        cuts = math.floor(3 * progress) if step_size is None else (step - warmup) // step_size
        return float(10.0**-cuts if step_factor is None else step_factor**cuts)
    if schedule == "constant":
        return 1.0
    raise ValueError(f"unknown schedule {schedule!r}")


def _one_cycle(done: float, rise: float) -> float:
    """Smith & Topin 2018, "Super-Convergence", arXiv:1708.07120.

    Linear from ``CYCLE_START`` up to 1 and down again, then to zero over the last tenth of the run.
    If the rise leaves less than a fifth, the last part is half of the remainder.
    """
    fall_ends = max(0.9, (1 + rise) / 2)
    if done < rise:
        return CYCLE_START + (1 - CYCLE_START) * done / rise
    if done < fall_ends:
        return 1 - (1 - CYCLE_START) * (done - rise) / (fall_ends - rise)
    return CYCLE_START * (1 - done) / (1 - fall_ends)
