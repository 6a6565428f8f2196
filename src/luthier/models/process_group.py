"""Several processes that train one network together, each on a part of every step.

Data parallelism as in PyTorch's DDP: each process holds the network, works on its own micro-batches,
and the sums of gradients are added over all of them before the optimizer moves. What is computed is
that of one process: the order of rows and all that is drawn are functions of seed, step and row, and
the one division is by the weight of all processes. What they exchange goes through
``torch.distributed``: gloo between processors, NCCL between graphics cards. Objects travel as JSON;
nothing is pickled.

A process that fails leaves word in the store that all share, and closes its connections, so that the
others end at once and say why. One that is gone, or hangs for longer than :data:`TIMEOUT`, leaves none:
the others name it.

Left out: gradients that are exchanged while others are still computed (a step ends with one exchange).
Networks that are themselves cut are in :mod:`luthier.models.sharding`.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
import traceback
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from luthier.errors import (
    DiskFull,
    LuthierError,
    ProcessLost,
    ReadOnlyDisk,
    report_error,
    restore_error,
)
from luthier.files import waits_for_disk
from luthier.printable import list_some

if TYPE_CHECKING:
    from torch import Tensor
    from torch._C._distributed_c10d import Store

BUCKET = 1 << 24
"""Numbers exchanged at once: what is copied on the way is at most 64 MB."""
TIMEOUT = "LUTHIER_COLLECTIVE_TIMEOUT"
"""Environment variable: seconds that a process waits for the others before it gives up."""
TIMEOUT_SECONDS = 1800.0
REPORT_SECONDS = 5.0
"""Which the processes of a group have to say what became of them, after an exchange has failed."""
_CLOSED = ("Connection closed", "Connection reset", "Broken pipe", "remote process exited")
"""What gloo and NCCL say of a connection that the other side closed."""
_GOES_ON = "Started again, the run goes on from its last checkpoint"


@dataclass(frozen=True)
class Rendezvous:
    """One start of a group: the store that its processes share, and which they are."""

    store: Store
    members: Sequence[Mapping[str, Any]]
    """Host and number of each process, by rank."""
    seconds: float
    """How long one waits for another."""

    def name(self, rank: int) -> str:
        """The process of that rank, for people."""
        member = self.members[rank]
        return f"process {rank} of {len(self.members)} (pid {member['pid']} on {member['host']})"

    def is_gone(self, rank: int) -> bool:
        """Whether that process has ended, as far as can be seen from here: on this machine alone."""
        import psutil

        member = self.members[rank]
        if member["host"] != socket.gethostname():
            return False
        try:
            return bool(psutil.Process(member["pid"]).status() == psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return True


_rendezvous: Rendezvous | None = None
"""That of this process's group, which torch.distributed keeps for the whole process, too."""


