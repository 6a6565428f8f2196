"""Description of the output of an ONNX file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class OnnxOutput:
    """The output of an ONNX file. :mod:`luthier.exports.onnx` builds the graph."""

    name: str
    axes: tuple[str, ...]
    meaning: str
    """Description for ``onnx.json``."""
    graph: Literal["scores", "number", "text_embedding", "media_embedding"]
    """Graph on top of the network."""
    reads: Literal["row_scores", "token_scores", "predictions"]
    """Values of the network, or predictions of the objective, equal to the output."""
    code: str
    """Example code that prints ``answer``."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the graph."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Additional members of ``onnx.json``."""
    unit: float | None = None
    """Unit of differences; by default the largest output."""
    takes_words: bool = False
    """True if the example code tokenizes lists of words."""
    takes_conversations: bool = False
    """True if models with a chat template score conversations."""
