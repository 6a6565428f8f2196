"""Random numbers and skipped initializations."""

from __future__ import annotations

import torch

from luthier.models import random_numbers


def test_leave_undrawn_skips_random_draws() -> None:
    torch.manual_seed(0)
    with random_numbers.leave_undrawn():
        layer = torch.nn.Linear(3, 2)
        torch.nn.init.zeros_(layer.bias)
        drawn = torch.empty(4).normal_(generator=torch.Generator().manual_seed(1))
    assert layer.bias.tolist() == [0, 0]
    assert torch.equal(drawn, torch.empty(4).normal_(generator=torch.Generator().manual_seed(1)))
    after = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(3), after)
