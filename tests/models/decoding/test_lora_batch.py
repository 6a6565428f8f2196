"""LoRA adapters on one base network in joint batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from luthier.adaptations import LoRA
from luthier.errors import RecipeError
from luthier.models.decoding import packing
from luthier.models.decoding.backends import Backend
from luthier.models.decoding.torch_backend import FlatBackend
from luthier.models.load import as_network, load_model

CPU = torch.device("cpu")
PROMPTS = [np.arange(5, 5 + size) % 250 + 3 for size in (1, 7, 31, 33, 64)]
KINDS = [
    LoRA(rank=4),
    LoRA(rank=4),
    LoRA(rank=1, rslora=True),
    LoRA(rank=4, layers_to_transform=(1,), alpha=7.0),
]


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def base_network(folder: Path) -> Any:
    return as_network(load_model(folder, torch.float32, CPU).eval(), CPU, torch.float32)


def drawn(adaptation: Any, seed: int) -> Callable[[Any], None]:
    """Return a function that attaches ``adaptation`` with weights far from the initialization."""

    def attach(model: Any) -> None:
        torch.manual_seed(seed)
        adaptation.attach(model)
        for weight in model.parameters():
            if weight.requires_grad:
                weight += 0.3 * torch.randn(weight.shape)

    return attach


def logits_of(backends: list[Backend], prompts: list[Any], count: int) -> list[torch.Tensor]:
    """Return logits ``[count + 1, V]`` per prompt and backend, in joint steps."""
    states = [each.open(ids) for each, ids in zip(backends, prompts, strict=True)]
    ends: list[Any] = [None] * len(states)
    while left := [place for place, end in enumerate(ends) if end is None]:
        found = backends[0].prefill([states[place] for place in left])
        for place, end in zip(left, found, strict=True):
            ends[place] = end
    states = [own for state in states for own in backends[0].fork(state, 1)]
    rows = [[end] for end in ends]
    for step in range(count):
        logits = backends[0].step(states, [20 + step] * len(states))
        for own, logits_V in zip(rows, logits, strict=True):
            own.append(logits_V)
    for state in states:
        backends[0].free(state)
    return [torch.stack(own) for own in rows]


def shared(network: Any, base: FlatBackend, kinds: list[Any]) -> list[Backend]:
    return [
        base.with_adapter(network.with_adapter(drawn(kind, seed)), 512)
        for seed, kind in enumerate(kinds)
    ]


@pytest.mark.parametrize(
    ("family", "packed"),
    [
        ("llama", True),
        ("gpt2", False),
        pytest.param("llama", False, marks=pytest.mark.slow),
        pytest.param("gpt2", True, marks=pytest.mark.slow),
    ],
)
def test_batched_adapter_rows_match_adapted_network(
    family: str,
    packed: bool,
    family_folder: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Several shapes, several rows of some adapters, and the base network, together and alone."""
    if packed:
        monkeypatch.setattr(packing, "SMALLEST", 0)
    folder = family_folder(family)
    network = base_network(folder)
    base = FlatBackend(network, 512)
    assert (base._llama is None) == (family == "gpt2")
    backends: list[Backend] = [base, *shared(network, base, KINDS)]
    rows = [*backends, backends[1], backends[1], base, backends[4]]
    prompts = [PROMPTS[place % len(PROMPTS)] for place in range(len(rows))]
    together = logits_of(rows, prompts, 6)
    for place, (backend, ids) in enumerate(zip(rows, prompts, strict=True)):
        own = base_network(folder)
        if backend is not base:
            seed = backends.index(backend) - 1
            drawn(KINDS[seed], seed)(own.model)
        (expected,) = logits_of([FlatBackend(own, 512)], [ids], 6)
        assert torch.allclose(together[place], expected, atol=2e-4), place
        (alone,) = logits_of([backend], [ids], 6)
        assert torch.allclose(alone, expected, atol=2e-4), place
    distinct = logits_of(backends, [PROMPTS[1]] * len(backends), 0)
    assert all(not torch.allclose(distinct[0], each, atol=1e-2) for each in distinct[1:])
    for adapted in backends[1:]:
        adapted.close()
    assert not base._batch._stacks


@pytest.mark.slow
def test_many_adapters_come_and_go(family_folder: Callable[[str], Path]) -> None:
    """Adapters move in the stack; sequences keep their adapter until they end."""
    network = base_network(family_folder("llama"))
    base = FlatBackend(network, 512)
    kinds = [LoRA(rank=2)] * 12
    adapted = shared(network, base, kinds)
    expected = logits_of(adapted, [PROMPTS[1]] * 12, 3)
    (stack,) = base._batch._stacks.values()
    going = adapted[1].open(PROMPTS[1])
    (first,) = adapted[1].prefill([going])
    assert first is not None
    for place in (0, 1, 5, 11, 7, 8, 9, 10):
        adapted[place].close()
    assert len(stack.adapters) == 1 + 4 + 1
    (own,) = base.fork(going, 1)
    assert torch.allclose(base.step([own], [20])[0], expected[1][1], atol=1e-4)
    base.free(own)
    assert len(stack.adapters) == 1 + 4
    capacity = next(iter(stack.weights.values()))[0].shape[0]
    assert capacity <= 8
    left = [2, 3, 4, 6]
    found = logits_of([adapted[place] for place in left], [PROMPTS[1]] * 4, 3)
    for place, logits in zip(left, found, strict=True):
        assert torch.allclose(logits, expected[place], atol=1e-4)
    again = base.with_adapter(network.with_adapter(drawn(kinds[5], 5)), 512)
    assert torch.allclose(logits_of([again], [PROMPTS[1]], 3)[0], expected[5], atol=1e-4)


def test_adapter_of_different_network_is_refused(family_folder: Callable[[str], Path]) -> None:
    network, other = (base_network(family_folder("llama")) for _ in range(2))
    with pytest.raises(RecipeError) as refused:
        FlatBackend(network, 512).with_adapter(other.with_adapter(drawn(LoRA(rank=2), 0)), 512)
    assert refused.value.rule == "adapter.layer"
