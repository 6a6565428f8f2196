"""Logits of joint steps compared with single sequences."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from luthier.adaptations.prefix import Prefix
from luthier.adaptations.prompt import Prompt
from luthier.models.decoding.backends import Backend, backend_of, read_prompts
from luthier.models.decoding.kv_cache import CHUNK, STEP, Bank, room_for
from luthier.models.decoding.sampler import sample
from luthier.models.decoding.sampling import Sampling
from luthier.models.decoding.torch_backend import FlatBackend, ForwardBackend
from luthier.models.load import as_network, load_model
from luthier.models.networks.heads import prompt_ids, set_head_kind
from model_families import DECODERS

CPU = torch.device("cpu")
FAMILIES = ("llama", "gpt2", "palm", "t5", "transfo_xl")
PROMPTS = [np.arange(5, 5 + size) % 300 + 3 for size in (1, 7, 31, 33, 64, 90)]


@pytest.fixture(autouse=True)
def without_gradients() -> Any:
    with torch.inference_mode():
        yield


def network(folder: Path, adaptation: Any = None, dtype: torch.dtype = torch.float32) -> Any:
    with torch.inference_mode(False):
        torch.manual_seed(0)
        model = load_model(folder, dtype, CPU).eval()
        made = as_network(model, CPU, dtype)
        if adaptation is not None:
            adaptation.attach(model)
            with torch.no_grad():
                for weight in model.parameters():
                    if weight.requires_grad:
                        weight += 0.3 * torch.randn(weight.shape)
    return made


def begin(backend: Backend, ids: Any) -> tuple[Any, int]:
    state, logits = backend.open(ids), None
    while logits is None:
        (logits,) = backend.prefill([state])
    return backend.fork(state, 1)[0], int(logits.argmax())


def written(backend: Backend, prompts: list[Any], count: int) -> list[list[int]]:
    """Return greedy tokens of each prompt, all in joint steps."""
    begun = [begin(backend, ids) for ids in prompts]
    found = [[token] for _, token in begun]
    for _ in range(count - 1):
        logits = backend.step([state for state, _ in begun], [ids[-1] for ids in found])
        for ids, row in zip(found, logits, strict=True):
            ids.append(int(row.argmax()))
    for state, _ in begun:
        backend.free(state)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_matches_sampling_in_training(
    family: str, family_folder: Callable[[str], Path]
) -> None:
    made = network(family_folder(family))
    prompts = [ids % 250 + 3 for ids in PROMPTS[:4]]
    expected = sample(made, prompts, 1, Sampling(max_tokens=12))
    backend = backend_of(made, 512)
    assert isinstance(
        backend, FlatBackend if family in ("llama", "gpt2", "palm") else ForwardBackend
    )
    assert written(backend, prompts, 12) == [row.ids_T.tolist() for (row,) in expected]


@pytest.mark.parametrize("adaptation", [Prefix(virtual_tokens=5), Prompt(virtual_tokens=5)])
def test_prefix_and_soft_prompt_precede_prompt(
    adaptation: Any, family_folder: Callable[[str], Path]
) -> None:
    made = network(family_folder("llama"), adaptation)
    expected = sample(made, PROMPTS[:3], 1, Sampling(max_tokens=12))
    soft = np.array(prompt_ids(made.model), dtype=np.int64)
    backend = backend_of(made, 512)
    found = written(backend, [np.concatenate([soft, ids]) for ids in PROMPTS[:3]], 12)
    assert found == [row.ids_T.tolist() for (row,) in expected]


@pytest.mark.slow
def test_batched_logits_are_close_to_single_logits(tiny_llama: Callable[..., Any]) -> None:
    with torch.inference_mode(False):
        model = tiny_llama(hidden_size=128).eval()
        backend = FlatBackend(as_network(model, CPU, torch.float32), 1024)
    tokens = [list(range(10 + 7 * i, 90 + 7 * i)) for i in range(70)]

    def run(which: list[int]) -> dict[int, list[Any]]:
        states = {i: begin(backend, PROMPTS[i % len(PROMPTS)])[0] for i in which}
        kept: dict[int, list[Any]] = {i: [] for i in which}
        for at in range(70):
            logits = backend.step(list(states.values()), [tokens[i][at] % 300 for i in states])
            for i, row in zip(states, logits, strict=True):
                kept[i].append(row.clone())
            if at == 30 and len(states) > 3:  # sequences leave, and the banks compact
                for i in list(states)[::3]:
                    backend.free(states.pop(i))
        for state in states.values():
            backend.free(state)
        return kept

    together = run(list(range(70)))
    for i in (1, 5, 8, 65):
        for one, other in zip(run([i])[i], together[i], strict=True):
            assert torch.allclose(one, other, atol=1e-4)
    assert not any(bank.spans for bank in backend._banks._banks.values())
    assert not any(bank.capacity for bank in backend._banks._banks.values())


def test_a_long_prompt_is_read_in_chunks(family_folder: Callable[[str], Path]) -> None:
    made = network(family_folder("llama"))
    ids = np.random.default_rng(0).integers(3, 300, 2 * CHUNK + 45)
    made.model.set_attn_implementation("sdpa")
    whole = made.model(torch.from_numpy(ids)[None]).logits[0, -1]
    made.model.set_attn_implementation("luthier_tree")
    backend = FlatBackend(made, 1024)
    state, counts, logits = backend.open(ids), [], None
    while logits is None:
        counts.append(state.unread)
        (logits,) = backend.prefill([state])
    assert counts == [2 * CHUNK + 45, CHUNK + 45, 45]
    assert torch.allclose(logits, whole, atol=1e-4)


def read(backend: Any, ids: Any, start: Any = None) -> tuple[Any, torch.Tensor]:
    state = backend.open(ids, start)
    logits = None
    while logits is None:
        (logits,) = backend.prefill([state])
    return state, logits


def test_prefill_in_batch_and_after_cached_prefix(
    tiny_llama: Callable[..., Any],
) -> None:
    with torch.inference_mode(False):
        backend = FlatBackend(as_network(tiny_llama().eval(), CPU, torch.float32), 1024)
    assert backend.reuses
    draws = np.random.default_rng(0)
    whole = draws.integers(3, 300, 2 * CHUNK + 100)
    state, expected = read(backend, whole)
    for count in (40, CHUNK, CHUNK + 77, len(whole) - 1):
        start = backend.key_values(state, 0, count)
        assert len(start) == count
        again, found = read(backend, whole, start)
        assert torch.allclose(found, expected, atol=1e-4)
        backend.free(again)
    beside = [backend.open(draws.integers(3, 300, size)) for size in (5, 33, 64, 90)]
    own = backend.open(whole)
    logits = None
    while logits is None:
        *_, logits = backend.prefill([*(each for each in beside if each.unread), own])
    assert torch.allclose(logits, expected, atol=1e-4)
    assert torch.equal(read(backend, whole)[1], expected), "alone, the shapes are the same"


@pytest.mark.parametrize("copies", [1, 3])
def test_shared_prefix_is_read_once(
    copies: int, tiny_llama: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.inference_mode(False):
        model = tiny_llama(hidden_size=128).eval()
        backend = FlatBackend(as_network(model, CPU, torch.float32), 1024)
    draws = np.random.default_rng(0)
    instruction, passage = draws.integers(3, 300, 2 * CHUNK), draws.integers(3, 300, CHUNK)
    prompts = [
        np.concatenate([*parts, draws.integers(3, 300, size)])
        for parts, size in (
            ([], 5), ([instruction], 20), ([instruction], 7), ([instruction, passage], 40),
            ([], 64), ([instruction, passage], 9), ([instruction], 1),
        )
    ]  # fmt: skip
    prompts.append(prompts[1])
    expected = [read(backend, ids)[1] for ids in prompts]
    tokens: list[int] = []
    together: list[int] = []
    honest = FlatBackend._prefill

    def counted(self: Any, states: Any) -> Any:
        before = sum(state.unread for state in states)
        found = honest(self, states)
        tokens.append(before - sum(state.unread for state in states))
        together.append(len(states))
        return found

    monkeypatch.setattr(FlatBackend, "_prefill", counted)
    states, logits = read_prompts(backend, prompts, copies)
    assert len(states) == len(logits) == len(prompts) * copies
    for place, logits_V in enumerate(logits):
        assert torch.allclose(logits_V, expected[place // copies], atol=1e-4), place
    assert sum(tokens) < sum(map(len, prompts)) - 3 * CHUNK
    assert max(together) > 1  # short prompts were read together
    steps = backend.step(states, [7] * len(states))
    alone, _ = read_prompts(backend, prompts[3:4], 1)
    assert torch.allclose(steps[3 * copies], backend.step(alone, [7])[0], atol=1e-4)


def test_correct_guesses_save_steps_with_equal_logits(
    family_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = network(family_folder("llama"))
    prompts = [np.tile(np.arange(5, 25), 3), PROMPTS[3]]
    steps: list[int] = []
    honest = FlatBackend._step

    def counted(self: Any, states: Any, tokens: Any) -> Any:
        steps.append(len(states))
        return honest(self, states, tokens)

    monkeypatch.setattr(FlatBackend, "_step", counted)

    def answers() -> tuple[list[list[int]], list[list[torch.Tensor]], int]:
        backend = FlatBackend(made, 1024)
        states = [begin(backend, ids)[0] for ids in prompts]
        steps.clear()
        # A partly repetitive text with some wrong guesses.
        texts = [[*range(5, 25), 7, 8, *range(9, 20), 3, 4, 5, 6, 7] * 2, [*range(30, 68)] * 2]
        logits = [backend.step(states, tokens) for tokens in zip(*texts, strict=True)]
        return texts, [list(each) for each in logits], len(steps)

    _, guessed, fewer = answers()
    monkeypatch.setattr("luthier.models.decoding.torch_backend.GUESSING", 0)
    texts, plain, all_steps = answers()
    assert all_steps == len(texts[0])
    assert fewer < 0.7 * all_steps
    for at, (one, other) in enumerate(zip(guessed, plain, strict=True)):
        assert all(torch.allclose(*pair, atol=1e-4) for pair in zip(one, other, strict=True)), at


def test_freed_slots_are_never_read(family_folder: Callable[[str], Path]) -> None:
    """Freed slots may contain nan, and 0 times nan is nan."""
    backend = FlatBackend(network(family_folder("llama")), 512)
    expected = written(backend, PROMPTS[:1], 100)
    others = [begin(backend, np.arange(100) % 90 + 3)[0] for _ in range(4)]
    (bank,) = {state.span.bank for state in others}
    spoilt = others[-1]
    for pair in bank.layers.values():
        for part in pair:
            part[spoilt.span.slot] = torch.nan
    slot = spoilt.span.slot
    backend.free(spoilt)
    assert next(iter(bank.layers.values()))[0][slot].isnan().all(), "the place is there still"
    assert written(backend, PROMPTS[:1], 100) == expected
    for state in others[:-1]:
        backend.free(state)


def test_tokens_beyond_window_match_network_forward() -> None:
    """The prompts have more than one chunk of a prefill, the completions guessed tokens."""
    config: Any = transformers.GptOssConfig(
        vocab_size=320, hidden_size=32, intermediate_size=32, num_hidden_layers=2, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1,
        layer_types=["sliding_attention", "full_attention"], sliding_window=70,
        initializer_range=0.2,
    )  # fmt: skip
    # By default 4,096, and the comparison of a longer row takes minutes on a busy machine.
    config.rope_parameters["original_max_position_embeddings"] = 512
    with torch.inference_mode(False):
        torch.manual_seed(0)
        model = transformers.GptOssForCausalLM(config).eval()
        plain = copy.deepcopy(model)
        made = as_network(model, CPU, torch.float32)
    prompts = [np.tile(np.arange(size) % 50 + 3, 6) for size in (13, 61)]
    sampling = Sampling(max_tokens=90, temperature=0)
    backend = FlatBackend(made, 1024)
    for prompt, ids in zip(prompts, written(backend, prompts, 90), strict=True):
        ((alone,),) = sample(made, [prompt], 1, sampling)
        assert ids == alone.ids_T.tolist()
        whole = torch.from_numpy(np.concatenate([prompt, ids]))[None]
        best = plain(input_ids=whole).logits[0, len(prompt) - 1 : -1].argmax(-1)
        assert ids == best.tolist()


def test_forks_of_a_prompt_continue_independently(family_folder: Callable[[str], Path]) -> None:
    backend = FlatBackend(network(family_folder("llama")), 1024)
    state = backend.open(PROMPTS[2])
    backend.prefill([state])
    one, two = backend.fork(state, 2)
    first = backend.step([one, two], [7, 9])
    other, _ = begin(backend, PROMPTS[2])
    assert torch.allclose(backend.step([other], [9])[0], first[1], atol=1e-4)
    assert not torch.allclose(first[0], first[1], atol=1e-2)


@pytest.mark.parametrize("positions", [98, 127, 128])
def test_a_table_of_positions_may_end_anywhere(
    positions: int, tiny_gpt2: Callable[..., Any]
) -> None:
    """Guesses may exceed the position table; accepted tokens may not."""
    with torch.inference_mode(False):
        short, long = (
            as_network(tiny_gpt2(n_positions=size).eval(), CPU, torch.float32)
            for size in (positions, 512)
        )
        long.model.transformer.wpe.weight.data[:positions] = short.model.transformer.wpe.weight
        for one, other in zip(short.model.parameters(), long.model.parameters(), strict=True):
            if one.shape == other.shape:
                other.data.copy_(one)
    prompts = [np.tile(np.arange(5, 12), 9), np.arange(positions - 1) % 200 + 3]
    repeated = [int(token) for token in np.tile(np.arange(5, 12), 20)]
    found = []
    for made in (short, long):
        backend = FlatBackend(made, positions)
        states = [begin(backend, ids)[0] for ids in prompts]
        steps = [backend.step(states[:1], [token]) for token in repeated[: positions - 64]]
        found.append([*steps, backend.step(states[1:], [5])])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_failed_fork_frees_copies(
    family_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = FlatBackend(network(family_folder("llama")), 1024)
    state = backend.open(PROMPTS[2])
    backend.prefill([state])
    honest, copies = Bank.copy, list[Any]()

    def copy_two(bank: Bank, other: Any) -> Any:
        if len(copies) == 2:
            raise RuntimeError("not enough memory")
        copies.append(honest(bank, other))
        return copies[-1]

    monkeypatch.setattr(Bank, "copy", copy_two)
    with pytest.raises(RuntimeError):
        backend.fork(state, 4)
    assert not copies[0].bank.spans
    backend.free(state)  # the caller still owns the state
    assert backend._base.sequences == 0


def test_room_sizes_and_byte_estimates(family_folder: Callable[[str], Path]) -> None:
    rooms = [room_for(tokens) for tokens in range(1, 2000)]
    assert all(room >= tokens for tokens, room in enumerate(rooms, 1))
    assert all(room <= max(STEP, 2 * tokens) for tokens, room in enumerate(rooms, 1))
    assert len(set(rooms)) < 15
    latent = next(each for each in DECODERS if each.model_type == "deepseek_v3")
    model: Any = transformers.AutoModelForCausalLM.from_config(latent.config(), dtype=torch.float32)
    set_head_kind(model, "causal_lm")
    for each in (network(family_folder("llama")), as_network(model, CPU, torch.float32)):
        backend = FlatBackend(each, 1024)
        state, _ = begin(backend, PROMPTS[0])
        real = sum(
            p.numel() * p.element_size() for pair in state.span.bank.layers.values() for p in pair
        )
        assert real <= backend.bytes_of(1) <= 2 * real


def test_adding_and_removing_sequences_copies_no_cache() -> None:
    bank = Bank(STEP)
    key = torch.zeros(1, 2, 1, 4)
    bank.add()
    bank.remove(bank.add())
    kept, _ = bank.of(0, key, key)
    for _ in range(3):
        bank.remove(bank.add())
        assert bank.layers[0][0] is kept


def test_a_bank_gives_memory_back() -> None:
    bank = Bank(STEP)
    spans = [bank.add() for _ in range(9)]
    key = torch.zeros(1, 2, 1, 4)
    for number, span in enumerate(spans):
        bank.of(0, key, key)[0][span.slot] = number
    for span in spans[:5]:
        bank.remove(span)
    assert [float(bank.layers[0][0][span.slot, 0, 0, 0]) for span in spans[5:]] == [5, 6, 7, 8]
    assert sorted(span.slot for span in spans[5:]) == [0, 1, 2, 3]
    assert bank.capacity < 9
    for span in spans[5:]:
        bank.remove(span)
    assert bank.capacity == 0
    assert not bank.layers
