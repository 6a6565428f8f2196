"""Device, number type, threads and memory of this machine.

No heavy import at the top: a server checks the memory before loading any library.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
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
    from luthier.models.networks.heads import Head
    from luthier.models.networks.network import Network

Precision = Literal["auto", "bfloat16", "float32"]
GROUP = Path("/sys/fs/cgroup")
"""Folder of this process's control group (cgroup v2), with the limits of a container."""


@dataclass(frozen=True)
class Machine:
    """Device and number type of a run, with the reason for the choice."""

    device: torch.device
    dtype: torch.dtype
    """Number type of frozen weights, activations and matrix products."""
    threads: int
    reason: str


def choose_machine(precision: Precision = "auto", threads: int | None = None) -> Machine:
    """Choose the device and the number type, and set the thread count.

    ``threads`` is divided by the number of local processes.

    bfloat16 is used if the hardware computes bfloat16 natively (AVX512-BF16, AMX, ARM BF16, or a
    GPU with compute capability 8 or later). Elsewhere emulation would be slower than float32.
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
            # A bare "cuda" means the current device, which would be GPU 0 in every process.
            torch.cuda.set_device(device)
        name, several = torch.cuda.get_device_name(device), False
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        device, several = torch.device("cpu"), count != 1
        name = f"{count} CPU thread{'s' * several}"
        native = _cpu_has_bfloat16()
    if precision == "auto":
        dtype = torch.bfloat16 if native else torch.float32
        why = "native bfloat16" if native else "no native bfloat16"
        return Machine(device, dtype, count, f"{name}, {why}")
    if precision not in ("bfloat16", "float32"):
        raise RecipeError(f"unknown precision {precision!r}; use auto, bfloat16 or float32")
    return Machine(device, getattr(torch, precision), count, f"{name}; precision is set")


def open_network(stored: StoredModel, head: Head | None = None, precise: bool = False) -> Network:
    """Load ``stored`` for inference on the best device, with adapters merged.

    ``head`` overrides the model's own task. ``precise`` selects float32 if memory allows, because
    the rounding of merged weights moves small rewards.
    """
    import torch

    from luthier.files import folder_size
    from luthier.library.models import load
    from luthier.models.load import as_network

    machine = choose_machine()
    size = folder_size(stored.network_folder, ".safetensors") if precise else 0
    wide = precise and 4 * size < available_memory(machine.device)
    dtype = torch.float32 if wide else machine.dtype
    model = load(stored, dtype, machine.device, head)
    return as_network(model.eval(), machine.device, dtype)


def release_workers() -> None:
    """End the OpenMP worker threads of the calling thread. The next computation starts new workers.

    GNU OpenMP spins its waiting threads only while the threads do not outnumber the processors.
    With idle workers of another thread, each step took 1.4 times as long: every matrix product
    ended with a wake-up.
    """
    pause = _openmp_pause()
    if pause is not None:
        pause(_OMP_PAUSE_SOFT)


_OMP_PAUSE_SOFT = 1
"""``omp_pause_soft`` of OpenMP 5.0, which keeps the program's OpenMP settings."""


@cache
def _openmp_pause() -> Callable[[int], int] | None:
    """Return ``omp_pause_resource_all`` of torch's loaded OpenMP library, if available."""
    import torch

    for path in sorted((Path(torch.__file__).parent / "lib").glob("lib*omp*.so*")):
        with suppress(OSError, AttributeError):
            # RTLD_NOLOAD: a second OpenMP library would have its own threads.
            library = ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD)
            function: Callable[[int], int] = library.omp_pause_resource_all
            return function
    return None


def _cpu_has_bfloat16() -> bool:
    if platform.system() == "Linux":
        text = Path("/proc/cpuinfo").read_text(errors="replace")
        # "flags" on x86, "Features" on ARM.
        flags = next(
            (line for line in text.splitlines() if line.startswith(("flags", "Features"))), ""
        )
        return any(flag in flags.split() for flag in ("avx512_bf16", "amx_bf16", "bf16"))
    return False


