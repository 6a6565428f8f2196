"""Stochastic rounding to bfloat16.

A fine-tuned weight is a base weight plus a small step. If the step is less than half the distance
to the next bfloat16 number, rounding to nearest restores the base weight, and the network forgets.
Stochastic rounding (Gupta et al. 2015) preserves the mean, so the sum of the steps survives. Used
when merging adapters and when copying float32 master weights to the network; for measurements see
``docs/log/engine.md``.

The random numbers are constant: rounding depends on a weight's index, not on time. Unchanged
weights therefore stay constant, and a copy can be recreated from the master weights alone.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

CHUNK = 1 << 18
"""Number of weights per chunk, small enough for the CPU cache."""


@cache
def _noise(device: torch.device) -> Tensor:
    """Return the constant random numbers, cached because each training step creates a
    :class:`Rounding`."""
    # Drawn on the CPU, because GPU generators return other numbers for the same seed.
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, 1 << 16, (2 * CHUNK,), generator=generator, dtype=torch.int32)
    return drawn.to(device)


class Rounding:
    """Stochastic rounding of a series of float32 tensors; deterministic for each new object.

    Each chunk starts at another offset into ``2 * CHUNK`` random numbers, so no two tensors share a
    pattern.
    """

    def __init__(self) -> None:
        self._start = 0

    def __call__(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """``values`` in ``dtype``: stochastic for bfloat16, exact numbers unchanged."""
        rounded = torch.empty(values.shape, dtype=dtype, device=values.device)
        self.into(rounded, values)
        return rounded

    def into(self, target: Tensor, values: Tensor) -> None:
        """Write ``values`` (float32) to ``target`` of the same shape, in the target's data type."""
        if target.dtype != torch.bfloat16:
            target.copy_(values)
            return
        if not target.is_contiguous():
            target.copy_(self(values, target.dtype))
            return
        noise = _noise(values.device)
        scratch = torch.empty(min(CHUNK, values.numel()), dtype=torch.int32, device=values.device)
        parts = zip(target.view(-1).split(CHUNK), values.reshape(-1).split(CHUNK), strict=True)
        for into, part in parts:
            # A prime step, so that consecutive chunks start at different offsets.
            self._start = (self._start + 7919) % CHUNK
            bits = scratch[: len(part)]
            # With u uniform in [0, 2^16), bits + u carries into the upper half with probability
            # (lower half) / 2^16. Exact bfloat16 numbers have a lower half of 0 and never carry.
            torch.add(
                part.view(torch.int32), noise[self._start : self._start + len(part)], out=bits
            )
            # The upper half of a float32 is the truncated bfloat16; a copy of every second half takes
            # twice the time.
            into.view(torch.int16).copy_(bits.bitwise_right_shift_(16))

    def into_rows(self, table: Tensor, ids_N: Tensor, values_NW: Tensor) -> None:
        """Write ``values_NW`` to the rows ``ids_N`` of ``table`` ``[V, W]``, in the table's data
        type.

        Rounding depends on the index in the table, not on the other rows of the call.
        """
        if table.dtype != torch.bfloat16:
            table.index_copy_(0, ids_N, values_NW.to(table.dtype))
            return
        width = table.shape[1]
        if width > CHUNK:
            raise ValueError(f"rows have {width:,} numbers, the limit is {CHUNK:,}")
        self._start = (self._start + 7919) % CHUNK
        # Row s is the noise from offset s on: a view of all windows without a copy. The last
        # window ends before 2 * CHUNK, because width <= CHUNK.
        noise_SW = _noise(table.device).as_strided((CHUNK, width), (1, 1))
        for ids, values in zip(
            ids_N.split(CHUNK // width), values_NW.split(CHUNK // width), strict=True
        ):
            # Rows are offset by a prime, so neighbouring rows do not share a pattern.
            bits = noise_SW.index_select(0, (self._start + ids * 104729) % CHUNK)
            bits += values.contiguous().view(torch.int32)
            rounded = bits.bitwise_right_shift_(16).to(torch.int16).view(torch.bfloat16)
            table.index_copy_(0, ids, rounded)
