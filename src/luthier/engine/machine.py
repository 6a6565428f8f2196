"""What this machine computes with: device, native number type, threads, memory.

Nothing heavy is imported at the top: a server asks for memory before it loads anything.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from luthier.errors import RecipeError
from luthier.models.process_group import ProcessGroup

if TYPE_CHECKING:
    import torch

    from luthier.library.models import StoredModel
    from luthier.models.heads import Head
    from luthier.models.network import Network

Precision = Literal["auto", "bfloat16", "float32"]
GROUP = Path("/sys/fs/cgroup")
"""What the kernel tells of this process's control group, as a container's (cgroup v2)."""


@dataclass(frozen=True)
class Machine:
    """Where and in what type a run computes, and why."""

    device: torch.device
    dtype: torch.dtype
    """Type of frozen weights, activations and matrix products."""
    threads: int
    reason: str


def choose_machine(precision: Precision = "auto", threads: int | None = None) -> Machine:
    """Pick the device and the widest type it multiplies natively; set the thread count.

    Of ``threads`` each of several processes on this machine has its share.

    bfloat16 is used where the processor has it in silicon (AVX512-BF16, AMX, ARM BF16, a GPU of
    compute capability 8 or later) and float32 elsewhere, where emulation would be slower.
    """
    import torch

    group = ProcessGroup.of_environment()
    if threads is not None:
        torch.set_num_threads(max(1, threads // group.local_size))
    count = torch.get_num_threads()
    if torch.cuda.is_available():
        device = torch.device("cuda")
        if group.size > 1:
            device = torch.device("cuda", group.local_rank % torch.cuda.device_count())
            torch.cuda.set_device(device)
        name, several = torch.cuda.get_device_name(device), False
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        device, several = torch.device("cpu"), count != 1
        name = f"{count} CPU thread{'s' * several}"
        native = _cpu_has_bfloat16()
    if precision == "auto":
        dtype = torch.bfloat16 if native else torch.float32
        if native:
            why = f"{'multiply' if several else 'multiplies'} bfloat16 natively"
        else:
            why = f"{'have' if several else 'has'} no native bfloat16"
        return Machine(device, dtype, count, f"{name}, which {why}")
    if precision not in ("bfloat16", "float32"):
        raise RecipeError(f"unknown precision {precision!r}; use auto, bfloat16 or float32")
    return Machine(device, getattr(torch, precision), count, f"{name}; precision was asked for")


def open_network(stored: StoredModel, head: Head | None = None, precise: bool = False) -> Network:
    """``stored`` with its adapters merged on the best device, to answer and not to learn.

    ``head`` is what it is opened for: its own task when not given. ``precise`` takes float32 where
    memory allows, as rounding merged weights moves small rewards.
    """
    import torch

    from luthier.files import folder_size
    from luthier.library.models import load
    from luthier.models.load import as_network

    machine = choose_machine()
    size = folder_size(stored.network_folder, ".safetensors") if precise else 0
    wide = precise and 4 * size < available_memory()
    dtype = torch.float32 if wide else machine.dtype
    model = load(stored, dtype, machine.device, head)
    return as_network(model.eval(), machine.device, dtype)


def release_workers() -> None:
    """End the threads that OpenMP keeps for the calling one, which has computed; it may do so again.

    GNU's library lets its threads wait for the next product without sleeping only as long as it has no
    more of them than there are processors. Beside the idle ones of a thread that had loaded a model,
    each step of another's took 1.4 times as long: every product ended with waking somebody.
    """
    pause = _openmp_pause()
    if pause is not None:
        pause(_OMP_PAUSE_SOFT)


_OMP_PAUSE_SOFT = 1
"""``omp_pause_soft`` of OpenMP 5.0: what the program has set stays."""


@cache
def _openmp_pause() -> Callable[[int], int] | None:
    """``omp_pause_resource_all`` of the OpenMP library that torch computes with, where it has one."""
    import torch

    for path in sorted((Path(torch.__file__).parent / "lib").glob("lib*omp*.so*")):
        with suppress(OSError, AttributeError):
            library = ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD)  # only what is there already
            function: Callable[[int], int] = library.omp_pause_resource_all
            return function
    return None


def _cpu_has_bfloat16() -> bool:
    if platform.system() == "Linux":
        text = Path("/proc/cpuinfo").read_text(errors="replace")
        flags = next(
            (line for line in text.splitlines() if line.startswith(("flags", "Features"))), ""
        )
        return any(flag in flags.split() for flag in ("avx512_bf16", "amx_bf16", "bf16"))
    return False


def machine_name(device: torch.device) -> str:
    """What is the same for runs that compute with the same hardware, for people to read."""
    import psutil

    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    found = platform.processor() or platform.machine()
    if platform.system() == "Linux":
        text = Path("/proc/cpuinfo").read_text(errors="replace")
        named = (line for line in text.splitlines() if line.startswith("model name"))
        found = next(named, f": {platform.machine()}").partition(":")[2].strip()
    memory = round(psutil.virtual_memory().total / 2**30)
    return f"{found}, {os.cpu_count()} cores, {memory} GiB"


SHARDED_MALLOC_THRESHOLD = 1 << 20
"""Where layers are gathered from shards: they come in all sizes, and a heap that was full of holes of
them held twice as much as whole layers take."""


def keep_freed_memory(up_to: int = 1 << 30) -> None:
    """Ask glibc to keep freed blocks of at most ``up_to`` bytes, and to return larger ones at once.

    Activations are allocated and freed at every step; by default each one above 32 MiB is mapped
    and zeroed by the kernel again. Elsewhere than on glibc this does nothing.
    """
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        set_malloc_threshold(up_to)


KERNEL_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
"""Variables of oneDNN, and of PyTorch above it, which it reads when it is loaded."""
KERNELS, TRAINING_KERNELS = 128, 200
"""Matrix kernels that each of the two keeps, of 1,024 by itself, where something is asked and where it
learns. One takes half a megabyte or more; a step needs some dozens, and each length of a micro-batch
has some sixty of its own (docs/log/engine.md)."""


def limit_kernels(count: int = KERNELS) -> None:
    """Keep memory flat where products come in ever new sizes; numbers in the environment stay.

    oneDNN reads its own when it makes its first kernel, PyTorch when it is loaded.
    """
    for name in KERNEL_CACHES:
        os.environ.setdefault(name, str(count))


def set_malloc_threshold(size: int) -> bool:
    """Have glibc take larger blocks than ``size`` bytes from the system, and keep no more freed ones.

    Returns whether there is glibc: elsewhere nothing is done.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mmap_threshold, trim_threshold = -3, -1
    for option in (mmap_threshold, trim_threshold):
        ctypes.CDLL(None).mallopt(option, size)
    return True


