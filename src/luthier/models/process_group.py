"""Data parallelism over several processes.

As in PyTorch's DDP, each process has the whole network and runs its own micro-batches, and
gradients are summed over all processes before the optimizer step. Results equal those of one
process: row order and random numbers are functions of seed, step and row, and the gradient sum is
divided once by the weight of all processes. Communication uses ``torch.distributed``: gloo on CPUs,
NCCL on GPUs. Objects travel as JSON, never pickled.

A failed or killed process closes its connections; a hanging process exceeds :data:`TIMEOUT`. The
next exchange of the other processes then raises :class:`ProcessLost`. The launcher (``torchrun``,
or :mod:`luthier.engine.processes`) reports the process that failed first and restarts all
processes.

Not implemented: overlap of gradient exchange and computation (each step ends with one exchange).
For sharded networks see :mod:`luthier.models.sharding`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from luthier.errors import LuthierError, ProcessLost, report_error, restore_error

if TYPE_CHECKING:
    from torch import Tensor

BUCKET = 1 << 24
"""Number of values per exchange. Buffers need at most 64 MB."""
TIMEOUT = "LUTHIER_COLLECTIVE_TIMEOUT"
"""Environment variable with the timeout for other processes, in seconds."""
TIMEOUT_SECONDS = 1800.0


@dataclass(frozen=True)
class ProcessGroup:
    """The processes of a run, seen from one process. A group of one exchanges nothing."""

    rank: int = 0
    """Index of this process. Process 0 writes files and prints."""
    size: int = 1
    """Number of processes."""
    local_rank: int = 0
    """Index of this process on its machine."""
    local_size: int = 1
    """Number of processes on this machine."""

    @staticmethod
    def of_environment() -> ProcessGroup:
        """Return the unconnected group from the launcher's environment variables (torchrun, Ray,
        Slurm)."""
        size = int(os.environ.get("WORLD_SIZE") or 1)
        if size == 1 or "RANK" not in os.environ:
            return ALONE
        rank = int(os.environ["RANK"])
        local_rank = int(os.environ.get("LOCAL_RANK", rank))
        return ProcessGroup(rank, size, local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", size)))

    def connect(self) -> None:
        """Connect to the other processes; waits for all processes."""
        if self.size == 1:
            return
        import torch
        from torch import distributed
        from torch.distributed.rendezvous import rendezvous

        if distributed.is_initialized():
            return
        seconds = float(os.environ.get(TIMEOUT, TIMEOUT_SECONDS))
        timeout = timedelta(seconds=seconds)
        try:
            store, rank, size = next(rendezvous("env://", timeout=timeout))
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
                # torchrun keeps this store across restarts, with the addresses of
                # ended processes.
                start = f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT')}"
                store = distributed.PrefixStore(start, store)  # type: ignore[attr-defined]
            distributed.init_process_group(
                # sum() and gather() exchange CPU tensors, also with GPUs.
                "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
                store=store,
                rank=rank,
                world_size=size,
                timeout=timeout,
            )
        except RuntimeError as error:
            if not _is_exchange_failure(error):
                raise
            place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise ProcessLost(
                f"Process {self.rank} of {self.size} cannot connect to {place} within "
                f"{seconds:g} seconds ({TIMEOUT}): {error}"
            ) from error

    @property
    def is_connected(self) -> bool:
        """True after :meth:`connect`, and always for a group of one."""
        if self.size == 1:
            return True
        from torch import distributed

        return distributed.is_initialized()

    def agree(self, problem: LuthierError | None = None) -> None:
        """Connect, and raise in all processes if one process has a ``problem``.

        Raises:
            LuthierError: the problem of the first such process, with the same class.
        """
        if self.size == 1:
            return
        self.connect()
        own = report_error(problem, f"process {self.rank}: ") if problem else None
        for rank, report in enumerate(self.gather(own)):
            if report is not None:
                if problem is not None and rank == self.rank:
                    # The original error keeps its traceback.
                    raise problem
                raise restore_error(report)

    @contextmanager
    def shared_errors(self) -> Iterator[None]:
        """Share errors with the other processes before training; name the cause of a failed
        exchange.

        Raises:
            LuthierError: the first process's error before the processes connect.
            ProcessLost: if an exchange fails because another process ended or hangs.
        """
        try:
            yield
        except ProcessLost:
            raise
        except LuthierError as error:
            if self.size > 1 and not self.is_connected:
                # The other processes wait in connect() until they learn of this error.
                with suppress(ProcessLost):
                    self.agree(error)
            raise
        except RuntimeError as error:
            if self.size == 1 or not _is_exchange_failure(error):
                raise
            raise ProcessLost(
                f"Process {self.rank} of {self.size}: another process ended or exceeded the "
                f"timeout ({TIMEOUT}): {error}. Check the output of the other processes and "
                "restart the run to resume from the last checkpoint."
            ) from error

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by the sum over all processes, bitwise equal in all processes."""
        if self.size == 1:
            return
        import torch
        from torch import distributed

        # An all_reduce costs the latency of 2 (N - 1) messages, so small tensors share one.
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            distributed.all_reduce(flat)
            for tensor, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                tensor.copy_(part.view(tensor.shape))

    def send_first(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by the first process's tensor."""
        if self.size == 1:
            return
        from torch import distributed

        for tensor in tensors:
            # broadcast requires contiguous tensors, and convolution weights can be channels-last.
            sent = tensor.contiguous()
            distributed.broadcast(sent, src=0)
            tensor.copy_(sent)

    def sum(self, value: float) -> float:
        """``value`` added over all processes, in float64."""
        if self.size == 1:
            return value
        import torch
        from torch import distributed

        total = torch.tensor(value, dtype=torch.float64)
        distributed.all_reduce(total)
        return float(total)

    def any(self, value: bool) -> bool:
        """Return True if ``value`` is true in any process."""
        return self.sum(float(value)) > 0

    def concatenate(self, tensor: Tensor) -> Tensor:
        """Concatenate the tensors of all processes along the first dimension, in rank order."""
        if self.size == 1:
            return tensor
        import torch
        from torch import distributed

        # all_gather requires equal shapes in all processes, hence the padding.
        lengths: list[int] = self.gather(len(tensor))
        most = max(lengths)
        sent = tensor.new_zeros(most, *tensor.shape[1:])
        sent[: len(tensor)] = tensor
        parts = [torch.empty_like(sent) for _ in lengths]
        distributed.all_gather(parts, sent)
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])

    def gather(self, value: Any) -> list[Any]:
        """Return the JSON values of all processes by rank."""
        if self.size == 1:
            return [value]
        import torch
        from torch import distributed

        # JSON instead of all_gather_object, because unpickling executes code of the sender.
        sent = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        distributed.all_gather(lengths, torch.tensor([len(sent)]))
        most = max(int(length) for length in lengths)
        parts = [torch.empty(most, dtype=torch.uint8) for _ in lengths]
        distributed.all_gather(parts, torch.nn.functional.pad(sent, (0, most - len(sent))))
        return [
            json.loads(part[: int(length)].numpy().tobytes())
            for part, length in zip(parts, lengths, strict=True)
        ]

    def interleave(self, own: Sequence[Any]) -> list[Any]:
        """Merge a list of which each process has every ``size``-th element, starting at ``rank``."""
        if self.size == 1:
            return list(own)
        parts = self.gather(own)
        # The inverse of `[rank::size]` in Network.batches.
        return [parts[n % self.size][n // self.size] for n in range(sum(map(len, parts)))]

    def first(self, value: Any) -> Any:
        """Return the first process's value in all processes."""
        if self.size == 1:
            return value
        return self.gather(value if self.rank == 0 else None)[0]


ALONE = ProcessGroup()
"""The group of a single process."""


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """``tensors`` in their order, in parts of about :data:`BUCKET` numbers."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and sum(t.numel() for t in bucket) + tensor.numel() > BUCKET:
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def _is_exchange_failure(error: BaseException) -> bool:
    """Return True if torch.distributed raised ``error``. gloo has no exception class."""
    from torch import distributed

    if isinstance(error, distributed.DistError):
        return True
    words = ("gloo", "NCCL", "Connection closed by peer", "Timed out waiting")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
