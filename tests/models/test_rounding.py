"""Stochastic rounding to bfloat16."""

from __future__ import annotations

import pytest
import torch

from luthier.models.rounding import round_to

ABOVE_ONE = 1 + 2**-7
"""The bfloat16 number next to 1."""


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_numbers_that_bfloat16_has_do_not_change() -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    exact = bits.view(torch.bfloat16)
    finite = exact[exact.isfinite()]
    rounded = round_to(finite.float(), torch.bfloat16, generator())
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(rounded.view(torch.int16), finite.view(torch.int16))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
def test_the_mean_is_kept(sign: int, share: float) -> None:
    count = 100_000
    values = torch.full((count,), sign * (1 + share * 2**-7))
    rounded = round_to(values, torch.bfloat16, generator()).float()
    assert set(rounded.tolist()) == {sign * 1.0, sign * ABOVE_ONE}
    up = float((rounded == sign * ABOVE_ONE).float().mean())
    assert abs(up - share) < 4 * (share * (1 - share) / count) ** 0.5


def test_small_steps_survive_as_a_sum() -> None:
    torch.manual_seed(0)
    base = torch.randn(100_000).bfloat16().float()
    step = 1e-4
    nearest = (base + step).bfloat16().float() - base
    rounded = round_to(base + step, torch.bfloat16, generator()).float() - base
    assert float(nearest.mean()) < 0.5 * step
    assert abs(float(rounded.mean()) - step) < 0.05 * step


def test_a_seed_gives_the_same_bits_and_another_seed_does_not() -> None:
    values = torch.randn(1000, generator=generator(5))
    first, again, other = (round_to(values, torch.bfloat16, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_other_types_are_rounded_to_nearest() -> None:
    values = torch.tensor([1.0, 1 + 2**-20, 3.14159])
    assert torch.equal(round_to(values, torch.float32, generator()), values)
    assert round_to(values, torch.float16, generator()).tolist() == [1.0, 1.0, 3.140625]


def test_the_shape_and_the_input_are_kept() -> None:
    values = torch.randn(4, 6).t()
    before = values.clone()
    assert round_to(values, torch.bfloat16, generator()).shape == (6, 4)
    assert torch.equal(values, before)
