"""The llama.cpp backend: the backend contract, and errors instead of aborts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from luthier.errors import RecipeError
from luthier.evaluation.parity import compare_backends
from luthier.models.decoding import backends, llama_cpp
from luthier.models.decoding.backends import BACKENDS, Backend, read_prompts
from luthier.models.decoding.torch_backend import FlatBackend
from luthier.models.formats.gguf import write_gguf
from luthier.models.load import as_network

try:
    BACKENDS["llama.cpp"].check()
except RecipeError as missing:
    pytest.skip(str(missing), allow_module_level=True)

CPU = torch.device("cpu")
VOCABULARY, CONTEXT = 320, 512
ROUNDING = 0.01
"""Tolerance for logits of some tens: keys and values have 16 bits."""
PROMPTS = [np.arange(5, 5 + size) % 300 + 3 for size in (1, 7, 31, 33, 64, 290)]


@pytest.fixture(scope="module")
def network(tiny_llama: Callable[..., Any]) -> Any:
    return as_network(
        tiny_llama(seed=3, max_position_embeddings=CONTEXT).eval(), CPU, torch.float32
    )


@pytest.fixture(scope="module")
def file(network: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(network.model, None, path, "f32")
    return path


@pytest.fixture
def backend(file: Path) -> Iterator[llama_cpp.LlamaCppBackend]:
    made = llama_cpp.LlamaCppBackend(file, CONTEXT, VOCABULARY)
    yield made
    made.close()


def begin(backend: Backend, ids: Any) -> tuple[Any, Any]:
    state, logits = backend.open(ids), None
    while logits is None:
        (logits,) = backend.prefill([state])
    return state, logits


def written(backend: Backend, prompts: list[Any], count: int) -> list[list[int]]:
    """Return greedy tokens of each prompt, all in joint steps."""
    begun = [begin(backend, ids) for ids in prompts]
    states = [backend.fork(state, 1)[0] for state, _ in begun]
    found = [[int(logits.argmax())] for _, logits in begun]
    for _ in range(count - 1):
        logits = backend.step(states, [ids[-1] for ids in found])
        for ids, row in zip(found, logits, strict=True):
            ids.append(int(row.argmax()))
    for state in states:
        backend.free(state)
    return found


def test_llama_cpp_answers_match_torch(network: Any, backend: llama_cpp.LlamaCppBackend) -> None:
    """Logits after prompts of one and two chunks, and in joint steps."""
    parity = compare_backends(FlatBackend(network, CONTEXT), backend, PROMPTS, 24)
    assert parity.tokens == 24 * len(PROMPTS)
    assert parity.agreement == 1 and parity.max_kl < 1e-4
    assert backend._used == 0 and len(backend._free_places) == llama_cpp.SEQUENCES


def test_gpt2_does_too(tiny_gpt2: Callable[..., Any], tmp_path: Path) -> None:
    made = as_network(tiny_gpt2(seed=3).eval(), CPU, torch.float32)
    write_gguf(made.model, None, tmp_path / "gpt2.gguf", "f32")
    size = int(made.model.config.vocab_size)
    backend = llama_cpp.LlamaCppBackend(tmp_path / "gpt2.gguf", made.context, size)
    try:
        prompts = [ids[: made.context // 2] % size for ids in PROMPTS]
        parity = compare_backends(FlatBackend(made, made.context), backend, prompts, 12)
        assert parity.agreement == 1 and parity.max_kl < 1e-4
    finally:
        backend.close()


def test_forks_share_prompt_and_continue_independently(
    backend: llama_cpp.LlamaCppBackend,
) -> None:
    state, _ = begin(backend, PROMPTS[4])
    copies = backend.fork(state, 3)
    assert copies[0] is state
    logits = backend.step(copies, [7, 8, 9])
    for row, token in zip(logits, (7, 8, 9), strict=True):
        _, alone = begin(backend, np.append(PROMPTS[4], token))
        torch.testing.assert_close(row, alone, rtol=0, atol=ROUNDING)
    backend.free(copies[1])  # the shared prompt stays
    again = backend.step([copies[0], copies[2]], [3, 4])
    _, alone = begin(backend, np.append(PROMPTS[4], [9, 4]))
    torch.testing.assert_close(again[1], alone, rtol=0, atol=ROUNDING)


def test_prefill_together_matches_prefill_alone(backend: llama_cpp.LlamaCppBackend) -> None:
    opened = [backend.open(ids) for ids in PROMPTS]
    first = backend.prefill(opened)
    assert [each is None for each in first] == [False] * 5 + [True]
    assert backend.prefill(opened[:2]) == [None, None]  # read already
    (last,) = backend.prefill(opened[5:])
    for found, ids in zip([*first[:5], last], PROMPTS, strict=True):
        torch.testing.assert_close(found, begin(backend, ids)[1], rtol=0, atol=ROUNDING)
    states, logits = backend.prefill_batch(PROMPTS[:3], 2)
    assert len(states) == len(logits) == 6 and len(set(map(id, states))) == 6
    for place, ids in enumerate(PROMPTS[:3]):
        _, alone = begin(backend, ids)
        torch.testing.assert_close(logits[2 * place], alone, rtol=0, atol=ROUNDING)


def test_failed_prefill_leaves_no_sequence_open(backend: llama_cpp.LlamaCppBackend) -> None:
    for together in (True, False):
        read = backend.prefill_batch if together else partial(read_prompts, backend)
        with pytest.raises(ValueError):
            read([PROMPTS[0], np.array([VOCABULARY])], 3)
        with pytest.raises(RuntimeError):
            read([PROMPTS[0], PROMPTS[1]], llama_cpp.SEQUENCES - 1)
    states, _ = backend.prefill_batch([PROMPTS[0]], llama_cpp.SEQUENCES - 1)
    assert len(states) == llama_cpp.SEQUENCES - 1


def test_all_sequences_step_at_once(backend: llama_cpp.LlamaCppBackend) -> None:
    count = llama_cpp.SEQUENCES - 2
    states = [begin(backend, PROMPTS[i % 4])[0] for i in range(count)]
    logits = backend.step(states, [i % 300 for i in range(count)])
    assert logits.shape == (count, VOCABULARY)
    for place in (0, count - 1):
        _, alone = begin(backend, np.append(PROMPTS[place % 4], place % 300))
        torch.testing.assert_close(logits[place], alone, rtol=0, atol=ROUNDING)


def test_cache_grows_with_content_and_is_freed(
    file: Path, network: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Growing the cache preserves its content, copies included."""
    monkeypatch.setattr(llama_cpp, "CELLS", 256)
    backend = llama_cpp.LlamaCppBackend(file, CONTEXT, VOCABULARY)
    try:
        states = backend.fork(begin(backend, PROMPTS[5][:200])[0], 2)
        assert backend._cells == 256
        longer, _ = begin(backend, PROMPTS[5])
        assert backend._cells >= 2 * 200 + 290
        logits = backend.step([*states, longer], [7, 8, 9])
        _, alone = begin(backend, np.append(PROMPTS[5][:200], 8))
        torch.testing.assert_close(logits[1], alone, rtol=0, atol=ROUNDING)
        for state in list(backend._sequences):
            backend.free(state)
        assert backend._context is None and backend._used == 0
        again = compare_backends(FlatBackend(network, CONTEXT), backend, PROMPTS, 4)
        assert again.agreement == 1
    finally:
        backend.close()


