"""PPO against the formulas: token rewards, advantages, whitening, clipped losses, the value head."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from luthier.data.conversations.reasoning import DecodedReply
from luthier.data.shapes.conversations import PromptOnly
from luthier.graders import Regex
from luthier.models.decoding.sampler import Completion
from luthier.models.load import as_network, load_model
from luthier.models.networks.network import Network
from luthier.models.process_group import ALONE
from luthier.models.tokenizer import load_chat_format
from luthier.objectives import PPO
from luthier.objectives.base import add_modules
from luthier.objectives.reinforcement.ppo import HEAD, advantages, whiten
from luthier.objectives.reinforcement.rollouts import Rollout, Rollouts
from luthier.types import Example

CPU = torch.device("cpu")
LETTER = Regex(pattern="e")
SIZES, SCORES, STOPPED = (4, 2, 5), (1.0, -0.5, 0.25), (True, True, False)


@pytest.fixture
def network(family_folder: Callable[[str], Path]) -> Network:
    folder = family_folder("llama")
    found = as_network(load_model(folder, torch.float32, CPU), CPU, torch.float32)
    found.chat = load_chat_format(folder)
    return found


def prompts(objective: PPO, network: Network) -> list[Example]:
    assert network.chat is not None
    rows = [
        PromptOnly("f", n + 1, prompt=text) for n, text in enumerate(("yes", "my card", "the fox"))
    ]
    return [objective.encode(row, n, network.chat) for n, row in enumerate(rows)]


def written(prompted: list[Example]) -> Rollouts:
    draw = np.random.default_rng(0)
    each = []
    for prompt, size, score, stopped in zip(prompted, SIZES, SCORES, STOPPED, strict=True):
        ids_T = draw.integers(5, 300, size)
        completion = Completion(ids_T, np.zeros(size, dtype=np.float32), stopped)
        each.append(Rollout(prompt, completion, DecodedReply("", ""), score))
    return Rollouts(each, 1)


def disturb(*models: Any) -> None:
    for model in models:
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for name, weight in sorted(model.named_parameters()):
                size = 0.3 if name.startswith(HEAD) else 0.03
                weight += size * torch.randn(weight.shape, generator=generator)


def read(model: Any, rollouts: Rollouts) -> tuple[list[Tensor], list[Tensor]]:
    """Log-probabilities and values of each completion, by transformers' own forward."""
    logps, values = [], []
    for rollout in rollouts.each:
        ids = torch.from_numpy(np.concatenate([rollout.prompt.ids_T, rollout.completion.ids_T]))
        size = len(rollout)
        hidden = model.model(ids[None]).last_hidden_state[0, -size - 1 : -1]
        logp = torch.log_softmax(model.lm_head(hidden).double(), -1)
        logps.append(logp[torch.arange(size), ids[-size:]])
        values.append(getattr(model, HEAD)(hidden)[:, 0].double())
    return logps, values


def estimates(reward: list[float], value: list[float], gamma: float, lam: float) -> list[float]:
    """Return equation 16 of the paper as a sum."""
    value = [*value, 0.0]
    delta = [reward[t] + gamma * value[t + 1] - value[t] for t in range(len(reward))]
    return [
        math.fsum((gamma * lam) ** (k - t) * delta[k] for k in range(t, len(delta)))
        for t in range(len(delta))
    ]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0)])
def test_advantages_are_the_sums_of_the_paper(gamma: float, lam: float) -> None:
    draw = torch.Generator().manual_seed(0)
    reward, value = torch.randn(7, generator=draw), torch.randn(7, generator=draw)
    found = advantages(reward, value, gamma, lam)
    expected = estimates(reward.tolist(), value.tolist(), gamma, lam)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_whitening_gives_mean_0_and_deviation_1() -> None:
    given = torch.tensor([1.0, 4.0, -2.0, 0.5])
    assert float(whiten(given, ALONE).mean()) == pytest.approx(0, abs=1e-6)
    assert float(whiten(given, ALONE).std()) == pytest.approx(1, rel=1e-5)
    assert float(whiten(given, ALONE, shift=False).mean()) == pytest.approx(float(given.mean()))
    assert whiten(torch.tensor([3.0]), ALONE).tolist() == [3.0]


CASES: list[dict[str, Any]] = [
    {"kl_coef": 0.0},
    {"kl_coef": 0.3, "gamma": 0.9},
    {"kl_coef": 0.1, "vf_coef": 0.7, "cliprange": 0.02, "cliprange_value": 0.05},
    {"whiten_rewards": True, "missing_eos_penalty": 1.5, "lam": 0.5},
]


