"""Convolutions with correct results in bfloat16 on CPUs.

oneDNN 3.12 (PyTorch 2.13) computes some convolutions incorrectly on CPUs with native bfloat16.
Outputs of about one shape in a hundred are unrelated to the input, and kernel gradients accumulate
uninitialized memory: one run in thirty ended with a different loss or nan. Among 70,000 random
shapes with odd kernels and padding of half the kernel, only strides to an output of width 1 failed.
All other shapes of this kind run in bfloat16; the remaining shapes run in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int] | str,
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Return ``F.conv1d`` or ``F.conv2d`` of ``x [R, C, (H,) W]`` in the data type of ``x``.

    Sequence arguments have one number per axis, height first.
    """
    dtype = x.dtype
    if (
        dtype == torch.bfloat16
        and x.device.type == "cpu"
        and not _right_in_bfloat16(x.shape[-1], weight.shape[2:], stride, padding, dilation)
    ):
        x, weight, bias = x.float(), weight.float(), None if bias is None else bias.float()
    function: Any = F.conv1d if weight.dim() == 3 else F.conv2d
    y: Tensor = function(x, weight, bias, stride, padding, dilation, groups)
    return y.to(dtype)


def _right_in_bfloat16(
    width: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int] | str,
    dilation: Sequence[int],
) -> bool:
    """Return True for shapes with correct results in every bfloat16 test."""
    # Padding "same" and "valid" was not among the tested shapes.
    if isinstance(padding, str):
        return False
    half = all(2 * p + 1 == k for p, k in zip(padding, kernel, strict=True))
    # The output width is ceil(width / stride) here, so width > stride excludes width 1.
    return half and set(dilation) == {1} and (stride[-1] == 1 or width > stride[-1])


class Convolution(nn.modules.conv._ConvNd):
    """The mixin that :func:`fix_convolutions` adds to a layer's class."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding: Sequence[int] | str = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = (0,) * len(self.kernel_size)
        return convolve(input, weight, bias, self.stride, padding, self.dilation, self.groups)


def fix_convolutions(model: nn.Module) -> None:
    """Let the convolutions of ``model`` compute by :func:`convolve`; names and weights stay."""
    for module in model.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d) and not isinstance(module, Convolution):
            kind: Any = type(module)
            # A subclass in place keeps weights, hooks and `isinstance` checks of the network.
            module.__class__ = _convolution_class(kind)


@cache
def _convolution_class(kind: Any) -> Any:
    return type(kind.__name__, (Convolution, kind), {"__module__": kind.__module__})