@dataclass(frozen=True)
class ProcessGroup:
    """The processes of a run, seen from one of them. A group of one exchanges nothing."""

    rank: int = 0
    """Number of this process; the first, 0, is the one that writes files and speaks."""
    size: int = 1
    """How many there are."""
    local_rank: int = 0
    """Number of this process on its machine."""
    local_size: int = 1
    """How many share its machine."""

    @staticmethod
    def of_environment() -> ProcessGroup:
        """The group that a launcher (torchrun, Ray, Slurm) tells of; not connected yet."""
        size = int(os.environ.get("WORLD_SIZE") or 1)
        if size == 1 or "RANK" not in os.environ:
            return ALONE
        rank = int(os.environ["RANK"])
        local_rank = int(os.environ.get("LOCAL_RANK", rank))
        return ProcessGroup(rank, size, local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", size)))

    def connect(self) -> None:
        """Meet the other processes; waits for all of them."""
        if self.size == 1:
            return
        import torch
        from torch import distributed
        from torch.distributed.rendezvous import rendezvous

        global _rendezvous
        if distributed.is_initialized():
            return
        seconds = float(os.environ.get(TIMEOUT, TIMEOUT_SECONDS))
        timeout = timedelta(seconds=seconds)
        try:
            store, rank, size = next(rendezvous("env://", timeout=timeout))
            name, members = _enter_round(store, rank, size, seconds)
            store = distributed.PrefixStore(name, store)  # type: ignore[attr-defined]
            distributed.init_process_group(
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
                f"process {self.rank} of {self.size} did not meet the others at {place} within "
                f"{seconds:g} seconds ({TIMEOUT}): {error}"
            ) from error
        _rendezvous = Rendezvous(store, members, seconds)

    @property
    def is_connected(self) -> bool:
        """Whether :meth:`connect` was called; a group of one always is."""
        if self.size == 1:
            return True
        from torch import distributed

        return distributed.is_initialized()

    def agree(self, problem: LuthierError | None = None) -> None:
        """Connect, and go on only where no process has a ``problem``.

        Raises:
            LuthierError: that of the first process that has one, where this one has none; of the
                same class.
        """
        if self.size == 1:
            return
        self.connect()
        for rank, report in enumerate(self.gather(report_error(problem) if problem else None)):
            if report is not None and problem is None:
                message = f"process {rank}: {report['message']}"
                raise restore_error(report["error"], message) or LuthierError(message)

    @contextmanager
    def shared_errors(self) -> Iterator[None]:
        """Let the other processes know what this one fails of, and the other way round.

        Raises:
            LuthierError: what another process was refused or failed of on purpose.
            ProcessLost: where another process is gone, hangs, or failed of something else.
        """
        try:
            yield
        except Exception as error:
            if self.size == 1:
                raise
            if not self.is_connected:
                if isinstance(error, LuthierError) and not isinstance(error, ProcessLost):
                    with suppress(ProcessLost):
                        self.agree(error)  # the others wait to hear whether it begins
                raise
            if _rendezvous is None:  # somebody else connected this process, and looks after it
                raise
            # Its frames hold the connections, and the others wait as long as those are open.
            traceback.clear_frames(error.__traceback__)
            with _ignore_sigterm():
                if not _is_exchange_failure(error):
                    reported = isinstance(error, LuthierError) and error.reported
                    # Whose disk that is, its path alone does not say.
                    if waits_for_disk(error) and not reported:
                        kind = ReadOnlyDisk if isinstance(error, ReadOnlyDisk) else DiskFull
                        full = kind(f"{_rendezvous.name(self.rank)}: {error}")
                        _collect_reports(self, _rendezvous, full, wait=False)
                        raise full from error
                    _collect_reports(self, _rendezvous, error, wait=False)
                    raise
                reports = _collect_reports(self, _rendezvous, None, wait=self.size > 2)
                raise _explain(self, _rendezvous, error, reports) from error

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all processes, which is the same to the bit in all."""
        if self.size == 1:
            return
        import torch
        from torch import distributed

        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            distributed.all_reduce(flat)
            for tensor, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                tensor.copy_(part.view(tensor.shape))

    def send_first(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by that of the first process."""
        if self.size == 1:
            return
        from torch import distributed

        for tensor in tensors:
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
        """Whether ``value`` is true in any process."""
        return self.sum(float(value)) > 0

    def concatenate(self, tensor: Tensor) -> Tensor:
        """The tensors of all processes, which differ in their first dimension alone, in rank order."""
        if self.size == 1:
            return tensor
        import torch
        from torch import distributed

        lengths: list[int] = self.gather(len(tensor))
        most = max(lengths)
        sent = tensor.new_zeros(most, *tensor.shape[1:])
        sent[: len(tensor)] = tensor
        parts = [torch.empty_like(sent) for _ in lengths]
        distributed.all_gather(parts, sent)
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])

    def gather(self, value: Any) -> list[Any]:
        """What each process gives, by rank; numbers, texts, lists and mappings of them."""
        if self.size == 1:
            return [value]
        import torch
        from torch import distributed

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
        """The whole of a list of which each process has every ``size``-th member from ``rank`` on."""
        if self.size == 1:
            return list(own)
        parts = self.gather(own)
        return [parts[n % self.size][n // self.size] for n in range(sum(map(len, parts)))]

    def first(self, value: Any) -> Any:
        """What the first process gives, in all of them."""
        if self.size == 1:
            return value
        return self.gather(value if self.rank == 0 else None)[0]


ALONE = ProcessGroup()
"""The group of a process that works by itself."""


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


def _enter_round(
    store: Store, rank: int, size: int, seconds: float
) -> tuple[str, Sequence[Mapping[str, Any]]]:
    """A name for this start of a group that no other start has, and its processes by rank.

    An agent of torchrun may keep its store when it starts processes again, with all that those before
    wrote into it. What it tells its processes does not say which start it is: the count of restarts
    leaves out those for nodes that come and go, and is of one node alone. So the first process opens a
    round under a random name, and who enters it waits until it is among those that the first one names.
    Meanwhile the first one publishes who is missing, so that all name the same processes.

    Raises:
        ProcessLost: where not all are there after ``seconds``.
    """
    own = {"id": uuid.uuid4().hex, "host": socket.gethostname(), "pid": os.getpid()}
    deadline = time.monotonic() + seconds
    missing, entered = [0] if rank else [*range(1, size)], ""
    if rank == 0:
        entered = str(own["id"])
        store.set("round", entered)
    while time.monotonic() < deadline:
        if rank == 0:
            absent = [n for n in range(1, size) if not store.check([f"{entered}/{n}"])]
            if not absent:
                others = [json.loads(store.get(f"{entered}/{n}")) for n in range(1, size)]
                store.set(f"{entered}/members", json.dumps([own, *others]))
                return entered, [own, *others]
            if absent != missing:
                missing = absent
                store.set(f"{entered}/missing", json.dumps(missing))
        elif store.check(["round"]):
            opened = store.get("round").decode()
            if opened != entered:
                store.set(f"{opened}/{rank}", json.dumps(own))
                entered, missing = opened, [0]
            if store.check([f"{opened}/members"]):
                members = json.loads(store.get(f"{opened}/members"))
                if own in members:  # else it is a round of processes that were here before
                    return opened, members
            elif store.check([f"{opened}/missing"]):
                absent = json.loads(store.get(f"{opened}/missing"))
                # Who would miss this one, which is there, has gone itself.
                missing = [0] if rank in absent else absent
        time.sleep(0.02)
    raise ProcessLost(
        f"process {rank} of {size} waited {seconds:g} seconds ({TIMEOUT}) in vain for "
        f"{list_some([f'process {n}' for n in missing], 5)} to begin. Look at the machines of those; "
        "where nodes join and leave under torchrun, set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on all",
        missing,
    )


def _is_exchange_failure(error: BaseException) -> bool:
    """Whether torch.distributed raised ``error``; gloo has no class of its own for it."""
    from torch import distributed

    if isinstance(error, distributed.DistError):
        return True
    words = ("gloo", "NCCL", "Connection closed by peer", "Timed out waiting")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def _collect_reports(
    group: ProcessGroup, rendezvous: Rendezvous, error: Exception | None, wait: bool
) -> Mapping[int, Mapping[str, str]]:
    """Leave word of ``error``, end the connections, and read what the others left, by rank.

    The report of a process that only heard of another one's end is empty. All of it is done beside:
    the store may be that of a process that hangs.
    """
    from torch import distributed

    report = {} if error is None else report_error(error)
    reports: dict[int, Mapping[str, str]] = {}
    others = [rank for rank in range(group.size) if rank != group.rank]

    def collect() -> None:
        deadline = time.monotonic() + REPORT_SECONDS
        try:
            rendezvous.store.set_timeout(timedelta(seconds=REPORT_SECONDS))
            rendezvous.store.set(f"report/{group.rank}", json.dumps(report))
            distributed.destroy_process_group()  # those that wait for this one hear of it now
            while True:
                for rank in others:
                    if rank not in reports and rendezvous.store.check([f"report/{rank}"]):
                        reports[rank] = json.loads(rendezvous.store.get(f"report/{rank}"))
                if not wait or len(reports) == len(others) or time.monotonic() > deadline:
                    return
                time.sleep(0.05)
        except RuntimeError:
            pass  # the process is gone that had the store

    thread = threading.Thread(target=collect, daemon=True)
    thread.start()
    thread.join(2 * REPORT_SECONDS)
    return dict(reports)


def _explain(
    group: ProcessGroup,
    rendezvous: Rendezvous,
    error: Exception,
    reports: Mapping[int, Mapping[str, str]],
) -> LuthierError:
    """Why an exchange failed with ``error``, by what the other processes report."""
    for rank, report in sorted(reports.items()):
        if not report:
            continue
        reason = restore_error(report["error"], f"{rendezvous.name(rank)}: {report['message']}")
        if reason is None:  # nobody raised it on purpose
            text = f"{rendezvous.name(rank)} failed: {report['error']}: {report['message']}. {_GOES_ON}"
            return ProcessLost(text, [rank])
        return reason
    lost = [rank for rank in range(group.size) if rank != group.rank and rank not in reports]
    if not lost:
        text = f"the {group.size} processes lost touch with each other: {error}. {_GOES_ON}"
        return ProcessLost(text)
    names = list_some([rendezvous.name(rank) for rank in lost], 3)
    if "imed out" in str(error):
        text = (
            f"{names} gave no answer for {rendezvous.seconds:g} seconds ({TIMEOUT}), so it hangs or "
            f"its machine does: look there, and end what is left of it. {_GOES_ON}"
        )
        return ProcessLost(text, lost)
    closed = len(lost) == 1 and any(words in str(error) for words in _CLOSED)
    if closed or all(rendezvous.is_gone(rank) for rank in lost):
        cause = "killed, as for want of memory, or gone with the machine"
        text = f"{names} ended by surprise: {cause}"
    else:  # one of them may be computing still
        text = f"no word from {names} after an exchange failed: {error}. Look at the output there"
    return ProcessLost(f"{text}. {_GOES_ON}", lost)


@contextmanager
def _ignore_sigterm() -> Iterator[None]:
    """Ignore SIGTERM: an agent that ends all processes because of one would else end what names it."""
    try:
        before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    except ValueError:  # only the main thread hears of any
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