@pytest.mark.parametrize("budget", [10_000, 20])
@pytest.mark.parametrize("fields", CASES, ids=str)
def test_loss_and_gradient_match_formula(
    fields: dict[str, Any],
    budget: int,
    network: Network,
    family_folder: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain: Any = load_model(family_folder("llama"), torch.float32, CPU)
    objective = PPO(**fields, grader=LETTER)
    for model in (network.model, plain):
        add_modules(model, objective.attach(model))
    prompted = prompts(objective, network)
    rollouts = written(prompted)
    monkeypatch.setattr(PPO, "roll_out", lambda *a, **k: rollouts)
    network.remember_start()
    with torch.no_grad():
        start, none = read(plain, rollouts)
        assert not any(value.any() for value in none)  # the head starts at 0
        disturb(network.model, plain)
        old, before = read(plain, rollouts)
        batches = objective.annotate(network, prompted, budget)
    disturb(network.model, plain)
    weight = sum(batch.weight for batch in batches)
    mine = sum(objective.loss(network, batch).total for batch in batches) / weight
    now, values = read(plain, rollouts)

    rewards = [-objective.kl_coef * (one - other) for one, other in zip(old, start, strict=True)]
    for reward, score, stopped in zip(rewards, SCORES, STOPPED, strict=True):
        reward[-1] += score - (0 if stopped else objective.missing_eos_penalty)
    if objective.whiten_rewards:
        together = torch.cat(rewards)
        rewards = list((together / together.std()).split(SIZES))
        shift = together.mean() - together.mean() / together.std()
        rewards = [reward + shift for reward in rewards]
    raw = [
        torch.tensor(estimates(r.tolist(), v.tolist(), objective.gamma, objective.lam)).double()
        for r, v in zip(rewards, before, strict=True)
    ]
    back = [a + v for a, v in zip(raw, before, strict=True)]
    together = torch.cat(raw)
    white = list(((together - together.mean()) / together.std()).split(SIZES))
    total = torch.zeros((), dtype=torch.float64)
    for n in range(len(SIZES)):
        ratio = (now[n] - old[n]).exp()
        near = ratio.clamp(1 - objective.cliprange, 1 + objective.cliprange)
        total = total + torch.max(-white[n] * ratio, -white[n] * near).sum()
        limit = objective.cliprange_value
        clipped = torch.max(torch.min(values[n], before[n] + limit), before[n] - limit)
        error = torch.max((values[n] - back[n]) ** 2, (clipped - back[n]) ** 2)
        total = total + objective.vf_coef * 0.5 * error.sum()
    expected = total / sum(SIZES)
    assert float(mine.detach()) == pytest.approx(float(expected.detach()), abs=2e-5)

    def gradients(loss: Tensor, model: Any) -> list[Tensor]:
        return list(torch.autograd.grad(loss, [w for _, w in sorted(model.named_parameters())]))

    pairs = zip(gradients(mine, network.model), gradients(expected, plain), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other.float(), rtol=1e-3, atol=3e-5)
    if objective.kl_coef:
        kl = sum(float((one - other).sum()) for one, other in zip(old, start, strict=True))
        metrics = objective.report(network, batches, []).metrics
        assert metrics["kl"] == pytest.approx(kl / sum(SIZES), abs=1e-5)


def test_steps_are_epochs_times_minibatches(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = PPO(num_ppo_epochs=3, num_mini_batches=2, grader=LETTER)
    add_modules(network.model, objective.attach(network.model))
    prompted = prompts(objective, network)
    monkeypatch.setattr(PPO, "roll_out", lambda *a, **k: written(prompted))
    with torch.no_grad():
        turns = list(objective.turns(objective.annotate(network, prompted, 1000)))
    rows = [sorted(row.row for b in turn for row in b.tree.examples) for turn in turns]
    assert rows == [[0, 2], [1]] * 3


def test_value_head_is_added_and_removed(network: Network) -> None:
    names = network.model.state_dict().keys()
    objective = PPO()
    add_modules(network.model, objective.attach(network.model))
    added = network.model.state_dict().keys() - names
    assert added == {f"{HEAD}.weight", f"{HEAD}.bias"}
    del network.model.value_head
    assert network.model.state_dict().keys() == names