def machine_name(device: torch.device) -> str:
    """Return a readable hardware name, equal for runs on the same hardware."""
    import psutil

    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    if platform.system() == "Linux":
        text = Path("/proc/cpuinfo").read_text(errors="replace")
        names = (line for line in text.splitlines() if line.startswith("model name"))
        name = next(names, f": {platform.machine()}").partition(":")[2].strip()
    memory = round(psutil.virtual_memory().total / 2**30)
    return f"{name}, {os.cpu_count()} cores, {memory} GiB"


SHARDED_MALLOC_THRESHOLD = 1 << 20
"""Threshold in bytes for sharded training. Gathered layers vary in size, and a fragmented heap used
twice the memory of whole layers."""


def keep_freed_memory(up_to: int = 1 << 30) -> None:
    """Configure glibc to keep freed blocks of at most ``up_to`` bytes and to return larger blocks
    at once.

    Activations are allocated and freed at every step. By default, the kernel maps and zeroes each
    block above 32 MiB again. Without glibc, the function does nothing.
    """
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        set_malloc_threshold(up_to)


KERNEL_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
"""Cache size variables of oneDNN and PyTorch, read when the libraries load."""
KERNELS, TRAINING_KERNELS = 128, 200
"""Matrix kernels in each cache for inference and for training; the libraries' default is 1,024. A
kernel uses half a megabyte or more. A step needs some dozens, and each micro-batch length has about
sixty of its own (docs/log/engine.md)."""


def limit_kernels(count: int = KERNELS) -> None:
    """Limit the kernel caches, so that ever new matrix sizes do not grow memory.

    Existing environment variables are kept. oneDNN reads the variable with the first kernel,
    PyTorch at import.
    """
    for name in KERNEL_CACHES:
        os.environ.setdefault(name, str(count))


def set_malloc_threshold(size: int) -> bool:
    """Set the block size for glibc to map from the system and to return at once.

    Returns:
        Whether the process uses glibc; without glibc, nothing is changed.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD. A set value switches off glibc's adaptive threshold.
    mmap_threshold, trim_threshold = -3, -1
    for option in (mmap_threshold, trim_threshold):
        ctypes.CDLL(None).mallopt(option, size)
    return True


def return_freed_memory() -> None:
    """Return freed blocks to the system. Without glibc, the function does nothing."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def forget_peak_memory() -> None:
    """Reset this process's peak of resident memory (Linux only). A GPU's peak is kept."""
    with suppress(OSError):
        # "5" resets the peak resident size (proc(5)).
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device | None = None) -> int:
    """Return the largest allocated memory of a GPU, or the largest resident size of this process,
    in bytes."""
    import resource

    if device is not None and device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):
        # Linux adds the memory of the parent at the start of the process to `ru_maxrss`.
        status = Path("/proc/self/status").read_text()
        if found := re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE):
            return 1024 * int(found[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts bytes, Linux kilobytes.
    return peak if platform.system() == "Darwin" else peak * 1024


def begin_peak_memory() -> int:
    """Give freed memory back to the system, reset the resident peak, and return the resident bytes."""
    import psutil

    return_freed_memory()
    forget_peak_memory()
    return int(psutil.Process().memory_info().rss)


def total_memory() -> int:
    """Return the machine's memory in bytes, or the limit of the control group if lower."""
    import psutil

    total = int(psutil.virtual_memory().total)
    limit = _limit()
    return total if limit is None else min(total, limit)


def available_memory(device: torch.device | None = None) -> int:
    """Return the bytes that this process may still allocate on a GPU, or on the machine within the
    control group's limit.

    Local processes of one training have equal shares of the machine and a GPU each.
    """
    import psutil

    if device is not None and device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    free = int(psutil.virtual_memory().available)
    limit = _limit()
    free = free if limit is None else max(0, min(free, limit - _used_bytes()))
    return free // ProcessGroup.of_environment().local_size


def _limit() -> int | None:
    try:
        text = (GROUP / "memory.max").read_text().strip()
    except OSError:
        return None
    # The file contains "max" if no limit is set.
    return int(text) if text.isdigit() else None


def _used_bytes() -> int:
    """Return the used bytes of the control group, without reclaimable file cache."""
    used = int((GROUP / "memory.current").read_text())
    for line in (GROUP / "memory.stat").read_text().splitlines():
        name, _, value = line.partition(" ")
        if name == "inactive_file":
            used -= int(value)
    return used
