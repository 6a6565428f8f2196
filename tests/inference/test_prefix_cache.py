"""The prefix cache stores shared prefixes once, per client, within a memory limit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from decoding import answer

from luthier.inference.decoder import Decoder
from luthier.inference.inference import GenerationRequest
from luthier.inference.memory import CacheBudget
from luthier.inference.prefix_cache import PrefixCache
from luthier.models.decoding.backends import FEWEST_SHARED
from luthier.models.decoding.kv_cache import KeyValues

HEADS, SIZE = 2, 4
TOKEN = 2 * HEADS * SIZE * 4


def key_values(ids: Any, start: int) -> KeyValues:
    """Return keys and values that identify their tokens."""
    part_T = torch.tensor(ids[start:], dtype=torch.float32)
    key_HTD = part_T[None, :, None].expand(HEADS, -1, SIZE).clone()
    return KeyValues({0: (key_HTD, -key_HTD)})


def add(cache: PrefixCache, ids: Any, client: str = "a", model: str = "m") -> None:
    cache.add(model, client, ids, lambda start: key_values(ids, start))


def known(cache: PrefixCache, ids: Any, client: str = "a", model: str = "m") -> int:
    """Return the number of cached tokens of ``ids``, and check their values."""
    found = cache.longest(model, client, ids)
    if found is None:
        return 0
    key, value = found.layers[0]
    assert key[0, :, 0].tolist() == ids[: len(found)].tolist()
    assert torch.equal(value, -key)
    return len(found)


def prompt(*parts: tuple[int, int]) -> Any:
    return np.concatenate([np.arange(first, first + size) for first, size in parts])


def test_shared_prefixes_are_found_and_stored_once() -> None:
    cache = PrefixCache(CacheBudget(1 << 20))
    shared = (1000, 100)
    one, two, three = (prompt(shared, (own, 50)) for own in (0, 100, 200))
    add(cache, one)
    assert known(cache, two) == 100
    assert known(cache, one) == len(one) - 1, "the last token is read again, for its logits"
    assert known(cache, np.append(one, 7)) == len(one)
    assert known(cache, prompt((1000, 60), (0, 50))) == 60
    add(cache, two)
    add(cache, three)
    assert cache.nbytes == (100 + 3 * 50) * TOKEN
    for ids in (one, two, three):
        assert known(cache, np.append(ids, 7)) == len(ids)
    add(cache, one)
    assert cache.nbytes == (100 + 3 * 50) * TOKEN


def test_few_tokens_are_read_again() -> None:
    cache = PrefixCache(CacheBudget(1 << 20))
    add(cache, prompt((0, FEWEST_SHARED - 1)))
    assert not cache.nbytes
    add(cache, prompt((0, 100)))
    assert known(cache, prompt((0, FEWEST_SHARED - 1), (500, 50))) == 0
    assert known(cache, prompt((0, FEWEST_SHARED), (500, 50))) == FEWEST_SHARED


def test_clients_and_models_share_no_prefixes() -> None:
    cache = PrefixCache(CacheBudget(1 << 20))
    ids = prompt((0, 100))
    add(cache, ids)
    assert known(cache, ids, client="b") == known(cache, ids, model="n") == 0
    add(cache, ids, model="n")
    cache.forget("m")
    assert known(cache, ids) == 0 and known(cache, ids, model="n") == 99
    assert cache.nbytes == 100 * TOKEN


def test_oldest_prefix_of_largest_client_is_evicted_first() -> None:
    memory = CacheBudget(1000 * TOKEN)
    cache = PrefixCache(memory, share=0.5)
    prompts = [prompt((1000 * place, 100)) for place in range(6)]
    add(cache, prompts[0], client="small")
    for ids in prompts[1:5]:
        add(cache, ids)
    known(cache, prompts[1])
    add(cache, prompts[5])
    assert cache.nbytes == 500 * TOKEN
    assert known(cache, prompts[0], client="small") == 99, "one client's many push out no other's"
    assert [bool(known(cache, ids)) for ids in prompts[1:]] == [True, False, True, True, True]
    add(cache, prompt((0, 501)))
    assert cache.nbytes == 500 * TOKEN, "what never fits pushes out nothing"


def test_requests_reclaim_memory_from_prefix_cache() -> None:
    memory = CacheBudget(1000 * TOKEN)
    cache = PrefixCache(memory, share=0.5)
    for place in range(5):
        add(cache, prompt((1000 * place, 100)))
    assert memory.reserve("a", 700 * TOKEN)
    assert cache.nbytes == 300 * TOKEN
    add(cache, prompt((9000, 100)))
    assert cache.nbytes <= 300 * TOKEN
    assert memory.reserve("a", 300 * TOKEN) and not cache.nbytes
    assert not memory.reserve("a", TOKEN)
    memory.release("a", 1000 * TOKEN)
    add(cache, prompt((0, 100)))
    assert cache.nbytes == 100 * TOKEN


def test_full_eviction_searches_cache_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache is searched once for all evictions, because requests wait meanwhile."""
    memory = CacheBudget(1 << 30)
    cache = PrefixCache(memory)
    for place in range(40):
        add(cache, prompt((1000, 40), (10_000 + 100 * place, 40)), client=str(place % 3))
    looks: list[int] = []
    nodes = PrefixCache._nodes
    monkeypatch.setattr(PrefixCache, "_nodes", lambda self: looks.append(1) or nodes(self))
    assert memory.reserve("a", 1 << 30)
    assert not cache.nbytes and memory._spare == 0 and not cache._roots
    assert len(looks) == 1


def test_cached_prefix_gives_same_text_and_token_count(opened: Decoder) -> None:
    shared = list(range(20, 120))

    def request(own: int) -> GenerationRequest:
        return GenerationRequest([*shared, own], max_tokens=12, temperature=0.7, seed=3)

    alone = [opened.submit(request(own)).results()[0].text for own in (5, 6)]
    opened._prefixes.forget(opened)  # type: ignore[union-attr]
    answer(opened, request(9))
    streams = [opened.submit(request(own)) for own in (5, 6)]
    assert [stream.results()[0].text for stream in streams] == alone
    assert [stream.cached() for stream in streams] == [100, 100]
