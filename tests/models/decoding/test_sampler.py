"""Sampled tokens and log-probabilities compared with the network's logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from luthier.adaptations.lora import LoRA
from luthier.adaptations.prefix import Prefix
from luthier.adaptations.prompt import Prompt
from luthier.errors import RecipeError
from luthier.models.decoding.sampler import (
    Completion,
    TokenSampler,
    choose_tokens,
    draw,
    likeliest_tokens,
    sample,
)
from luthier.models.decoding.sampling import Sampling
from luthier.models.load import as_network, load_model
from luthier.models.networks.heads import Head, decoder_of, decoder_start
from luthier.models.networks.llama_forward import LlamaForward
from luthier.models.networks.network import Network
from luthier.models.random_numbers import draw_seeds
from luthier.types import Example

CPU = torch.device("cpu")
WRITERS = ("llama", "gpt2", "palm", "t5", "transfo_xl")
SHORT = np.array([7, 8, 9], dtype=np.int64)
LONG = np.arange(20, 61, dtype=np.int64)
MIDDLE = np.concatenate([LONG[:11], np.array([5, 4])])
PROMPTS = (SHORT, LONG, MIDDLE, np.array([33], dtype=np.int64))

Opened = Callable[..., Network]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_likeliest_token_is_first_of_equal_logits(dtype: torch.dtype) -> None:
    """Same result as torch per row; in bfloat16 the highest logit often occurs twice."""
    logits_RV = torch.randn(64, 500, generator=torch.Generator().manual_seed(0)).mul(2).round()
    logits_RV[3, 7], logits_RV[4] = torch.nan, -torch.inf
    logits_RV = logits_RV.to(dtype)
    assert sum((row == row.max()).sum() > 1 for row in logits_RV) > 10
    found = likeliest_tokens(logits_RV)
    assert found.pop(3) == 500, "no token is likeliest where one is not a number"
    assert found == [int(row.argmax()) for place, row in enumerate(logits_RV) if place != 3]
    samplers = [TokenSampler(Sampling(temperature=0), 0, row, SHORT) for row in range(2)]
    with pytest.raises(RecipeError) as refused:
        choose_tokens(samplers, logits_RV[2:4])
    assert refused.value.rule == "model.no_probabilities"
    with pytest.raises(RecipeError) as refused:
        samplers[0].choose(logits_RV[3])
    assert refused.value.rule == "model.no_probabilities"


@pytest.fixture
def opened(family_folder: Callable[[str], Path]) -> Opened:
    """Return a tiny network of a family in float32, with an adapter that differs from its start."""

    def network(family: str, adaptation: Any = None) -> Network:
        torch.manual_seed(0)
        model = load_model(family_folder(family), torch.float32, CPU)
        found = as_network(model, CPU, torch.float32)
        if adaptation is not None:
            adaptation.attach(model)
            disturb(model)
        return found

    return network


def disturb(model: Any, size: float = 0.05) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += size * torch.randn(weight.shape, generator=generator)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sampled(
    network: Network,
    prompts: Any,
    count: int,
    *,
    generator: torch.Generator | None = None,
    stop_ids: Any = (),
    batch_size: int = 64,
    done: Callable[[int], None] = lambda count: None,
    **settings: Any,
) -> list[list[Completion]]:
    """Drawn at temperature 1 where nothing else is said, with seeds of ``generator``."""
    return sample(
        network,
        prompts,
        count,
        Sampling(**{"temperature": 1.0, **settings}),
        stop_ids=stop_ids,
        seeds=draw_seeds(len(prompts), generator),
        batch_size=batch_size,
        done=done,
    )


def texts(found: Sequence[Sequence[Completion]]) -> list[list[list[int]]]:
    return [[c.ids_T.tolist() for c in row] for row in found]


def trainers_logp(network: Network, prompt_T: Any, ids_T: Any, temperature: float = 1.0) -> Any:
    """Return log-probabilities of whole rows from the trainer's forward pass."""
    weight_T = np.ones(len(prompt_T) + len(ids_T), dtype=np.float32)
    weight_T[: len(prompt_T)] = 0
    example = Example(np.concatenate([prompt_T, ids_T]), weight_T, 0)
    if decoder_of(network.model) is not None:
        start = np.array([decoder_start(network.model)])
        weight_T = np.array([0] + [1] * len(ids_T), dtype=np.float32)
        example = Example(np.concatenate([start, ids_T]), weight_T, 0, source_T=prompt_T)
    network.model.eval()
    (batch,) = network.batches([example], 10_000)
    with torch.no_grad():
        logits = network.logits(network.hidden(batch)[batch.source_S]).float() / temperature
        logp = torch.log_softmax(logits, -1)[batch.edge_source_E, batch.target_E]
    return logp.numpy()


def generated(network: Network, prompt_T: Any, stop: int, count: int) -> list[int]:
    """Return the result of transformers' ``generate``; ``network.model`` has plain attention."""
    out = network.model.generate(
        torch.from_numpy(prompt_T)[None],
        attention_mask=torch.ones(1, len(prompt_T), dtype=torch.int64),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=stop,
        pad_token_id=0,
    )[0].tolist()
    return out[1:] if decoder_of(network.model) is not None else out[len(prompt_T) :]


