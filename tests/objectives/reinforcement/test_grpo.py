"""GRPO against the formula, against TRL's numbers, and the layout of completions."""

from __future__ import annotations

import itertools
import json
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from luthier.data.conversations.reasoning import DecodedReply
from luthier.data.shapes.conversations import PromptCompletion
from luthier.models.decoding.sampler import Completion
from luthier.models.load import as_network, load_model
from luthier.models.networks.network import Network
from luthier.models.tokenizer import load_chat_format
from luthier.objectives import GRPO, logprobs
from luthier.objectives.reinforcement.rollouts import PolicyBatch, Rollout, Rollouts
from luthier.types import Example

CPU = torch.device("cpu")
TRL = Path(__file__).parents[2] / ".venv-trl" / "bin" / "python"
PROMPTS = ("say yes", "my card")
SCORES = ((1.0, 0.0, 0.25), (0.5, 0.5, 0.5))
SIZES = ((3, 5, 2), (4, 1, 2))
STOPPED = ((True, False, True), (True, True, True))
LOSSES = ("grpo", "dapo", "dr_grpo")


@pytest.fixture
def network(family_folder: Callable[[str], Path]) -> Network:
    folder = family_folder("llama")
    torch.manual_seed(0)
    found = as_network(load_model(folder, torch.float32, CPU), CPU, torch.float32)
    found.chat = load_chat_format(folder)
    return found


def prompts(objective: GRPO, network: Network) -> list[Example]:
    rows = [
        PromptCompletion("f", n + 1, prompt=text, completion="yes")
        for n, text in enumerate(PROMPTS)
    ]
    assert network.chat is not None
    return [objective.encode(row, n, network.chat) for n, row in enumerate(rows)]


def written(
    objective: GRPO, network: Network, scores: Sequence[Sequence[float]] = SCORES
) -> Rollouts:
    """Return completions of given sizes and scores; the content does not matter."""
    draw = np.random.default_rng(0)
    each = []
    for p, prompt in enumerate(prompts(objective, network)):
        for size, score, stopped in zip(SIZES[p], scores[p], STOPPED[p], strict=True):
            ids_T = draw.integers(5, 300, size)
            completion = Completion(ids_T, np.zeros(size, dtype=np.float32), stopped)
            each.append(Rollout(prompt, completion, DecodedReply("", ""), score))
    return Rollouts(each, 3)


def fixed(monkeypatch: pytest.MonkeyPatch, rollouts: Rollouts) -> None:
    monkeypatch.setattr(GRPO, "roll_out", lambda *a, **k: rollouts)


def whole_logps(model: Any, rollouts: Rollouts) -> list[Tensor]:
    """Log-probabilities of the completions, each from a forward of transformers by itself."""
    found = []
    for rollout in rollouts.each:
        ids = torch.from_numpy(np.concatenate([rollout.prompt.ids_T, rollout.completion.ids_T]))
        logits = model(ids[None]).logits[0].double()
        size = len(rollout)
        logp = torch.log_softmax(logits[-size - 1 : -1], -1)
        found.append(logp[torch.arange(size), ids[-size:]])
    return found


def disturb(*models: Any, size: float = 0.03) -> None:
    """Move the weights of all ``models`` by the same."""
    for model in models:
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for _, weight in sorted(model.named_parameters()):
                weight += size * torch.randn(weight.shape, generator=generator)