def return_freed_memory() -> None:
    """Give freed blocks that the process keeps back to the system. Elsewhere than on glibc, nothing."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def forget_peak_memory() -> None:
    """Let :func:`peak_memory` begin anew, where the system can (Linux); elsewhere it goes on."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Largest resident size this process has had, in bytes."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def begin_peak_memory() -> int:
    """Let :func:`peak_memory` begin anew without what was freed before; bytes that are resident now."""
    import psutil

    return_freed_memory()
    forget_peak_memory()
    return int(psutil.Process().memory_info().rss)


def total_memory() -> int:
    """Bytes of the machine, or of its control group if that has less."""
    import psutil

    total = int(psutil.virtual_memory().total)
    limit = _limit()
    return total if limit is None else min(total, limit)


def available_memory() -> int:
    """Bytes this process may still take: the machine's, or its control group's if that is less.

    Processes that train one network together have equal parts of it.
    """
    import psutil

    free = int(psutil.virtual_memory().available)
    limit = _limit()
    free = free if limit is None else max(0, min(free, limit - _used_bytes()))
    return free // ProcessGroup.of_environment().local_size


def _limit() -> int | None:
    try:
        text = (GROUP / "memory.max").read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _used_bytes() -> int:
    """Bytes in use that the kernel cannot take back at once: files that were read are given up."""
    used = int((GROUP / "memory.current").read_text())
    for line in (GROUP / "memory.stat").read_text().splitlines():
        name, _, value = line.partition(" ")
        if name == "inactive_file":
            used -= int(value)
    return used
