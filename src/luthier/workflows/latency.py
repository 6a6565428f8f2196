"""Time per answer of several models, without the effect of the order of measurement."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

ROUNDS = 5
SECONDS = 30.0
"""Time limit per model. After the limit, no new round starts."""


def measure_latency(passes: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Return the seconds of each function, such as one pass of a loaded model over the same rows.

    The first call of each function is a warm-up: it loads kernels and fills caches, which took four
    times as long as the answers of a small encoder. The functions then run in turn for up to
    :data:`ROUNDS` rounds, in alternating order. The least time of a function counts, as in
    ``timeit``: longer times come from other processes.
    """
    names, least = list(passes), dict[str, float]()
    for each in passes.values():
        each()
    until = time.perf_counter() + SECONDS * len(names)
    for number in range(ROUNDS):
        if number and time.perf_counter() > until:
            break
        for name in names if number % 2 else reversed(names):
            began = time.perf_counter()
            passes[name]()
            seconds = time.perf_counter() - began
            least[name] = min(seconds, least.get(name, seconds))
    return least
