"""Convolutions that give the right numbers in bfloat16 on a CPU.

oneDNN 3.12, which PyTorch 2.13 brings, computes some of them wrongly where the processor has bfloat16
in silicon: the output of one shape in a hundred has nothing to do with the input, and gradients of
kernels add up memory that nobody wrote, so that one run in thirty ended at another loss, or at nan. Of
70,000 random shapes with odd kernels, padded by half of them on both sides, only those were wrong that
stride to an output of width 1; the others keep bfloat16, and everything else goes through float32.
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
    """``F.conv1d`` or ``F.conv2d`` of ``x [R, C, (H,) W]``, whose output has the type of ``x``.

    The sequences have a number for each axis, of rows first.
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
    """Whether this shape is of the kind that was always right."""
    if isinstance(padding, str):
        return False
    half = all(2 * p + 1 == k for p, k in zip(padding, kernel, strict=True))
    return half and set(dilation) == {1} and (stride[-1] == 1 or width > stride[-1])


class Convolution(nn.modules.conv._ConvNd):
    """What :func:`mend_convolutions` adds to a layer's class."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding: Sequence[int] | str = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = (0,) * len(self.kernel_size)
        return convolve(input, weight, bias, self.stride, padding, self.dilation, self.groups)


def mend_convolutions(model: nn.Module) -> None:
    """Let the convolutions of ``model`` compute by :func:`convolve`; names and weights stay."""
    for module in model.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d) and not isinstance(module, Convolution):
            kind: Any = type(module)
            module.__class__ = _convolution_class(kind)


@cache
def _convolution_class(kind: Any) -> Any:
    return type(kind.__name__, (Convolution, kind), {"__module__": kind.__module__})
