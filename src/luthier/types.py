"""Plain data that crosses seams. No logic, no heavy imports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    """``system``, ``user``, ``assistant`` or ``tool``."""
    content: str


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a data set, checked and in one of three shapes.

    ``messages`` is set for chat rows, ``prompt`` and ``completion`` for pairs, ``text`` for raw
    text; the other fields are ``None``.
    """

    file: str
    line: int
    """1-based line in ``file``; 1 for a plain-text file, which is one row."""
    messages: tuple[Message, ...] | None = None
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None


@dataclass(frozen=True, slots=True)
class Example:
    """A row as token ids, with how much each token counts in the loss.

    ``weight_T[t]`` is the weight of predicting ``ids_T[t]`` from ``ids_T[:t]``. The first token
    has nothing before it, so ``weight_T[0]`` is always 0.
    """

    ids_T: IntArray
    weight_T: FloatArray
    row: int
    """Index of the row in the data set, for messages and caching."""

    def __len__(self) -> int:
        return len(self.ids_T)


@dataclass(frozen=True, slots=True)
class Loss:
    """A **sum** over the micro-batch. Only the engine divides, once, by the global weight."""

    total: Any
    """Scalar tensor with a gradient."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Further sums, divided by the same weight before they are shown."""
