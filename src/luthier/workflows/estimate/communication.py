"""What several processes send each other in a step, and how long that takes: rings, latency, bandwidth.

In a ring of N processes each sends, of M bytes, ``2 (N-1)/N M`` in an all-reduce and ``(N-1)/N M`` in
an all-gather or a reduce-scatter, the least that any algorithm can (Patarasuk and Yuan 2009, Bandwidth
optimal all-reduce algorithms for clusters of workstations, J. Parallel Distrib. Comput. 69, 117-124).

- Data parallel (:mod:`luthier.models.process_group`): a step ends with one all-reduce of the float32
  sums of all gradients, ``M = 4 x trained weights``.
- Layers in shards (:mod:`luthier.models.sharding`): each micro-batch gathers the weights of all layers
  twice, forward and backward, and reduce-scatters their gradients in float32; gradients of what stays
  whole are all-reduced once a step. One micro-batch with all weights training is 3 M, where data
  parallel is 2 M (ZeRO, Rajbhandari et al. 2020, arXiv:1910.02054, section 7).

Gloo, which processors exchange by, has no reduce-scatter: torch does an all-reduce in its place, so
that shards send the gradients twice there.

Seconds follow from latency and bandwidth (Hockney 1994, The communication challenge for MPP, Parallel
Comput. 20, 389-398): ``messages x latency + bytes sent / bandwidth``, where a ring's all-reduce has
``2 (N-1)`` messages one after the other, and its halves ``N-1``. Nothing is computed meanwhile: that
is so for data parallel. FSDP gathers a layer ahead of its turn, so with shards this errs upwards, as
it does for many processes where NCCL takes trees. Left out: the few numbers that a step exchanges
beside gradients (losses, counts of tokens), and what objectives exchange themselves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.models.process_group import BUCKET

if TYPE_CHECKING:
    from collections.abc import Sequence

SUM_BYTES = 4
"""Of a number of a gradient's sum: float32, whatever the weights are."""
LATENCY = 1e-5
"""Seconds of a message between machines, as of InfiniBand or Ethernet with RDMA through NCCL."""
BANDWIDTHS = (12.5, 50.0, 450.0)
"""GB/s that one process sends: Ethernet of 100 Gb/s, InfiniBand of 400 Gb/s, NVLink 4."""
PROCESSES = (8, 64, 512)


@dataclass(frozen=True)
class StepExchange:
    """Bytes that the processes of a training exchange in one step, each as many as M above."""

    reduced: int
    """All-reduced."""
    gathered: int = 0
    """All-gathered."""
    scattered: int = 0
    """Reduce-scattered."""
    reductions: int = 1
    """All-reduces that take ``reduced``."""
    halves: int = 0
    """All-gathers and reduce-scatters that take the others."""

    def sent(self, processes: int) -> float:
        """Bytes that each of ``processes`` sends, and receives."""
        return (processes - 1) / processes * (2 * self.reduced + self.gathered + self.scattered)

    def seconds(self, processes: int, bandwidth: float, latency: float = LATENCY) -> float:
        """What the exchange takes, where each process sends ``bandwidth`` bytes a second."""
        messages = (processes - 1) * (2 * self.reductions + self.halves)
        return messages * latency + self.sent(processes) / bandwidth


@dataclass(frozen=True)
class Scaling:
    """A step of several processes, each with as many rows as one has by itself."""

    processes: int
    bandwidth: float
    """GB/s that each sends."""
    sent: float
    """Bytes."""
    exchange_seconds: float
    seconds: float
    """Of the whole step."""
    efficiency: float
    """Share of the step that is spent computing: rows a second, beside so many times those of one."""


def data_parallel(trained: int) -> StepExchange:
    """A step of processes that hold the whole network, of which so many weights train."""
    return StepExchange(SUM_BYTES * trained, reductions=math.ceil(trained / BUCKET))


def fully_sharded(model: Any, bytes_per_number: int, micro_batches: int = 1) -> StepExchange:
    """A step of processes that hold shards of the layers of ``model`` in so many bytes a number.

    ``micro_batches`` are those of one process. ``model`` may be on the meta device.

    Raises:
        RecipeError: for a network without layers that are alike.
    """
    from luthier.engine.memory import trained_numbers
    from luthier.models.layers import layer_names

    layers = [model.get_submodule(name) for name in layer_names(model)]
    numbers = sum(weight.numel() for layer in layers for weight in layer.parameters())
    trained = [trained_numbers(layer) for layer in layers]
    whole = data_parallel(trained_numbers(model) - sum(trained))
    return StepExchange(
        reduced=whole.reduced,
        gathered=micro_batches * 2 * numbers * bytes_per_number,
        scattered=micro_batches * SUM_BYTES * sum(trained),
        reductions=whole.reductions,
        halves=micro_batches * (2 * len(layers) + sum(count > 0 for count in trained)),
    )


def predict_scaling(
    exchange: StepExchange,
    step_seconds: float,
    processes: Sequence[int] = PROCESSES,
    bandwidths: Sequence[float] = BANDWIDTHS,
) -> list[Scaling]:
    """A step of so many processes at each of the ``bandwidths`` in GB/s.

    ``step_seconds`` are those of a step of one process, on what the others are, too.
    """
    found = []
    for count in processes:
        for bandwidth in bandwidths:
            exchanged = exchange.seconds(count, bandwidth * 1e9)
            whole = step_seconds + exchanged
            found.append(
                Scaling(
                    count, bandwidth, exchange.sent(count), exchanged, whole, step_seconds / whole
                )
            )
    return found