def formula(
    objective: GRPO, rollouts: Rollouts, now: list[Tensor], old: list[Tensor], start: list[Tensor]
) -> Tensor:
    """Return the loss of the papers, one completion after another."""
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    high = objective.epsilon_high or objective.epsilon
    scores = torch.tensor(SCORES, dtype=torch.float64)
    for place, rollout in enumerate(rollouts.each):
        group = scores[place // 3]
        advantage = scores.flatten()[place] - group.mean()
        if objective.scale_rewards == "group":
            advantage = advantage / (group.std() + 1e-4)
        if objective.scale_rewards == "batch":
            advantage = advantage / (scores.flatten().std() + 1e-4)
        ratio = torch.exp(now[place] - old[place])
        surrogate = torch.min(
            ratio * advantage, ratio.clamp(1 - objective.epsilon, 1 + high) * advantage
        )
        log = start[place] - now[place]
        token_T = -surrogate + objective.beta * (log.exp() - log - 1)
        if objective.mask_truncated and not rollout.completion.stopped:
            continue
        tokens += len(rollout)
        total = (
            total
            + {
                "grpo": token_T.mean(),
                "dapo": token_T.sum(),
                "dr_grpo": token_T.sum() / objective.max_completion_tokens,
            }[objective.loss_type]
        )
    return total / (tokens if objective.loss_type == "dapo" else len(rollouts.each))


CASES = [
    {"loss_type": loss, "beta": beta, "mask_truncated": masked}
    for loss, beta, masked in itertools.product(LOSSES, (0.0, 0.3), (False, True))
] + [
    {"scale_rewards": "batch", "epsilon": 0.05, "epsilon_high": 0.4},
    {"scale_rewards": "none", "loss_type": "dr_grpo"},
]


@pytest.mark.parametrize("budget", [10_000, 24])
@pytest.mark.parametrize("fields", CASES, ids=str)
def test_loss_and_gradient_match_formula(
    fields: dict[str, Any],
    budget: int,
    network: Network,
    family_folder: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = load_model(family_folder("llama"), torch.float32, CPU)
    objective = GRPO(**fields, num_generations=3, max_completion_tokens=6)
    rollouts = written(objective, network)
    fixed(monkeypatch, rollouts)
    network.remember_start()
    with torch.no_grad():
        start = whole_logps(plain, rollouts)
    disturb(network.model, plain)
    with torch.no_grad():
        old = whole_logps(plain, rollouts)
        batches = objective.annotate(network, prompts(objective, network), budget)
        for batch in batches:
            objective.loss(network, batch)  # the first of several steps
    disturb(network.model, plain)

    def gradients(loss: Tensor, model: Any) -> list[Tensor]:
        return list(torch.autograd.grad(loss, [w for _, w in sorted(model.named_parameters())]))

    weight = sum(batch.weight for batch in batches)
    mine = sum(objective.loss(network, batch).total for batch in batches) / weight
    expected = formula(objective, rollouts, whole_logps(plain, rollouts), old, start)
    assert float(mine.detach()) == pytest.approx(float(expected.detach()), abs=1e-5)
    for one, other in zip(gradients(mine, network.model), gradients(expected, plain), strict=True):
        torch.testing.assert_close(one, other.float(), rtol=1e-3, atol=1e-5)


def test_loss_and_gradient_are_trls() -> None:
    if not TRL.exists():
        pytest.skip("TRL is not here: python benchmarks/grpo_vs_trl.py makes its environment")
    generator = torch.Generator().manual_seed(1)
    shape = (6, 7)
    old = -torch.rand(shape, generator=generator) * 3
    tensors = {
        "old": old,
        "logp": old + 0.3 * torch.randn(shape, generator=generator),
        "reference": old + 0.3 * torch.randn(shape, generator=generator),
        "advantages": torch.randn(6, generator=generator),
        "mask": torch.arange(7)[None] < torch.tensor([7, 1, 4, 5, 2, 3])[:, None],
    }
    names = ("loss_type", "beta", "epsilon", "epsilon_high")
    values = itertools.product(LOSSES, (0.0, 0.2), (0.2, 0.05), (0.2, 0.28))
    cases = [dict(zip(names, each, strict=True)) | {"max_completion_length": 7} for each in values]
    given = {"tensors": {n: t.tolist() for n, t in tensors.items()}, "cases": cases}
    script = str(Path(__file__).parent / "trl_grpo.py")
    done = subprocess.run(
        [str(TRL), script], input=json.dumps(given), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = json.loads(done.stdout.splitlines()[-1])
    assert len(theirs) == 24
    for case, answer in zip(cases, theirs, strict=True):
        loss, gradient = ours(tensors, case)
        assert loss == pytest.approx(answer["loss"], abs=1e-6), case
        torch.testing.assert_close(gradient, torch.tensor(answer["gradient"]), rtol=1e-5, atol=1e-6)


def ours(tensors: dict[str, Tensor], case: dict[str, Any]) -> tuple[float, Tensor]:
    """Return the objective's loss on the same tensors, and the gradient by the log-probabilities."""
    fields = {name: case[name] for name in ("loss_type", "beta", "epsilon", "epsilon_high")}
    objective = GRPO(**fields, max_completion_tokens=case["max_completion_length"])
    mask = tensors["mask"]
    sizes = mask.sum(1)
    weight = {
        "grpo": (1.0 / sizes)[:, None].expand(mask.shape)[mask],
        "dapo": torch.ones(int(mask.sum())),
        "dr_grpo": torch.full((int(mask.sum()),), 1 / case["max_completion_length"]),
    }[case["loss_type"]]
    divisor = float(mask.sum()) if case["loss_type"] == "dapo" else float(len(mask))
    policy = PolicyBatch(
        Rollouts([], 6),
        weight_M=weight,
        sampler_M=tensors["old"][mask],
        advantage_M=tensors["advantages"][:, None].expand(mask.shape)[mask],
        old_M=tensors["old"][mask],
        reference_M=tensors["reference"][mask] if case["beta"] else None,
    )
    row_M = torch.arange(6).repeat_interleave(sizes)
    tree = SimpleNamespace(examples=[SimpleNamespace(row=n) for n in range(6)])
    batch: Any = SimpleNamespace(extra=policy, learned_edges=(row_M, row_M), tree=tree)
    logp = tensors["logp"].clone().requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logprobs, "token_logps", lambda *a, **k: logp[mask])
        loss = objective.loss(None, batch).total / divisor  # type: ignore[arg-type]
    (gradient,) = torch.autograd.grad(loss, logp)
    return float(loss.detach()), gradient


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_groups_of_equal_rewards_give_no_gradient(
    beta: float, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = GRPO(num_generations=3, beta=beta)
    rollouts = written(objective, network, ((0.1,) * 3, (0.7,) * 3))
    fixed(monkeypatch, rollouts)
    network.remember_start()
    with torch.no_grad():
        batches = objective.annotate(network, prompts(objective, network), 1000)
    for batch in batches:
        objective.loss(network, batch).total.backward()
    gradients = [w.grad for w in network.model.parameters() if w.grad is not None]
    assert gradients and all(float(g.abs().max()) < 1e-7 for g in gradients)
    report = objective.report(network, batches, []).metrics
    assert report["equal_groups"] == 1 and report["reward"] == pytest.approx(0.4)
    # Masked completions are computed only for a divergence.
    assert sum(len(batch.tree.examples) for batch in batches) == (6 if beta else 1)


@pytest.mark.parametrize(("skipped", "divisor"), [(False, 17), (True, 10)])
def test_equal_groups_count_without_dynamic_sampling(
    skipped: bool, divisor: int, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = GRPO(num_generations=3, dynamic_sampling=skipped)
    fixed(monkeypatch, written(objective, network))
    batches = objective.annotate(network, prompts(objective, network), 1000)
    assert sum(batch.weight for batch in batches) == pytest.approx(divisor)
    assert objective.report(network, batches, []).metrics["equal_groups"] == 0.5
    # Only the remaining group is computed, behind a shared prompt.
    (batch,) = batches
    prompt = prompts(objective, network)[0]
    assert len(batch.tree.examples) == 3
    nodes = len(np.unique(batch.tree.node_M))
    assert nodes == len(prompt) + sum(SIZES[0])


def test_batch_of_masked_completions_has_zero_gradient(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = GRPO(num_generations=3, mask_truncated=True, beta=0.1)
    rollouts = written(objective, network)
    cut = [
        Rollout(
            r.prompt, Completion(r.completion.ids_T, r.completion.logp_T, False), r.reply, r.score
        )
        for r in rollouts.each
    ]
    fixed(monkeypatch, Rollouts(cut, 3))
    batches = objective.annotate(network, prompts(objective, network), 1000)
    loss = sum(objective.loss(network, batch).total for batch in batches)
    loss.backward()  # type: ignore[union-attr]
    assert all(w.grad is None or not w.grad.any() for w in network.model.parameters())
    assert objective.report(network, batches, []).metrics["truncated"] == 1


def test_num_iterations_reuses_completions(network: Network) -> None:
    objective = GRPO(num_iterations=3)
    assert [turn is turn for turn in objective.turns([])] == [True] * 3


@pytest.mark.parametrize("fields", [{"epsilon": 1.5}, {"num_generations": 1}, {"temperature": 0}])
def test_invalid_settings_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        GRPO(**fields)


def test_grpo_uses_reference_only_with_beta() -> None:
    assert not GRPO().uses_reference
    assert GRPO(beta=0.04).uses_reference
