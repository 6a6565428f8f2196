"""Random numbers as functions of a seed and their purpose.

No generator lives through a run. A resumed run therefore draws the same numbers as an uninterrupted
run, and several processes draw the same numbers as one process. Numbers for a row or micro-batch
depend neither on earlier draws nor on the process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from luthier.types import Example

if TYPE_CHECKING:
    import torch


def derive_seed(*numbers: int) -> int:
    """Return a seed derived from nonnegative ``numbers``. Different numbers give different seeds."""
    low, high = np.random.SeedSequence(numbers).generate_state(2).tolist()
    # 63 bits, so that a seed fits a signed 64-bit integer.
    seed: int = high >> 1 << 32 | low
    return seed


def draw_seeds(count: int, generator: torch.Generator | None = None) -> list[int]:
    """Return ``count`` seeds from ``generator``, by default torch's global generator.

    The global state is equal in all processes at the start of a step. Draw shared seeds before any
    computation: dropout advances the generator differently in each process.
    """
    import torch

    device = "cpu" if generator is None else generator.device
    seeds: list[int] = torch.randint(2**62, (count,), generator=generator, device=device).tolist()
    return seeds


def draw_seed() -> int:
    """Return one seed of :func:`draw_seeds`."""
    return draw_seeds(1)[0]


def row_generators(rows: Sequence[Example], seed: int | None) -> list[np.random.Generator]:
    """Return a generator per row, from ``seed`` and the row's index.

    Without a seed, the generator depends on the row's first token only. For one-token rows such as
    images, the generator is then independent of the batch.
    """
    if seed is None:
        return [np.random.default_rng(int(row.ids_T[0])) for row in rows]
    return [np.random.default_rng([seed, row.row]) for row in rows]


@contextmanager
def leave_undrawn() -> Iterator[None]:
    """Skip the initialization of weights that are loaded right after creation.

    Affects this thread's draws from torch's global generator only.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    class Undrawn(TorchFunctionMode):
        def __torch_function__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            given = kwargs or {}
            # Draws from a generator of their own do not advance the global state.
            if function in drawing and given.get("generator") is None:
                return given["tensor"] if "tensor" in given else args[0]
            return function(*args, **given)

    init, tensor = torch.nn.init, torch.Tensor
    drawing = {init.kaiming_uniform_, init.normal_, init.uniform_, tensor.normal_, tensor.uniform_}
    with Undrawn():
        yield


def seed_torch(seed: int) -> None:
    """Seed the CPU and all GPUs like ``torch.manual_seed``.

    ``torch.manual_seed`` records the stack for each missing device type: 1.5 ms per step.
    """
    import torch

    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed)


@contextmanager
def drawn_from(seed: int, device: torch.device) -> Iterator[None]:
    """Draw torch's random numbers from ``seed`` inside the context, and restore the state
    afterwards."""
    import torch

    # By default, fork_rng saves the state of every GPU.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        seed_torch(seed)
        yield
