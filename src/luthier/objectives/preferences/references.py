"""Log-probabilities under the reference model: the network at the initial weights of the run.

No second network is in memory: ``network.at_start()`` runs the trained network at the initial
weights. If rows are used more than once, the engine calls :func:`with_reference_logps` before the
first step. Otherwise :meth:`ReferenceObjective.annotate` runs the reference model in the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, ClassVar

from luthier.data.disk_sequence import spool
from luthier.objectives.base import Objective
from luthier.types import Example

if TYPE_CHECKING:
    from torch import Tensor

    from luthier.models.networks.network import Network, TreeBatch

AT_ONCE = 64
"""Number of rows per layout of micro-batches."""


def reference_logps(network: Network, batch: TreeBatch) -> Tensor:
    """Return the summed log-probability ``[R]`` of each row's learned tokens under the reference
    model."""
    import torch

    from luthier.objectives.logprobs import row_logps

    cached = [row.reference for row in batch.tree.examples]
    # Mismatched answers (KTO) and rows of a single epoch have no cached value.
    if None not in cached:
        return torch.tensor(cached, device=batch.target_E.device, dtype=torch.float32)
    with network.at_start():
        return row_logps(network, batch)


def with_reference_logps(
    network: Network, examples: Sequence[Example], budget: int
) -> Sequence[Example]:
    """Return ``examples`` with :attr:`Example.reference` set on all sides.

    The micro-batches are the same at each start of a run, so a resumed run computes the same bits.
    """
    logp = list[float]()
    texts = (side for example in examples for side in example.sides)
    while part := [*islice(texts, AT_ONCE)]:
        # Small parts: token trees of all rows at once would not fit in memory.
        logp += network.read_rows(
            part, budget, lambda batch: reference_logps(network, batch).tolist()
        )
    values = iter(logp)
    return spool(
        Example.from_sides([replace(side, reference=next(values)) for side in example.sides])
        for example in examples
    )


class ReferenceObjective(Objective):
    """Base class of the objectives that compare log-probabilities with a reference model."""

    uses_reference: ClassVar[bool] = True
    can_shard: ClassVar[bool] = False

    def annotate(
        self, network: Network, examples: Sequence[Example], budget: int
    ) -> list[TreeBatch]:
        """Return micro-batches with the reference log-probability ``[R]`` of each row as ``extra``."""
        batches = super().annotate(network, examples, budget)
        return [replace(batch, extra=reference_logps(network, batch)) for batch in batches]