def test_invalid_ids_and_states_are_refused(
    backend: llama_cpp.LlamaCppBackend,
) -> None:
    for ids in ([], [-1], [VOCABULARY], [3] * (CONTEXT + 1)):
        with pytest.raises(ValueError):
            backend.open(np.array(ids, dtype=np.int64))
    unread = backend.open(PROMPTS[2])
    with pytest.raises(ValueError):
        backend.step([unread], [3])
    full, _ = begin(backend, np.full(CONTEXT, 3))
    with pytest.raises(ValueError):
        backend.step([full], [3])
    state, _ = begin(backend, PROMPTS[1])
    for token in (-1, VOCABULARY):
        with pytest.raises(ValueError):
            backend.step([state], [token])
    with pytest.raises(RuntimeError):
        backend.step([state, state], [3, 4])
    backend.free(state)
    backend.free(state)  # once more does nothing
    with pytest.raises(RuntimeError):
        backend.step([state], [3])
    for _ in range(llama_cpp.SEQUENCES - 2):
        backend.open(PROMPTS[0])
    with pytest.raises(RuntimeError):
        backend.open(PROMPTS[0])
    backend.close()
    backend.close()
    backend.free(full)
    with pytest.raises(RuntimeError):
        backend.open(PROMPTS[0])


def test_invalid_gguf_is_refused_with_reason(file: Path, tmp_path: Path) -> None:
    whole = file.read_bytes()
    for name, content in {"cut": whole[: len(whole) // 2], "text": b"hello" * 100}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(RecipeError) as refused:
            llama_cpp.LlamaCppBackend(tmp_path / name, CONTEXT, VOCABULARY)
        assert refused.value.rule == "gguf.unreadable"
    with pytest.raises(RecipeError) as refused:
        llama_cpp.LlamaCppBackend(file, CONTEXT, VOCABULARY + 1)
    assert refused.value.rule == "gguf.vocabulary"


def test_unsupported_library_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_BACKEND", "llama.cpp")
    assert backends.chosen_backend().id == "llama.cpp"
    monkeypatch.setattr(backends, "version", lambda name: "2026.9.1")
    with pytest.raises(RecipeError) as refused:
        backends.chosen_backend()
    assert refused.value.rule == "backend.version"
