"""Stochastic rounding to bfloat16."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from luthier.models.rounding import CHUNK, Rounding

ABOVE_ONE = 1 + 2**-7
"""The bfloat16 number next to 1."""


def to_bfloat16(values: Tensor, rounding: Rounding | None = None) -> Tensor:
    return (rounding or Rounding())(values.clone(), torch.bfloat16)


def test_exact_bfloat16_values_do_not_change() -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    exact = bits.view(torch.bfloat16)
    finite = exact[exact.isfinite()]
    rounded = to_bfloat16(finite.float())
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(rounded.view(torch.int16), finite.view(torch.int16))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
def test_stochastic_rounding_preserves_mean(sign: int, share: float) -> None:
    count = 100_000
    rounded = to_bfloat16(torch.full((count,), sign * (1 + share * 2**-7))).float()
    assert set(rounded.tolist()) == {sign * 1.0, sign * ABOVE_ONE}
    up = float((rounded == sign * ABOVE_ONE).float().mean())
    assert abs(up - share) < 4 * (share * (1 - share) / count) ** 0.5


def test_small_steps_survive_as_a_sum() -> None:
    torch.manual_seed(0)
    base = torch.randn(300, 400).bfloat16().float()
    step = 1e-4
    nearest = (base + step).bfloat16().float() - base
    rounded = to_bfloat16(base + step).float() - base
    assert float(nearest.mean()) < 0.5 * step
    assert abs(float(rounded.mean()) - step) < 0.05 * step


def test_parts_of_long_tensors_round_differently() -> None:
    half_way = torch.full((3 * CHUNK,), 1 + 0.5 * 2**-7)
    kept = half_way.clone()
    ups = (to_bfloat16(half_way) == ABOVE_ONE).view(3, CHUNK)
    assert torch.equal(half_way, kept)
    assert abs(float(ups.float().mean()) - 0.5) < 0.002
    assert 0.45 < float((ups[0] == ups[1]).float().mean()) < 0.55


def test_every_run_gives_the_same_bits() -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(5))
    sizes = (1000, 10, 400)

    def all_rounded() -> list[Tensor]:
        rounding = Rounding()
        return [to_bfloat16(values[:size], rounding) for size in sizes]

    torch.manual_seed(1)
    first = all_rounded()
    torch.manual_seed(2)
    for mine, again in zip(first, all_rounded(), strict=True):
        assert torch.equal(mine, again)


def test_tensors_of_a_run_round_differently() -> None:
    rounding = Rounding()
    half_way = torch.full((2000,), 1 + 0.5 * 2**-7)
    ups = [to_bfloat16(half_way, rounding) == ABOVE_ONE for _ in range(4)]
    for before in range(4):
        for after in range(before):
            agreement = float((ups[before] == ups[after]).float().mean())
            assert 0.4 < agreement < 0.6


def test_float32_and_float16_round_to_nearest() -> None:
    values = torch.tensor([1.0, 1 + 2**-20, 3.14159])
    assert torch.equal(Rounding()(values, torch.float32), values)
    assert Rounding()(values, torch.float16).tolist() == [1.0, 1.0, 3.140625]


def test_transposed_tensor_keeps_shape() -> None:
    values = torch.arange(24.0).view(4, 6).t()
    target = torch.zeros(4, 6, dtype=torch.bfloat16).t()
    Rounding().into(target, values)
    assert torch.equal(target.float(), values)
    assert torch.equal(to_bfloat16(values).float(), values)
