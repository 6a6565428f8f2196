"""Rows of embedding tables: AdamW computes on those alone that have had a gradient.

A text names few of a vocabulary's words. Where weights do not decay, AdamW (Loshchilov & Hutter 2019)
leaves a row whose gradient was 0 so far as it is, to the bit: its moments are 0, and so is its step. So
master, moments and sums are kept of the other rows only, in the order in which they came. A row that
had a gradient once goes on moving by its moments, as in the whole table: this is no "lazy" Adam, which
leaves it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from luthier.models.rounding import CHUNK, Rounding

MIN_NUMBERS = 1 << 20
"""Of a table whose rows are kept apart; a smaller one takes no time as a whole."""
MASTER, GRADIENT, MOMENTS = "master", "gradient", ("exp_avg", "exp_avg_sq")


def embedding_tables(model: nn.Module) -> dict[str, nn.Embedding]:
    """Large tables that train and that one module has, by the name of their weight.

    An output head that is the same weight gives every row a gradient, and two embeddings of one table
    would have to agree about the form of theirs: such tables are left out.
    """
    holders = Counter(
        id(weight) for module in model.modules() for weight in module.parameters(recurse=False)
    )

    def is_apart(table: nn.Embedding) -> bool:
        weight = table.weight
        return (
            weight.requires_grad
            and weight.numel() >= MIN_NUMBERS
            and weight.shape[1] <= CHUNK  # for which there is noise to round by
            and holders[id(weight)] == 1
            # What these do takes dense gradients.
            and table.max_norm is None
            and not table.scale_grad_by_freq
        )

    return {
        f"{name}.weight".removeprefix("."): module
        for name, module in model.named_modules()
        # Not one that computes its weight from others.
        if type(module) is nn.Embedding and "weight" in module._parameters and is_apart(module)
    }


@contextmanager
def sparse_gradients(tables: Mapping[str, nn.Embedding]) -> Iterator[None]:
    """Within the block, gradients of ``tables`` name the rows that have one."""
    before = {name: table.sparse for name, table in tables.items()}
    for table in tables.values():
        table.sparse = True
    try:
        yield
    finally:
        for name, table in tables.items():
            table.sparse = before[name]


class EmbeddingRows:
    """The rows of the table ``weight`` ``[V, W]`` that have had a gradient: ``ids`` ``[N]``."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight
        self._place_V = torch.full((len(weight),), -1, device=weight.device)
        self._ids_V = torch.empty(len(weight), dtype=torch.int64, device=weight.device)
        # On a CPU the system gives memory to what is written: to the rows that are there.
        self._buffers = {
            name: torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
            for name in (MASTER, GRADIENT, *MOMENTS)
        }
        self._count = 0

    @property
    def ids(self) -> Tensor:
        """Which rows of the table, in the order in which they came."""
        return self._ids_V[: self._count]

    def __getitem__(self, name: str) -> Tensor:
        """Their part ``[N, W]`` of ``master``, ``gradient``, ``exp_avg`` or ``exp_avg_sq``."""
        return self._buffers[name][: self._count]

    def add(self, gradient: Tensor) -> None:
        """Add to the sum of gradients; ``gradient`` is one of the whole table, sparse or not."""
        if gradient.is_sparse:
            # Put together by sorting, the same way each time on every device.
            gradient = gradient.float().coalesce()
            ids_G, rows_GW = gradient.indices()[0], gradient.values()
        else:
            ids_G = gradient.any(1).nonzero()[:, 0]
            rows_GW = gradient[ids_G].float()
        self._append(ids_G[self._place_V[ids_G] < 0])
        # Each row is there once, so nothing depends on an order.
        self[GRADIENT][self._place_V[ids_G]] += rows_GW

    def clear(self) -> None:
        """Begin a new sum."""
        self[GRADIENT].zero_()

    def publish(self, rounding: Rounding) -> None:
        """Copy the masters to the table."""
        rounding.into_rows(self._weight, self.ids, self[MASTER])

    def restore(self, ids: Tensor, rows: Mapping[str, Tensor]) -> None:
        """Set ``ids``, and of masters and moments the ``rows`` ``[N, W]`` that are given."""
        self._place_V.fill_(-1)
        self._count = 0
        self._append(ids.to(self._weight.device))
        for name, each in rows.items():
            self[name].copy_(each)

    def restore_whole(self, tables: Mapping[str, Tensor]) -> None:
        """The same from masters and moments of the whole table; it is as before the first step."""
        moved_V = (tables[MASTER].to(self._weight.device) != self._weight.float()).any(1)
        for name in tables.keys() - {MASTER}:
            moved_V |= tables[name].to(self._weight.device).any(1)
        ids = moved_V.nonzero()[:, 0]
        self.restore(ids, {name: each[ids.to(each.device)] for name, each in tables.items()})

    def _append(self, ids_N: Tensor) -> None:
        """Take rows that were not there."""
        start, self._count = self._count, self._count + len(ids_N)
        self._ids_V[start : self._count] = ids_N
        self._place_V[ids_N] = torch.arange(start, self._count, device=ids_N.device)
        self[MASTER][start:] = self._weight[ids_N].float()
        for name in (GRADIENT, *MOMENTS):
            self[name][start:] = 0


def whole_tables(ids: Tensor, rows: Mapping[str, Tensor], weight: Tensor) -> dict[str, Tensor]:
    """Masters and moments of the table ``weight``, which is as before the first step, from its rows."""
    return {
        name: (
            weight.float() if name == MASTER else torch.zeros_like(weight, dtype=torch.float32)
        ).index_copy(0, ids.to(weight.device), each.to(weight.device))
        for name, each in rows.items()
    }
