"""Losses of preferences by formulas written out on padded rows, and by TRL on the same tokens."""

from __future__ import annotations

import copy
import itertools
import json
import math
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from luthier.data.conversations.chat import ChatFormat
from luthier.data.shapes.preferences import Preference, RankedReplies
from luthier.models.load import as_network, load_model
from luthier.models.networks.network import Network
from luthier.models.tokenizer import load_chat_format
from luthier.objectives import DPO, KTO, ORPO, ListwiseDPO, Objective, RewardModel
from luthier.objectives.preferences.kto import mismatch_answers
from luthier.objectives.preferences.orpo import _log_one_minus_exp
from luthier.objectives.preferences.references import with_reference_logps
from luthier.types import Example, Message, Row

CPU = torch.device("cpu")
TEXTS = [
    ("What is the capital of France?", "Paris.", "I will not answer the question."),
    ("What is the capital of France?", "The capital of France is Paris.", ""),
    ("My card has not arrived yet.", "When was it sent to you?", "no"),
    ("The lazy dog", "jumps over the quick brown fox", "jumps over the lazy dog"),
]
TRL = Path(__file__).parents[2] / ".venv-trl" / "bin" / "python"
SIDE = Path(__file__).parents[2] / "benchmarks" / "preference_losses_side.py"


def row_of(line: int, prompt: str, chosen: str, rejected: str) -> Row:
    turns = [(Message("assistant", text),) for text in (chosen, rejected)]
    return Preference(
        "f", line, messages=(Message("user", prompt),), chosen=turns[0], rejected=turns[1]
    )


ROWS = [row_of(line, *texts) for line, texts in enumerate(TEXTS)]


def moved(model: Any, amount: float = 0.02) -> None:
    """Move all weights a little, as training would."""
    torch.manual_seed(5)
    with torch.no_grad():
        for weight in model.parameters():
            weight += amount * torch.randn_like(weight)


class Setup:
    """A trained network and the initial network, both also as plain transformers models."""

    def __init__(self, folder: Path, objective: Objective) -> None:
        self.chat = load_chat_format(folder)
        self.reference: Any = load_model(folder, torch.float32, CPU, objective.head())
        self.policy: Any = copy.deepcopy(self.reference)
        moved(self.policy)
        model: Any = copy.deepcopy(self.reference)
        self.network = as_network(model, CPU, torch.float32)
        self.network.remember_start()
        moved(model)
        self.network.model.eval()


def measured(
    network: Network, objective: Objective, examples: Sequence[Example], budget: int
) -> tuple[float, dict[str, Tensor], dict[str, float], int]:
    """Return mean loss, gradients, metrics and number of micro-batches, as in the engine."""
    network.model.zero_grad(set_to_none=True)
    with torch.no_grad():
        batches = objective.annotate(network, examples, budget)
    weight = math.fsum(batch.weight for batch in batches)
    total, metrics = 0.0, dict[str, float]()
    for batch in batches:
        loss = objective.loss(network, batch)
        (loss.total / weight).backward()
        total += float(loss.total.detach())
        for key, value in loss.metrics.items():
            metrics[key] = metrics.get(key, 0.0) + value / weight
    gradients = {n: w.grad for n, w in network.model.named_parameters() if w.grad is not None}
    return total / weight, gradients, metrics, len(batches)


