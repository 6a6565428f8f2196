"""How much memory and disk a run will take, before anything is loaded for it.

Memory = the process itself + frozen weights + trained weights with their masters, moments and sums
+ activations of one micro-batch + one chunk of logits. It is never less than the plain network takes,
which is loaded first, and again to check what was saved. The constants were fitted on this code's own
runs (``docs/log/estimates.md``); the estimate errs upwards.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from luthier.adaptations import Adaptation

PROCESS = 480_000_000
"""Resident bytes of Python with PyTorch and transformers loaded."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes a run takes: ``fixed``, and ``per_token`` for each token of a micro-batch."""

    fixed: int
    per_token: int
    least: int = 0
    """What loading and checking take, whatever is trained."""

    def beside(self, further: int) -> MemoryEstimate:
        """The same with ``further`` bytes that are held from the first step to the last."""
        return replace(self, fixed=self.fixed + further)

    def peak(self, tokens: int) -> int:
        """Estimated peak in bytes with micro-batches of ``tokens`` tokens."""
        return max(self.least, self.fixed + self.per_token * tokens)


def weight_bytes(model: Any, bytes_per_number: int) -> int:
    """Bytes of a network: weights in the working type, buffers in their own.

    Buffers are what no precision applies to: tables of positions, and weights that are quantized.
    """
    weights = sum(weight.numel() for weight in model.parameters()) * bytes_per_number
    return int(weights + sum(buffer.nbytes for buffer in model.buffers()))


def trained_numbers(model: Any) -> int:
    """How many numbers of a network train."""
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


def estimate_memory(
    model: Any, bytes_per_number: int, plain: int = 0, calibration: int = 0
) -> MemoryEstimate:
    """Estimate for a network whose trained weights are marked (it may live on the meta device).

    ``plain`` is what :func:`weight_bytes` gave for it before anything was attached, ``calibration``
    what the adaptation takes beside the network before the optimizer is made.
    """
    trained = trained_numbers(model)
    config = model.config
    hidden = int(config.hidden_size)
    layers = int(config.num_hidden_layers) + int(getattr(config, "num_decoder_layers", None) or 0)
    inner = int(getattr(config, "intermediate_size", None) or 4 * hidden)
    vocabulary = int(config.vocab_size)
    # master, two moments, sum of gradients in float32; gradient and best copy in the working type
    optimizer = trained * (16 + 2 * bytes_per_number)
    logits = 128 * vocabulary * (8 + 2 * bytes_per_number)
    weights = weight_bytes(model, bytes_per_number)
    activations = layers * (11 * hidden + 4 * inner) * bytes_per_number
    least = PROCESS + max(plain, weights + calibration if calibration else 0)
    return MemoryEstimate(PROCESS + weights + optimizer + logits, activations, least)


def disk_needed(model: Any, bytes_per_number: int, adaptation: Adaptation) -> int:
    """Bytes of two checkpoints and the custom model, with a tenth to spare."""
    trained = trained_numbers(model)
    total = sum(w.numel() for w in model.parameters())
    saved = total if adaptation.stores_network else trained
    checkpoint = trained * (12 + bytes_per_number)
    return int(1.1 * (3 * checkpoint + saved * bytes_per_number)) + 20_000_000
