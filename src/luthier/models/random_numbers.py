"""What a run draws at random: functions of its seed, and of what the numbers are for.

No generator runs through a run from its first step to its last. So a run that goes on draws what it
would have drawn, and several processes draw what one would: the numbers of a row or of a micro-batch
depend neither on what was drawn before them nor on who computes it.
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
    """A seed for what these numbers from 0 on stand for; where one is another, so is the seed."""
    low, high = np.random.SeedSequence(numbers).generate_state(2).tolist()
    seed: int = high >> 1 << 32 | low
    return seed


def draw_seeds(count: int, generator: torch.Generator | None = None) -> list[int]:
    """``count`` seeds from ``generator``, or from torch's own.

    Its state is the same in all processes at the beginning of a step. What is drawn there for all of
    them is drawn before anything is computed: dropout draws from it, too, and otherwise in each.
    """
    import torch

    device = "cpu" if generator is None else generator.device
    seeds: list[int] = torch.randint(2**62, (count,), generator=generator, device=device).tolist()
    return seeds


def draw_seed() -> int:
    """One of :func:`draw_seeds`."""
    return draw_seeds(1)[0]


def row_generators(rows: Sequence[Example], seed: int | None) -> list[np.random.Generator]:
    """A generator for each row, of ``seed`` and the number of the row.

    Without a seed it is of the row's first token alone: for rows of one, as images are, it is always
    the same then, beside whatever they are read.
    """
    if seed is None:
        return [np.random.default_rng(int(row.ids_T[0])) for row in rows]
    return [np.random.default_rng([seed, row.row]) for row in rows]


@contextmanager
def leave_undrawn() -> Iterator[None]:
    """Let weights that are made in the block be what their memory held, where others follow at once.

    Of what this thread draws with torch's own generator: not what a generator is named for.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    class Undrawn(TorchFunctionMode):
        def __torch_function__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            given = kwargs or {}
            if function in drawing and given.get("generator") is None:
                return given["tensor"] if "tensor" in given else args[0]
            return function(*args, **given)

    init, tensor = torch.nn.init, torch.Tensor
    drawing = {init.kaiming_uniform_, init.normal_, init.uniform_, tensor.normal_, tensor.uniform_}
    with Undrawn():
        yield


def seed_torch(seed: int) -> None:
    """Set the generators of the processor and of all GPUs, as ``torch.manual_seed`` does.

    That writes down the stack for each kind of device that is not there: 1.5 ms, in each step.
    """
    import torch

    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed)


@contextmanager
def drawn_from(seed: int, device: torch.device) -> Iterator[None]:
    """Draw what torch draws meanwhile from ``seed``; what follows is drawn as without this."""
    import torch

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        seed_torch(seed)
        yield