def logps(model: Any, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Sum of the log-probabilities of the learned tokens, and their number, on a padded rectangle."""
    longest = max(len(example) for example in examples)
    ids, mask, learned = (torch.zeros(len(examples), longest, dtype=torch.int64) for _ in range(3))
    for place, example in enumerate(examples):
        ids[place, : len(example)] = torch.from_numpy(example.ids_T)
        mask[place, : len(example)] = 1
        learned[place, : len(example)] = torch.from_numpy(example.weight_T != 0)
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].double()
    each = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return (each * learned[:, 1:]).sum(-1), learned[:, 1:].sum(-1)


def sides(examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    return list(examples), [example.partner for example in examples if example.partner]


def encoded(objective: Objective, chat: ChatFormat) -> list[Example]:
    return [objective.encode(row, index, chat) for index, row in enumerate(ROWS)]


DPO_CASES: dict[str, tuple[dict[str, Any], Callable[..., Tensor]]] = {
    "sigmoid": ({"beta": 0.1}, lambda d, dn, nll: torch.log1p(torch.exp(-0.1 * d))),
    "strong": ({"beta": 0.7}, lambda d, dn, nll: torch.log1p(torch.exp(-0.7 * d))),
    "smoothed": (
        {"label_smoothing": 0.2},
        lambda d, dn, nll: (
            0.8 * torch.log1p(torch.exp(-0.1 * d)) + 0.2 * torch.log1p(torch.exp(0.1 * d))
        ),
    ),
    "ipo": ({"loss_type": "ipo"}, lambda d, dn, nll: (dn - 1 / 0.2) ** 2),
    "ipo of sums": (
        {"loss_type": "ipo", "length_normalised": False, "beta": 0.5},
        lambda d, dn, nll: (d - 1) ** 2,
    ),
    "hinge": ({"loss_type": "hinge"}, lambda d, dn, nll: torch.clamp(1 - 0.1 * d, min=0)),
    "by length": (
        {"length_normalised": True, "beta": 2.0},
        lambda d, dn, nll: torch.log1p(torch.exp(-2.0 * dn)),
    ),
    "beside sft": (
        {"sft_weight": 0.5},
        lambda d, dn, nll: torch.log1p(torch.exp(-0.1 * d)) + 0.5 * nll,
    ),
}


@pytest.mark.parametrize("budget", [1000, 40])
@pytest.mark.parametrize("case", DPO_CASES)
def test_dpo_matches_formula_on_padded_rows(
    case: str, budget: int, family_folder: Callable[[str], Path]
) -> None:
    fields, formula = DPO_CASES[case]
    objective = DPO(**fields)
    setup = Setup(family_folder("llama"), objective)
    examples = encoded(objective, setup.chat)
    chosen, rejected = sides(examples)
    with torch.no_grad():
        (ref_c, _), (ref_r, _) = logps(setup.reference, chosen), logps(setup.reference, rejected)
    (logp_c, n_c), (logp_r, n_r) = logps(setup.policy, chosen), logps(setup.policy, rejected)
    ratio_c, ratio_r = logp_c - ref_c, logp_r - ref_r
    expected = formula(ratio_c - ratio_r, ratio_c / n_c - ratio_r / n_r, -logp_c / n_c).mean()
    expected.backward()
    loss, gradients, metrics, count = measured(setup.network, objective, examples, budget)
    assert (count == 1) == (budget == 1000)
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    for name, weight in setup.policy.named_parameters():
        difference = (gradients[name] - weight.grad).norm()
        assert difference <= 1e-4 * weight.grad.norm() + 1e-7, name
    if fields.get("length_normalised") is None and fields.get("loss_type") is None:
        margin = objective.beta * (ratio_c - ratio_r)
        assert metrics["margin"] == pytest.approx(float(margin.detach().mean()), rel=1e-4)
        assert metrics["accuracy"] == pytest.approx(float((margin > 0).float().mean()), abs=1e-6)
        assert metrics["logp_chosen"] == pytest.approx(float(logp_c.detach().mean()), rel=1e-5)
        reward = objective.beta * float(ratio_r.detach().mean())
        assert metrics["reward_rejected"] == pytest.approx(reward, rel=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "t5", "palm"])
def test_precomputed_reference_gives_equal_loss(
    family: str, family_folder: Callable[[str], Path]
) -> None:
    objective = DPO()
    setup = Setup(family_folder(family), objective)
    examples = encoded(objective, setup.chat)
    plain, gradients, _, _ = measured(setup.network, objective, examples, 60)
    gradients = {name: gradient.clone() for name, gradient in gradients.items()}
    with torch.no_grad():
        ahead = with_reference_logps(setup.network, examples, 1000)
    assert all(e.reference is not None and e.partner is not None for e in ahead)
    calls: list[int] = []
    at_start = setup.network.at_start
    setup.network.at_start = lambda: calls.append(1) or at_start()  # type: ignore[func-returns-value,method-assign]
    again, others, _, _ = measured(setup.network, objective, ahead, 60)
    assert not calls, "nothing is computed twice"
    assert again == pytest.approx(plain, rel=1e-6)
    for name, gradient in gradients.items():
        assert (others[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, name


def test_initial_loss_is_ln_2_without_margin(
    family_folder: Callable[[str], Path],
) -> None:
    objective = DPO()
    setup = Setup(family_folder("llama"), objective)
    setup.network = as_network(setup.reference, CPU, torch.float32)
    setup.network.remember_start()
    loss, _, metrics, _ = measured(
        setup.network, objective, encoded(objective, setup.chat), budget=50
    )
    assert loss == pytest.approx(math.log(2), rel=1e-6)
    assert metrics["margin"] == 0.0
    assert metrics["accuracy"] == pytest.approx(0.5)  # ties count as half


def test_orpo_matches_formula_on_padded_rows(family_folder: Callable[[str], Path]) -> None:
    objective = ORPO(odds_weight=0.3)
    setup = Setup(family_folder("llama"), objective)
    examples = encoded(objective, setup.chat)
    means = [
        logp / count for logp, count in (logps(setup.policy, side) for side in sides(examples))
    ]
    odds = [torch.exp(mean) / (1 - torch.exp(mean)) for mean in means]
    ratio = torch.log(odds[0] / odds[1])
    expected = (-means[0] - 0.3 * torch.log(1 / (1 + torch.exp(-ratio)))).mean()
    expected.backward()
    loss, gradients, metrics, _ = measured(setup.network, objective, examples, 1000)
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    assert metrics["nll"] == pytest.approx(float(-means[0].detach().mean()), rel=1e-5)
    for name, weight in setup.policy.named_parameters():
        difference = (gradients[name] - weight.grad).norm()
        assert difference <= 1e-4 * weight.grad.norm() + 1e-7, name


def test_odds_of_near_certain_answers_are_finite() -> None:
    x = torch.tensor([-30.0, -1.0, -0.7, -0.6, -1e-3, -1e-9, 0.0], requires_grad=True)
    found = _log_one_minus_exp(x)
    exact = torch.log(-torch.expm1(x.detach().double()[:5]))
    torch.testing.assert_close(found[:5].double(), exact, rtol=1e-6, atol=1e-12)
    found.sum().backward()
    assert torch.isfinite(found).all() and x.grad is not None and torch.isfinite(x.grad).all()


def kto_expected(setup: Setup, examples: Sequence[Example], objective: KTO) -> Tensor:
    shifted = []
    for own, other in zip(examples, [examples[-1], *examples[:-1]], strict=True):
        prompt = own.ids_T[own.weight_T == 0]
        answer = other.ids_T[other.weight_T != 0]
        ids = np.concatenate([prompt, answer])
        weight = (np.arange(len(ids)) >= len(prompt)).astype(np.float32)
        shifted.append(Example(ids, weight, own.row))
    with torch.no_grad():
        z = (logps(setup.policy, shifted)[0] - logps(setup.reference, shifted)[0]).mean()
        reference = logps(setup.reference, examples)[0]
    z = max(0.0, float(z))
    ratio = logps(setup.policy, examples)[0] - reference
    each = []
    for place, example in enumerate(examples):
        if example.desirable:
            value = torch.sigmoid(objective.beta * (ratio[place] - z))
            each.append(objective.desirable_weight * (1 - value))
        else:
            value = torch.sigmoid(objective.beta * (z - ratio[place]))
            each.append(objective.undesirable_weight * (1 - value))
    return torch.stack(each).mean()


@pytest.mark.parametrize("budget", [1000, 40])
def test_kto_matches_formula_on_padded_rows(
    budget: int, family_folder: Callable[[str], Path]
) -> None:
    objective = KTO(desirable_weight=1.2, undesirable_weight=0.7, beta=0.3)
    setup = Setup(family_folder("llama"), objective)
    # Equal lengths, so no mismatched answer is truncated.
    rows = objective.regroup(ROWS)
    examples = [objective.encode(row, n, setup.chat) for n, row in enumerate(rows)]
    room = max(len(example) for example in examples)
    examples = [e for e in examples if len(e) <= room]
    made = mismatch_answers(examples)
    assert len(made) == len(examples)
    expected = kto_expected(setup, examples, objective)
    whole = all(
        len(m) == (e.weight_T == 0).sum() + (o.weight_T != 0).sum()
        for m, e, o in zip(made, examples, [examples[-1], *examples[:-1]], strict=True)
    )
    assert whole, "the rows of this test must leave every mismatched answer whole"
    expected.backward()
    loss, gradients, _, _ = measured(setup.network, objective, examples, budget)
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    for name, weight in setup.policy.named_parameters():
        difference = (gradients[name] - weight.grad).norm()
        assert difference <= 1e-4 * weight.grad.norm() + 1e-7, name


def test_mismatched_answers_are_never_longer_than_the_batch() -> None:
    def example(prompt: int, answer: int, row: int) -> Example:
        ids = np.arange(prompt + answer, dtype=np.int64) + 100 * row
        weight = (np.arange(prompt + answer) >= prompt).astype(np.float32)
        return Example(ids, weight, row, reference=-1.0)

    one, two, full = example(2, 9, 0), example(8, 2, 1), example(11, 1, 2)
    made = mismatch_answers([one, two])
    assert made[0].ids_T.tolist() == [0, 1, 108, 109]
    assert len(made[1]) == 11 and made[1].ids_T[8:].tolist() == [2, 3, 4]
    assert all(row.reference is None for row in made)
    assert len(mismatch_answers([one, full])) == 2 and mismatch_answers([one]) == []


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_reward_model_matches_formula(family: str, family_folder: Callable[[str], Path]) -> None:
    objective = RewardModel(margin=0.3, centering=0.01)
    folder = family_folder(family)
    torch.manual_seed(3)
    plain: Any = load_model(folder, torch.float32, CPU, objective.head())
    plain.eval()
    network = as_network(copy.deepcopy(plain), CPU, torch.float32)
    network.model.eval()
    examples = encoded(objective, load_chat_format(folder))
    rewards = [
        torch.cat([plain(input_ids=torch.from_numpy(e.ids_T)[None]).logits[0] for e in side])
        for side in sides(examples)
    ]
    margin = rewards[0] - rewards[1] - 0.3
    expected = (torch.log1p(torch.exp(-margin)) + 0.01 * (rewards[0] + rewards[1]) ** 2).mean()
    loss, _, metrics, _ = measured(network, objective, examples, 60)
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    right = float((rewards[0] > rewards[1]).float().mean())
    assert metrics["accuracy"] == pytest.approx(right, abs=1e-6)
    assert metrics["margin"] == pytest.approx(
        float(margin.detach().mean()) + 0.3, rel=1e-4, abs=1e-6
    )


@pytest.mark.skipif(not TRL.exists(), reason="TRL's environment (.venv-trl) is not there")
def test_losses_match_trl(family_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder = family_folder("llama")
    setup = Setup(folder, DPO())
    chat = setup.chat
    torch.manual_seed(3)
    scored: Any = load_model(folder, torch.float32, CPU, RewardModel().head())
    for name, model in (("policy", setup.policy), ("reference", setup.reference), ("rm", scored)):
        model.save_pretrained(tmp_path / name)
        chat.tokenizer.save_pretrained(tmp_path / name)
    examples = encoded(DPO(), chat)
    rows = [
        {
            "prompt": chosen.ids_T[chosen.weight_T == 0].tolist(),
            "chosen": chosen.ids_T[chosen.weight_T != 0].tolist(),
            "rejected": rejected.ids_T[rejected.weight_T != 0].tolist(),
        }
        for chosen, rejected in zip(*sides(examples), strict=True)
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    arguments = [str(tmp_path / name) for name in ("policy", "reference", "rm", "rows.json")]
    answer = subprocess.run(
        [str(TRL), str(SIDE), *arguments], check=True, capture_output=True, text=True
    ).stdout
    theirs = json.loads(answer.splitlines()[-1])
    kto = KTO(undesirable_weight=1.5)
    thumbs = [r for rows in zip(*[iter(kto.regroup(ROWS))] * 2, strict=True) for r in rows]
    thumbs = thumbs[::2] + thumbs[1::2]
    judged = [kto.encode(row, index, chat) for index, row in enumerate(thumbs)]
    ours = {
        "dpo sigmoid": (DPO(), examples),
        "dpo hinge": (DPO(loss_type="hinge"), examples),
        "dpo ipo": (DPO(loss_type="ipo"), examples),
        "dpo length_normalised": (DPO(length_normalised=True), examples),
        "kto": (kto, judged),
    }
    for name, (objective, given) in ours.items():
        loss, gradients, _, _ = measured(setup.network, objective, given, 1000)
        assert loss == pytest.approx(theirs[name]["loss"], rel=1e-5), name
        norm = sum(float(g.double().square().sum()) for g in gradients.values()) ** 0.5
        assert norm == pytest.approx(theirs[name]["gradient_norm"], rel=1e-4), name
    with torch.no_grad():
        whole, _, metrics, _ = _no_gradient(setup.network, ORPO(), examples)
    odds = whole - metrics["nll"]
    assert odds == pytest.approx(theirs["odds_ratio"]["loss"], rel=1e-4)
    reward = RewardModel(margin=0.3, centering=0.01)
    network = as_network(scored, CPU, torch.float32)
    loss, gradients, _, _ = measured(network, reward, encoded(reward, chat), 1000)
    assert loss == pytest.approx(theirs["reward_model"]["loss"], rel=1e-5)


def _no_gradient(
    network: Network, objective: Objective, examples: Sequence[Example]
) -> tuple[float, None, dict[str, float], None]:
    (batch,) = objective.annotate(network, examples, 1000)
    loss = objective.loss(network, batch)
    count = len(examples)
    metrics = {key: value / count for key, value in loss.metrics.items()}
    return float(loss.total) / count, None, metrics, None


# --- rankings ------------------------------------------------------------------------------------

RANKED = [
    RankedReplies(
        "f",
        line,
        messages=(Message("user", prompt),),
        ranked=tuple((Message("assistant", text),) for text in answers),
    )
    for line, (prompt, *answers) in enumerate(
        [
            ("What is the capital of France?", "Paris.", "The capital of France is Paris.", "no"),
            ("My card has not arrived yet.", "When was it sent to you?", "no"),
            ("The lazy dog", "jumps", "jumps over the quick brown fox", "over", ""),
        ]
    )
]


@pytest.mark.parametrize("budget", [1000, 40])
def test_listwise_dpo_is_the_chance_of_the_order(
    budget: int, family_folder: Callable[[str], Path]
) -> None:
    objective = ListwiseDPO(beta=0.3)
    setup = Setup(family_folder("llama"), objective)
    examples = [objective.encode(row, index, setup.chat) for index, row in enumerate(RANKED)]
    assert [example.weight for example in examples] == pytest.approx([1 / 3, 1 / 2, 1 / 4])
    expected, right, known = torch.zeros((), dtype=torch.float64), 0.0, []
    for example in examples:
        with torch.no_grad():
            reference_K = logps(setup.reference, example.sides)[0]
        reward_K = 0.3 * (logps(setup.policy, example.sides)[0] - reference_K)
        # Plackett-Luce: the best is drawn first, then the best of the others, without replacement.
        chance = torch.ones((), dtype=torch.float64)
        for place in range(len(reward_K)):
            chance = chance * (reward_K[place:] - reward_K[place:].max()).softmax(0)[0]
        expected = expected - chance.log()
        pairs = [one > other for one, other in itertools.combinations(reward_K.tolist(), 2)]
        right += sum(pairs) / len(pairs)
        known.append(reward_K)
    expected = expected / len(examples)
    expected.backward()
    loss, gradients, metrics, count = measured(setup.network, objective, examples, budget)
    assert (count == 1) == (budget == 1000)
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    assert metrics["accuracy"] == pytest.approx(right / len(examples), abs=1e-6)
    margins = [float((each[0] - each[1:].mean()).detach()) for each in known]
    assert metrics["margin"] == pytest.approx(sum(margins) / len(margins), rel=1e-4)
    for name, weight in setup.policy.named_parameters():
        difference = (gradients[name] - weight.grad).norm()
        assert difference <= 1e-4 * weight.grad.norm() + 1e-7, name


def test_two_ranked_answers_are_learned_as_by_dpo(family_folder: Callable[[str], Path]) -> None:
    ranked, paired_ = ListwiseDPO(), DPO()
    setup = Setup(family_folder("llama"), ranked)
    losses = []
    for objective in (ranked, paired_):
        examples = encoded(objective, setup.chat)
        with torch.no_grad():
            examples = list(with_reference_logps(setup.network, examples, 1000))
        loss, gradients, _, _ = measured(setup.network, objective, examples, 1000)
        losses.append((loss, torch.cat([each.flatten() for each in gradients.values()])))
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-6)
    torch.testing.assert_close(losses[0][1], losses[1][1], rtol=1e-4, atol=1e-6)


def test_truncated_ranking_keeps_all_answers_or_has_no_weight(
    family_folder: Callable[[str], Path],
) -> None:
    objective = ListwiseDPO()
    chat = load_chat_format(family_folder("llama"))
    example = objective.encode(RANKED[0], 0, chat)
    shortest = min(len(side) for side in example.sides)
    cut = objective.truncate(example, shortest)
    assert len(cut.sides) == 3 and max(map(len, cut.sides)) == shortest
    assert cut.weight == pytest.approx(1 / 3)
    assert not objective.truncate(example, 2).weight
