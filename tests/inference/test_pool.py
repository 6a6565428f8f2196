"""The model pool: one load per model, eviction, and retries after failures."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from luthier.errors import UnknownModel
from luthier.inference.decoder import Decoder
from luthier.inference.inference import (
    GenerationRequest,
    InferenceFailed,
    InferenceRefused,
    TooLong,
)
from luthier.inference.pool import RECENT, ModelPool
from luthier.inference.scheduler import working_for
from luthier.limits import ModelLimits
from luthier.processes import cancelled_by

REQUEST = GenerationRequest("The quick", max_tokens=4, temperature=0)


pytestmark = pytest.mark.usefixtures("in_float32")


@pytest.fixture
def folders(tmp_path: Path, tiny_model_folder: Path) -> list[str]:
    return [str(shutil.copytree(tiny_model_folder, tmp_path / f"m{i}")) for i in range(3)]


@pytest.fixture
def encoder(family_folder: Callable[[str], Path]) -> str:
    return str(family_folder("bert"))


@pytest.fixture
def pool(folders: list[str]) -> Iterator[ModelPool]:
    """Yield a pool with memory for two models."""
    size = sum(path.stat().st_size for path in Path(folders[0]).glob("*.safetensors"))
    made = ModelPool(int(2.5 * 2.5 * size), cache=1 << 28)
    yield made
    made.close()


def test_concurrent_requests_load_model_once(
    pool: ModelPool, folders: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[str] = []
    honest = Decoder.open
    monkeypatch.setattr(
        Decoder, "open", lambda stored, *given: (loads.append(stored.id), honest(stored, *given))[1]
    )
    with ThreadPoolExecutor(8) as threads:
        texts = list(
            threads.map(lambda _: pool.submit(folders[0], REQUEST).results()[0].text, range(8))
        )
    assert len(set(texts)) == len(loads) == 1


def test_two_models_are_never_loaded_side_by_side(
    pool: ModelPool, folders: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loading, most = 0, 0
    honest = Decoder.open

    def slow(stored: object, *given: object) -> Decoder:
        nonlocal loading, most
        loading += 1
        most = max(most, loading)
        time.sleep(0.1)
        try:
            return honest(stored, *given)  # type: ignore[arg-type]
        finally:
            loading -= 1

    monkeypatch.setattr(Decoder, "open", slow)
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda name: pool.submit(name, REQUEST).results(), folders[:2]))
    assert most == 1


@pytest.mark.slow
def test_least_recently_used_model_is_evicted(pool: ModelPool, folders: list[str]) -> None:
    for folder in (folders[0], folders[1], folders[0], folders[2]):
        pool.submit(folder, REQUEST).results()
    assert pool.loaded_ids() == [folders[0], folders[2]]
    bias = {1: -100.0}
    busy = [
        pool.submit(folder, GenerationRequest("x", max_tokens=900, temperature=1, logit_bias=bias))
        for folder in (folders[0], folders[2])
    ]
    with pytest.raises(InferenceFailed) as refused:
        pool.submit(folders[1], REQUEST)
    assert refused.value.code == "ModelNotReady"
    busy[0].close()
    assert pool.submit(folders[1], REQUEST).results()[0].tokens == 4
    assert pool.loaded_ids() == [folders[2], folders[1]]
    busy[1].close()
    assert [entry.uses for entry in pool._entries.values()] == [0, 0]


def test_preloaded_model_answers_without_loading(
    pool: ModelPool, folders: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pool.load(folders[0])
    (loaded,) = pool.loaded_models()
    assert (loaded.id, loaded.base, loaded.requests) == (folders[0], None, 0)
    assert loaded.bytes == pool.weight_bytes() and loaded.loaded <= loaded.last_used
    monkeypatch.setattr(Decoder, "open", None)
    busy = pool.submit(folders[0], GenerationRequest("x", max_tokens=900, logit_bias={1: -100.0}))
    (asked,) = pool.loaded_models()
    assert asked.requests == 1 and asked.last_used > loaded.last_used
    pool.unload(folders[0])
    assert not pool.loaded_models() and next(busy)
    threads = decoder_threads()
    busy.close()
    assert not any(thread.is_alive() for thread in threads)
    pool.unload(folders[0])  # a missing model is no error


def decoder_threads() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name == "luthier-decoder"]


@pytest.mark.slow
def test_preload_evicts_no_busy_or_recent_model(pool: ModelPool, folders: list[str]) -> None:
    bias = {1: -100.0}
    busy = pool.submit(folders[0], GenerationRequest("x", max_tokens=900, logit_bias=bias))
    pool.submit(folders[1], REQUEST).results()
    with pytest.raises(InferenceFailed) as refused:
        pool.load(folders[2])
    assert refused.value.code == "ModelNotReady"
    assert pool.loaded_ids() == folders[:2]
    for entry in pool._entries.values():
        entry.last_used -= 2 * RECENT
    pool.load(folders[2])
    assert pool.loaded_ids() == [folders[0], folders[2]]
    busy.close()


@pytest.mark.slow
def test_model_over_free_memory_is_refused_before_loading(
    pool: ModelPool, folders: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Jobs may use memory that was free at the start of the server."""
    from luthier.inference import pool as pools

    busy = pool.submit(folders[0], GenerationRequest("x", max_tokens=900, logit_bias={1: -100.0}))
    size = pool.weight_bytes()
    monkeypatch.setattr(Decoder, "open", None)  # nothing is loaded
    monkeypatch.setattr(pools, "available_memory", lambda: size // 2)
    figures = f"needs {size >> 20} MiB of memory, and {size // 2 >> 20} MiB are free now"
    with pytest.raises(InferenceFailed, match=figures) as refused:
        pool.submit(folders[1], REQUEST)
    assert refused.value.code == "ModelNotReady"
    next(busy)
    assert pool.loaded_ids() == [folders[0]]
    monkeypatch.undo()
    busy.close()


@pytest.mark.slow
def test_idle_models_go_where_memory_is_short_now(
    pool: ModelPool, folders: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from luthier.inference import pool as pools

    pool.submit(folders[0], REQUEST).results()
    monkeypatch.setattr(pools, "available_memory", lambda: 0)
    assert pool.submit(folders[1], REQUEST).results()[0].tokens == 4
    assert pool.loaded_ids() == [folders[1]]


@pytest.mark.slow
def test_requests_run_while_models_load_and_close(
    pool: ModelPool, folders: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from luthier.library import models as store

    pool.submit(folders[0], REQUEST).results()
    pool.submit(folders[1], REQUEST).results()
    evicted, find, close = pool._entries[folders[0]].model, store.find, Decoder.close
    finding, found, closing, closed = (threading.Event() for _ in range(4))

    def slow_find(model_id: str, *given: Any) -> Any:
        if model_id == folders[2]:
            finding.set()
            assert found.wait(20)
        return find(model_id, *given)

    def slow_close(decoder: Decoder) -> None:
        if decoder is evicted:
            closing.set()
            assert closed.wait(20)
        close(decoder)

    monkeypatch.setattr(store, "find", slow_find)
    monkeypatch.setattr(Decoder, "close", slow_close)
    with ThreadPoolExecutor(2) as threads:
        asked = threads.submit(lambda: pool.submit(folders[2], REQUEST).results()[0].tokens)
        for reached, go_on in ((finding, found), (closing, closed)):
            assert reached.wait(20)
            other = threads.submit(lambda: pool.submit(folders[1], REQUEST).results()[0].tokens)
            try:
                assert other.result(10) == 4 and pool.weight_bytes() > 0
            finally:
                go_on.set()
        assert asked.result() == 4
    assert set(pool.loaded_ids()) == set(folders[1:])


def test_half_loaded_model_is_closed_after_failure(
    pool: ModelPool, folders: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Decoder] = []
    honest = Decoder.open

    def keep(stored: Any, *given: Any) -> Decoder:
        opened.append(honest(stored, *given))
        return opened[-1]

    def fail(*given: Any) -> None:
        raise RuntimeError("no tokens")

    monkeypatch.setattr(Decoder, "open", keep)
    monkeypatch.setattr("luthier.data.conversations.tokenization.TextTokenizer.encode_whole", fail)
    with pytest.raises(InferenceFailed):
        pool.submit(folders[0], REQUEST)
    assert not opened[0]._thread.is_alive()
    assert pool.loaded_ids() == []


def test_failed_load_succeeds_after_repair(pool: ModelPool, folders: list[str]) -> None:
    weights = Path(folders[0]) / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InferenceFailed) as failed:
        pool.submit(folders[0], REQUEST)
    assert failed.value.code == "ModelError"
    assert pool.loaded_ids() == []
    weights.write_bytes(whole)
    assert pool.submit(folders[0], REQUEST).results()[0].tokens == 4
    with pytest.raises(UnknownModel):
        pool.submit("nothing-like-it", REQUEST)
    with pytest.raises(InferenceFailed):
        ModelPool(10).submit(folders[0], REQUEST)
    assert pool.count(folders[0], [5, 6, 7]) == 3


def test_embeddings_do_not_depend_on_batch(
    family_folder: Callable[[str], Path], tmp_path: Path, pool: ModelPool
) -> None:
    from luthier.files import write_json
    from luthier.models.manifest import MANIFEST

    encoder = tmp_path / "luthier-home" / "models" / "base" / "reader"
    shutil.copytree(family_folder("bert"), encoder)
    write_json(encoder / MANIFEST, {"id": "reader", "kind": "encoder"})
    texts = ["a card", "my new card has not arrived", "fox", "the quick brown fox " * 4]
    large = ModelPool(1 << 30)
    together = large.embed("reader", texts)
    for text, found in zip(texts, together, strict=True):
        assert large.embed("reader", [text]) == [found]
        assert np.linalg.norm(found.vector) > 0
        assert found.tokens > 2
    assert len({found.vector for found in together}) == len(texts)
    with pytest.raises(TooLong):
        large.embed("reader", ["fox " * 500])
    with pytest.raises(InferenceRefused):
        large.submit("reader", REQUEST)
    assert not large.writes("reader")
    large.close()


def test_embedding_queue_timeout_is_throttled(encoder: str) -> None:
    pool = ModelPool(1 << 30, cache=1 << 28, limits=ModelLimits(queue_seconds=0.2))
    expected = pool.embed(encoder, ["fox"])
    reader = pool._entries[encoder].model
    done: list[Any] = []

    def wait() -> None:
        with working_for("", background=True):
            done.append(pool.embed(encoder, ["fox"]))

    patient = threading.Thread(target=wait)
    with pool._scheduler.work("bob", reader):
        patient.start()
        with pytest.raises(InferenceFailed) as refused:
            pool.embed(encoder, ["fox"])
        assert refused.value.code == "Throttling"
        assert refused.value.code == "Throttling" and not done
    patient.join(20)
    assert done == [expected] == [pool.embed(encoder, ["fox"])]
    pool.close()


@pytest.mark.parametrize("ids", [[-1], [2**63], [10**30], [320, 10**6]])
def test_embedding_of_invalid_token_ids_is_refused(
    pool: ModelPool, encoder: str, ids: list[int]
) -> None:
    with pytest.raises(InferenceRefused):
        pool.embed(encoder, [ids])


def test_cancelled_embedding_stops_encoding(
    pool: ModelPool, encoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool.embed(encoder, ["Hi"])
    reader = pool._entries[encoder].model
    works: list[Any] = []
    done: list[int] = []
    honest = reader._predictor.read

    def read(rows: Any, **settings: Any) -> Any:
        done.append(1)
        if len(done) == 3:
            works[0].close()
        return honest(rows, **settings)

    monkeypatch.setattr(reader._predictor, "read", read)
    monkeypatch.setattr(reader._batcher, "_size", 1)
    monkeypatch.setattr(reader._batcher, "_most", 1)
    with cancelled_by(works.append), pytest.raises(InferenceFailed) as refused:
        pool.embed(encoder, ["Hi"] * 50)
    assert refused.value.code == "ServiceUnavailable"
    assert len(done) == 3


@pytest.mark.slow
def test_embeddings_are_scheduled_fairly_between_clients(
    pool: ModelPool, encoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool.embed(encoder, ["Hi"])
    reader = pool._entries[encoder].model
    order: list[int] = []
    begun, honest = threading.Event(), reader._predictor.read
    texts = {"few": "a", "many": "a fox, and another fox"}

    def read(rows: Any, **settings: Any) -> Any:
        order.extend(len(row) for row in rows)
        begun.set()
        time.sleep(0.02)
        return honest(rows, **settings)

    monkeypatch.setattr(reader._predictor, "read", read)
    monkeypatch.setattr(reader._batcher, "_size", 1)
    monkeypatch.setattr(reader._batcher, "_most", 1)

    def embed(client: str) -> None:
        with working_for(client):
            pool.embed(encoder, [texts[client]] * (40 if client == "many" else 3))

    with ThreadPoolExecutor(8) as clients:
        many = [clients.submit(embed, "many") for _ in range(6)]
        assert begun.wait(10)
        clients.submit(embed, "few").result()
        assert sum(tokens > 5 for tokens in order) < 30
        for done in many:
            done.result()


def test_encoder_embedding_is_mean_of_states(pool: ModelPool, encoder: str) -> None:
    from transformers import AutoModel, AutoTokenizer

    texts = ["a card", "my new card has not arrived", "fox"]
    found = pool.embed(encoder, texts)
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    network = AutoModel.from_pretrained(encoder, dtype=torch.float32).eval()
    for text, given in zip(texts, found, strict=True):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            mean_H = network(input_ids=ids).last_hidden_state[0].mean(0).numpy()
        assert given.tokens == ids.shape[1]
        assert np.allclose(given.vector, mean_H / np.linalg.norm(mean_H), atol=1e-5)
        assert pool.embed(encoder, [text]) == [given]
    assert pool.embed(encoder, [[5, 6, 7]])[0].vector
    with pytest.raises(TooLong):
        pool.embed(encoder, ["fox " * 2000])


def test_embedding_with_generator_is_refused(pool: ModelPool, folders: list[str]) -> None:
    request = GenerationRequest("The quick", max_tokens=20, temperature=0)
    writing = pool.submit(folders[0], request)
    with pytest.raises(InferenceRefused) as refused:
        pool.embed(folders[0], ["fox"])
    assert refused.value.parameter == "model"
    assert writing.results()[0].text == pool.submit(folders[0], request).results()[0].text


def test_models_share_the_memory_for_sequences(pool: ModelPool, folders: list[str]) -> None:
    """A request waits until a second model releases memory."""
    bias = {1: -100.0}
    first = pool.submit(
        folders[0], GenerationRequest("x", max_tokens=300, temperature=1, logit_bias=bias)
    )
    next(first)
    pool.memory.total = pool.memory.reserved_bytes + 100
    second = pool.submit(
        folders[1], GenerationRequest("x", max_tokens=4, temperature=0, logit_bias=bias)
    )
    assert second.results()[0].tokens == 4
    until = time.monotonic() + 1
    while (
        pool.memory.reserved_bytes and time.monotonic() < until
    ):  # given back behind the last piece
        time.sleep(0.01)
    assert pool.memory.reserved_bytes == 0
    assert first.results()[0].tokens == 300
