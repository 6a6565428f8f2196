"""AdamW state for the embedding rows with a gradient.

Text uses a small part of the vocabulary. Without weight decay, AdamW (Loshchilov & Hutter 2019)
leaves a row without any gradient unchanged to the bit: the moments are 0, so the step is 0.
Therefore master, moments and gradient sums are stored for the remaining rows only, in order of
first use. A row with an earlier gradient continues to move by the moments, as in the full table.
"Lazy" Adam skips such rows; this implementation does not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from luthier.models.rounding import CHUNK, Rounding

MIN_NUMBERS = 1 << 20
"""Minimum number of values of a table to store by rows. A smaller table costs little as a whole."""
MASTER, GRADIENT, MOMENTS = "master", "gradient", ("exp_avg", "exp_avg_sq")


def embedding_tables(model: nn.Module) -> dict[str, nn.Embedding]:
    """Return the large trained embedding tables of a single module each, by weight name.

    A tied output head gives every row a gradient, and two embeddings of one table would need the
    same gradient layout. Such tables are excluded.
    """
    holders = Counter(
        id(weight) for module in model.modules() for weight in module.parameters(recurse=False)
    )

    def is_apart(table: nn.Embedding) -> bool:
        weight = table.weight
        return (
            weight.requires_grad
            and weight.numel() >= MIN_NUMBERS
            # `Rounding.into_rows` rejects longer rows.
            and weight.shape[1] <= CHUNK
            and holders[id(weight)] == 1
            # `max_norm` changes the table in place, and `scale_grad_by_freq` needs dense gradients.
            and table.max_norm is None
            and not table.scale_grad_by_freq
        )

    return {
        f"{name}.weight".removeprefix("."): module
        for name, module in model.named_modules()
        # A parametrized embedding computes its weight, which is then missing in `_parameters`.
        if type(module) is nn.Embedding and "weight" in module._parameters and is_apart(module)
    }


@contextmanager
def sparse_gradients(tables: Mapping[str, nn.Embedding]) -> Iterator[None]:
    """Give ``tables`` sparse gradients within the block."""
    before = {name: table.sparse for name, table in tables.items()}
    for table in tables.values():
        table.sparse = True
    try:
        yield
    finally:
        for name, table in tables.items():
            table.sparse = before[name]


class EmbeddingRows:
    """The rows of the table ``weight`` ``[V, W]`` with a gradient so far: ``ids`` ``[N]``."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight
        # Row number in the buffers by table row; -1 for rows without a gradient so far.
        self._place_V = torch.full((len(weight),), -1, device=weight.device)
        self._ids_V = torch.empty(len(weight), dtype=torch.int64, device=weight.device)
        # `empty`, not `zeros`: on a CPU the system allocates memory only for rows that are written.
        self._buffers = {
            name: torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
            for name in (MASTER, GRADIENT, *MOMENTS)
        }
        self._count = 0

    @property
    def ids(self) -> Tensor:
        """Row numbers of the table, in order of first use."""
        return self._ids_V[: self._count]

    def __getitem__(self, name: str) -> Tensor:
        """Return the rows ``[N, W]`` of ``master``, ``gradient``, ``exp_avg`` or ``exp_avg_sq``."""
        return self._buffers[name][: self._count]

    def add(self, gradient: Tensor) -> None:
        """Add a gradient of the whole table, sparse or dense, to the gradient sum."""
        if gradient.is_sparse:
            # float32 first, so that sums do not round in bfloat16.
            gradient = gradient.float()
            if gradient.is_cpu:
                # `coalesce` sorts equal row numbers in another order on each kind of processor.
                # The rows of a batch are summed in their order instead, as in the full table.
                ids_G, place_N = gradient._indices()[0].unique(return_inverse=True)
                rows_GW = gradient._values().new_zeros(len(ids_G), gradient.shape[1])
                rows_GW.index_add_(0, place_N, gradient._values())
            else:  # without atomic additions, whose order varies
                gradient = gradient.coalesce()
                ids_G, rows_GW = gradient.indices()[0], gradient.values()
        else:
            # AdamW without decay would not move a row whose gradients are all 0.
            ids_G = gradient.any(1).nonzero()[:, 0]
            rows_GW = gradient[ids_G].float()
        self._append(ids_G[self._place_V[ids_G] < 0])
        # Row numbers are unique, so the indexed sum does not depend on an order.
        self[GRADIENT][self._place_V[ids_G]] += rows_GW

    def clear(self) -> None:
        """Reset the gradient sum to zero."""
        self[GRADIENT].zero_()

    def publish(self, rounding: Rounding) -> None:
        """Copy the masters to the table."""
        rounding.into_rows(self._weight, self.ids, self[MASTER])

    def restore(self, ids: Tensor, rows: Mapping[str, Tensor]) -> None:
        """Set ``ids`` and the given masters and moments, each ``[N, W]``."""
        self._place_V.fill_(-1)
        self._count = 0
        self._append(ids.to(self._weight.device))
        for name, each in rows.items():
            self[name].copy_(each)

    def restore_whole(self, tables: Mapping[str, Tensor]) -> None:
        """Restore the rows from masters and moments of the whole table. The table must be as before
        step 1."""
        # A row has moved if its master or a moment differs from the state before step 1.
        moved_V = (tables[MASTER].to(self._weight.device) != self._weight.float()).any(1)
        for name in tables.keys() - {MASTER}:
            moved_V |= tables[name].to(self._weight.device).any(1)
        ids = moved_V.nonzero()[:, 0]
        self.restore(ids, {name: each[ids.to(each.device)] for name, each in tables.items()})

    def _append(self, ids_N: Tensor) -> None:
        start, self._count = self._count, self._count + len(ids_N)
        self._ids_V[start : self._count] = ids_N
        self._place_V[ids_N] = torch.arange(start, self._count, device=ids_N.device)
        # A row without an earlier gradient never moved: the table contains its exact master.
        self[MASTER][start:] = self._weight[ids_N].float()
        for name in (GRADIENT, *MOMENTS):
            self[name][start:] = 0


def whole_tables(ids: Tensor, rows: Mapping[str, Tensor], weight: Tensor) -> dict[str, Tensor]:
    """Return masters and moments of the whole table from the rows. ``weight`` is as before step 1."""
    return {
        name: (
            weight.float() if name == MASTER else torch.zeros_like(weight, dtype=torch.float32)
        ).index_copy(0, ids.to(weight.device), each.to(weight.device))
        for name, each in rows.items()
    }
