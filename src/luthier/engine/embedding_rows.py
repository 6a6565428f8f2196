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

from luthier.models.rounding import Rounding

LEAST = 1 << 20
"""Numbers of a table from which its rows are kept apart; a smaller one takes no time as a whole."""
MASTER, MOMENTS = "master", ("exp_avg", "exp_avg_sq")


def embedding_tables(model: nn.Module) -> dict[str, nn.Embedding]:
    """Large tables that train and are nothing but tables, by the name of their weight.

    An output head that is the same weight gives every row a gradient, so such tables are left out.
    """
    holders = Counter(
        id(weight) for module in model.modules() for weight in module.parameters(recurse=False)
    )
    found = {}
    for name, module in model.named_modules():
        # Not one that computes its weight from others.
        if type(module) is not nn.Embedding or "weight" not in module._parameters:
            continue
        weight = module.weight
        whole = not weight.requires_grad or weight.numel() < LEAST or module.max_norm is not None
        if not whole and holders[id(weight)] == 1:
            found[f"{name}.weight".removeprefix(".")] = module
    return found


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
        self._ids = torch.empty(0, dtype=torch.int64, device=weight.device)
        empty = torch.empty(0, weight.shape[1], device=weight.device)
        self._room = dict.fromkeys((MASTER, "gradient", *MOMENTS), empty)
        self._count = 0

    @property
    def ids(self) -> Tensor:
        """Which rows of the table, in the order in which they came."""
        return self._ids[: self._count]

    def __getitem__(self, name: str) -> Tensor:
        """Their part ``[N, W]`` of ``master``, ``gradient``, ``exp_avg`` or ``exp_avg_sq``."""
        return self._room[name][: self._count]

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
        self["gradient"][self._place_V[ids_G]] += rows_GW

    def clear(self) -> None:
        """Begin a new sum."""
        self["gradient"].zero_()

    def publish(self, rounding: Rounding) -> None:
        """Copy the masters to the table."""
        rounding.into_rows(self._weight, self.ids, self[MASTER])

    def whole(self, name: str) -> Tensor:
        """``master`` or a moment of the whole table, as without this class."""
        weight = self._weight
        table = weight.float() if name == MASTER else torch.zeros_like(weight, dtype=torch.float32)
        return table.index_copy(0, self.ids, self[name])

    def restore(self, ids: Tensor | None, tables: Mapping[str, Tensor]) -> None:
        """Set the rows to what :meth:`whole` gave by name, and ``ids``; ``None`` finds them.

        To find them the table has to be as it was before the first step.
        """
        tables = {name: each.to(self._weight.device) for name, each in tables.items()}
        if ids is None:  # of a checkpoint of an earlier version
            moved_V = (tables[MASTER] != self._weight.float()).any(1)
            for name in tables.keys() - {MASTER}:
                moved_V |= tables[name].any(1)
            ids = moved_V.nonzero()[:, 0]
        self._weight.copy_(tables[MASTER])  # exact in all other rows
        self._place_V.fill_(-1)
        self._count = 0
        self._append(ids.to(self._weight.device))
        for name, each in tables.items():
            self[name].copy_(each[self.ids])

    def _append(self, ids_N: Tensor) -> None:
        """Take rows that were not there."""
        start, end = self._count, self._count + len(ids_N)
        if end > len(self._ids):
            # By a quarter more each time, so that all the copying is a few times the size in the end.
            room = min(len(self._weight), max(end, len(self._ids) * 5 // 4, 1024))
            self._ids = _grown(self._ids, start, room)
            self._room = {name: _grown(each, start, room) for name, each in self._room.items()}
        self._count = end
        self._ids[start:end] = ids_N
        self._place_V[ids_N] = torch.arange(start, end, device=ids_N.device)
        self[MASTER][start:] = self._weight[ids_N].float()
        for name in ("gradient", *MOMENTS):
            self[name][start:] = 0


def _grown(rows: Tensor, count: int, room: int) -> Tensor:
    """The first ``count`` of ``rows`` in a tensor for ``room``."""
    grown = rows.new_empty(room, *rows.shape[1:])
    grown[:count] = rows[:count]
    return grown