@pytest.mark.parametrize("family", WRITERS)
def test_greedy_tokens_match_transformers_generate(opened: Opened, family: str) -> None:
    """Prompts of all lengths in one batch; some completions stop earlier."""
    network = opened(family)
    found = sampled(network, PROMPTS, 2, max_tokens=40, temperature=0)
    # A token that ends some completions early and not all.
    stop = int(found[1][0].ids_T[6])
    found = sampled(network, PROMPTS, 2, max_tokens=40, temperature=0, stop_ids=[stop])
    if network.layout.flat:
        network.model.set_attn_implementation("eager")
    for prompt_T, (first, second) in zip(PROMPTS, found, strict=True):
        expected = generated(network, prompt_T, stop, 40)
        assert first.ids_T.tolist() == second.ids_T.tolist() == expected
        assert first.stopped == (expected[-1] == stop)
        assert len(expected) == 40 or first.stopped
    assert found[1][0].stopped and len(found[1][0].ids_T) <= 7


@pytest.mark.parametrize("family", WRITERS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_are_the_trainer_s(
    opened: Opened, family: str, temperature: float
) -> None:
    network = opened(family, LoRA(rank=4))
    found = sampled(
        network,
        PROMPTS,
        3,
        max_tokens=37,
        temperature=temperature,
        top_p=0.9,
        stop_ids=range(40),
        generator=seeded(),
    )
    lengths = {len(c.ids_T) for row in found for c in row}
    assert len(lengths) > 3, "rows should end at different times"
    for prompt_T, row in zip(PROMPTS, found, strict=True):
        for completion in row:
            expected = trainers_logp(network, prompt_T, completion.ids_T, temperature)
            np.testing.assert_allclose(completion.logp_T, expected, atol=1e-5, rtol=1e-5)
            ends = np.isin(completion.ids_T, np.arange(40))
            assert not ends[:-1].any() and ends[-1] == completion.stopped


@pytest.mark.parametrize("adaptation", [Prompt(virtual_tokens=5), Prefix(virtual_tokens=5)])
def test_soft_prompts_and_prefixes_precede_prompt(opened: Opened, adaptation: Any) -> None:
    network = opened("llama", adaptation)
    found = sampled(network, PROMPTS, 2, max_tokens=20, generator=seeded())
    for prompt_T, row in zip(PROMPTS, found, strict=True):
        for completion in row:
            expected = trainers_logp(network, prompt_T, completion.ids_T)
            np.testing.assert_allclose(completion.logp_T, expected, atol=1e-5, rtol=1e-5)
    assert texts(found) != texts(
        sampled(opened("llama"), PROMPTS, 2, max_tokens=20, generator=seeded())
    )


@pytest.mark.parametrize("family", ["llama", "t5", "transfo_xl"])
def test_the_weights_being_trained_are_sampled(opened: Opened, family: str) -> None:
    network = opened(family, LoRA(rank=4))

    def drawn() -> list[list[list[int]]]:
        return texts(sampled(network, PROMPTS, 2, max_tokens=12, generator=seeded()))

    before = drawn()
    kept = {n: w.detach().clone() for n, w in network.model.named_parameters() if w.requires_grad}
    disturb(network.model)
    assert drawn() != before
    with torch.no_grad():
        for name, weight in network.model.named_parameters():
            if name in kept:
                weight.copy_(kept[name])
    assert drawn() == before


def test_seeds_and_the_global_state_decide_the_draws(opened: Opened) -> None:
    network = opened("llama")

    def drawn(generator: torch.Generator | None = None) -> list[list[list[int]]]:
        return texts(sampled(network, PROMPTS, 2, max_tokens=12, generator=generator))

    assert drawn(seeded(3)) == drawn(seeded(3)) != drawn(seeded(4))
    torch.manual_seed(5)
    drawn()
    state = torch.get_rng_state()
    after = drawn()
    torch.set_rng_state(state)
    assert drawn() == after
    assert drawn() != after
    first = drawn(seeded(3))[0]
    assert first[0] != first[1], "completions of one prompt differ"


@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize("family", ["llama", "transfo_xl"])
def test_sampling_is_independent_of_batch(opened: Opened, family: str, batch_size: int) -> None:
    network = opened(family)
    settings: dict[str, Any] = {"max_tokens": 24, "stop_ids": range(60)}
    counts: list[int] = []
    found = sampled(
        network,
        PROMPTS,
        3,
        **settings,
        generator=seeded(),
        batch_size=batch_size,
        done=counts.append,
    )
    assert texts(found) == texts(sampled(network, PROMPTS, 3, **settings, generator=seeded()))
    assert counts == sorted(set(counts)) and counts[-1] == 12
    assert sampled(network, [], 3, **settings) == []


def test_prompt_is_computed_once_and_finished_rows_leave(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = opened("llama")
    # The test counts modules, and LlamaForward skips modules.
    monkeypatch.setattr(LlamaForward, "fits", staticmethod(lambda model: False))
    sizes: list[int] = []
    layer = network.model.model.layers[0].mlp
    layer.register_forward_hook(lambda _m, given, _out: sizes.append(given[0].shape[1]))
    prompts = [LONG, np.concatenate([LONG, SHORT])]
    found = sampled(network, prompts, 8, max_tokens=60, stop_ids=range(40), generator=seeded())
    lengths = [len(c.ids_T) for row in found for c in row]
    shared = -(-len(prompts[1]) // 32) * 32
    assert sizes[0] == shared, "both prompts and all of their rows share one beginning"
    assert sizes[1] <= 16 and sizes[-1] < sizes[1] and sizes[1:] == sorted(sizes[1:], reverse=True)
    assert len(sizes) == max(lengths) and max(lengths) < 60
    assert sum(sizes[1:]) < 2 * sum(length - 1 for length in lengths) + 4 * len(sizes)


def test_sampling_restores_modes_and_gradients(opened: Opened) -> None:
    network = opened("llama", LoRA(rank=4, dropout=0.5))
    network.model.train()
    network.model.model.layers[1].eval()
    modes = [module.training for module in network.model.modules()]
    found = sampled(network, [SHORT], 2, max_tokens=5, generator=seeded())
    assert [module.training for module in network.model.modules()] == modes
    network.model.eval()
    assert texts(found) == texts(sampled(network, [SHORT], 2, max_tokens=5, generator=seeded()))
    ids_T = np.concatenate([SHORT, found[0][0].ids_T])
    (batch,) = network.batches(
        [Example(ids_T, np.ones(len(ids_T), dtype=np.float32) * (np.arange(len(ids_T)) > 0), 0)],
        100,
    )
    network.hidden(batch).sum().backward()
    assert all(w.grad is not None for w in network.model.parameters() if w.requires_grad)


def test_draws_follow_the_weights() -> None:
    logits_V = torch.tensor([0.1, 0.5, 0.0, 0.3, 0.1, 0.0]).log()

    def frequencies(count: int = 4_000, **settings: float) -> list[float]:
        sampling = Sampling(temperature=1.0, **settings)  # type: ignore[arg-type]
        sampler = TokenSampler(sampling, 0, 0, SHORT)
        drawn = [sampler.choose(logits_V) for _ in range(count)]
        return [drawn.count(token) / count for token in range(6)]

    assert frequencies() == pytest.approx([0.1, 0.5, 0, 0.3, 0.1, 0], abs=0.02)
    assert frequencies(top_p=0.75) == pytest.approx([0, 0.625, 0, 0.375, 0, 0], abs=0.02)
    for top_p in (0.4, 0.0):
        assert frequencies(100, top_p=top_p) == [0, 1, 0, 0, 0, 0]
    assert frequencies(top_k=2) == pytest.approx([0, 0.625, 0, 0.375, 0, 0], abs=0.02)
    edges = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    weights = torch.tensor([[0.0, 0.25, 0.75, 0.0]]).expand(2, -1)
    assert draw(weights, edges).tolist() == [1, 2]


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.0}, {"temperature": 0.6}, {"top_p": 0.8}, {"top_k": 5}]
)
def test_joint_token_choice_matches_single_choice(settings: dict[str, float]) -> None:
    sampling = Sampling(**{"temperature": 1.0, **settings})  # type: ignore[arg-type]
    logits_RV = torch.randn(7, 5000, generator=seeded())

    def samplers() -> list[TokenSampler]:
        return [TokenSampler(sampling, 3, index, SHORT) for index in range(7)]

    alone = [own.choose(row_V) for own, row_V in zip(samplers(), logits_RV, strict=True)]
    assert choose_tokens(samplers(), logits_RV) == alone
    if sampling.temperature == 0:
        return
    with pytest.raises(RecipeError) as refused:
        choose_tokens(samplers()[:1], torch.full((1, 5000), float("nan")))
    assert refused.value.rule == "model.no_probabilities"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": None}, "max_tokens"),
        ({"count": 0}, "at least 1"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"max_tokens": 1022}, "prompt 1 has 3 tokens; with 1022 .* context of 1024"),
        ({"prompts": [SHORT, SHORT[:0]]}, "prompt 2 has no tokens"),
    ],
)
def test_invalid_sampling_is_refused(
    opened: Opened, settings: dict[str, Any], message: str
) -> None:
    chosen = {"prompts": [SHORT], "count": 1, "max_tokens": 4, **settings}
    with pytest.raises(RecipeError) as refused:
        sampled(opened("llama"), **chosen)
    assert refused.value.rule in {
        "prompt.empty",
        "prompt.too_long",
        "sampling.range",
        "sampling.too_few",
    }


@pytest.mark.parametrize("family", ["bert", "xlnet", "elmo"])
def test_sampling_from_encoder_is_refused(
    family_folder: Callable[[str], Path], family: str
) -> None:
    head = Head("masked_lm" if family == "bert" else "embedding")
    model = load_model(family_folder(family), torch.float32, CPU, head)
    with pytest.raises(RecipeError) as refused:
        sampled(as_network(model, CPU, torch.float32), [SHORT], 1, max_tokens=2)
    assert refused.value.rule == "model.cannot_write"
