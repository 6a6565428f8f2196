"""Custom models with adapters share a base network, in memory and in each step."""

from __future__ import annotations

import gc
import json
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from luthier.engine.train import train
from luthier.errors import CorruptFile
from luthier.inference.generation import Generator
from luthier.inference.inference import Chat, GenerationRequest, InferenceFailed, TokenChunk
from luthier.inference.pool import ModelPool
from luthier.library.models import StoredModel, find, load, shares_base
from luthier.models.decoding.lora_batch import LoraBatchLayer
from luthier.models.decoding.sampling import Sampling
from luthier.models.formats.save import ADAPTER, read_adapter
from luthier.models.manifest import MANIFEST
from luthier.recipe import Recipe
from luthier.types import Message

BASE = "tiny-llama"
METHODS: dict[str, Any] = {
    "one": {"method": "lora", "rank": 4},
    "two": {"method": "lora", "rank": 4},
    "rslora": {"method": "lora", "rank": 2, "rslora": True},
    "bottleneck": {"method": "adapters"},
    "soft": {"method": "prompt", "virtual_tokens": 4},
    "prefix": {"method": "prefix", "virtual_tokens": 4},
    "dora": {"method": "lora", "rank": 4, "dora": True},
    "sparse": {"method": "sparse"},
}
NAMES = [f"{BASE}:{name}" for name in METHODS]
SHARING = NAMES[:3]


def tune(home: Path, base: str, name: str, adaptation: dict[str, Any], seed: int = 0) -> str:
    """The id of a model tuned in float32."""
    data = home / "rows.jsonl"
    words = ("fox", "dog", "cat")
    rows = [{"prompt": f"say {w}", "completion": (w + name) * 2} for w in words]
    data.write_text("\n".join(map(json.dumps, rows)))
    fields = {
        "base": base, "name": name, "data": {"train": str(data), "validation_share": 0},
        "adaptation": adaptation,
        "training": {
            "max_steps": 6, "learning_rate": 0.05, "precision": "float32", "threads": 1,
            "seed": seed,
        },
    }  # fmt: skip
    return train(Recipe.parse(fields)).model_id


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Path:
    """A store with a model of each method."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LUTHIER_HOME", str(home))
        for number, (name, adaptation) in enumerate(METHODS.items()):
            tune(home, str(tiny_model_folder), name, adaptation, number)
    return home


@pytest.fixture(autouse=True)
def store(home: Path, in_float32: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_HOME", str(home))


@pytest.fixture
def base() -> str:
    parent = find(NAMES[0]).parent
    assert parent is not None
    return parent.id


@pytest.fixture
def pool() -> Iterator[ModelPool]:
    made = ModelPool(1 << 30, cache=1 << 28)
    yield made
    made.close()


def asked(text: str = "say fox", **fields: Any) -> GenerationRequest:
    fields = {"max_tokens": 16, "temperature": 0, "logit_bias": {1: -100.0}, **fields}
    return GenerationRequest(Chat((Message("user", text),)), **fields)


def text_of(pool: ModelPool, model: str, **fields: Any) -> str:
    return pool.submit(model, asked(**fields)).results()[0].text


def text_of_generator(model: str) -> str:
    """Return the reply of a generator without a server."""
    sampling = Sampling(temperature=0, max_tokens=16, logit_bias={1: -100.0})
    reply: str = Generator.open(find(model)).replies(["say fox"], sampling)[0]
    return reply.rstrip("\ufffd")


@pytest.mark.slow
def test_adapters_answer_together_as_each_does_alone(pool: ModelPool, base: str) -> None:
    rows = [*NAMES, base] * 2
    alone = {}
    for name in {*rows}:
        other = ModelPool(1 << 30, cache=1 << 28)
        alone[name] = [text_of(other, name, temperature=0.8, seed=seed) for seed in range(2)]
        other.close()
    assert len({texts[0] for texts in alone.values()}) > 5
    with ThreadPoolExecutor(len(rows)) as clients:
        together = list(
            clients.map(
                lambda at: text_of(pool, rows[at], temperature=0.8, seed=at // len({*rows})),
                range(len(rows)),
            )
        )
    assert together == [alone[name][at // len({*rows})] for at, name in enumerate(rows)]
    threads = {pool._entries[name].model._thread for name in (*SHARING, base)}
    assert len(threads) == 1, "one decoder writes all of them"
    assert all(pool._entries[each].model._thread not in threads for each in NAMES[3:])


@pytest.mark.slow
def test_adapter_of_an_adapter_has_separate_network(pool: ModelPool, home: Path) -> None:
    text_of(pool, NAMES[0])
    above = tune(home, NAMES[0], "above", {"method": "lora", "rank": 2})
    assert not shares_base(find(above))
    assert text_of(pool, above) == text_of_generator(above)


@pytest.mark.parametrize(
    ("family", "inside", "below"),
    [
        ("Bert", {"method": "lora"}, {"method": "lora", "targets": ("query", "value")}),
    ],
)
def test_adapter_inside_output_head_does_not_share_base(
    family: str,
    inside: dict[str, Any],
    below: dict[str, Any],
    home: Path,
    tmp_path: Path,
    pool: ModelPool,
    family_tokenizer: Callable[[str], Any],
) -> None:
    """The base's head computes the logits of all rows; BERT has a linear layer in the head."""
    import transformers

    tokenizer = family_tokenizer("bert")
    fields = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128,
        "initializer_range": 0.15, "is_decoder": True, "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id,
    }  # fmt: skip
    config = getattr(transformers, f"{family}Config")(**fields)
    torch.manual_seed(0)
    folder = tmp_path / family.lower()
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name, adaptation in {"inside": inside, "below": below}.items():
        tuned = tune(home, str(folder), name, adaptation)
        assert shares_base(find(tuned)) == (name == "below")
        assert text_of(pool, tuned) == text_of_generator(tuned)


def test_adapter_and_shared_base_keep_trained_weights() -> None:
    """The adapter is not rounded into the shared weights of the base."""
    stored = find(NAMES[0])
    assert stored.parent is not None
    generator = Generator.open(stored)
    kept = load(stored.parent, torch.float32, torch.device("cpu"))
    own = dict(generator.network.model.named_parameters())
    for name, weight in kept.named_parameters():
        same = own.get(name, own.get(name.replace(".weight", ".base_layer.weight")))
        assert same is not None and torch.equal(same, weight)
    for name, weight in read_adapter(stored.folder).items():
        assert torch.equal(own[name.removeprefix("base_model.model.")], weight)


@pytest.mark.slow
def test_idle_adapters_are_evicted_before_their_base(pool: ModelPool, base: str) -> None:
    text_of(pool, NAMES[0])
    text_of(pool, NAMES[1])
    text_of(pool, NAMES[0])
    assert pool.loaded_ids() == [NAMES[1], NAMES[0], base]
    pool.budget = pool.weight_bytes()
    text_of(pool, NAMES[2])
    assert pool.loaded_ids() == [NAMES[0], NAMES[2], base]
    busy = pool.submit(NAMES[2], asked(max_tokens=300))
    next(busy)
    with pytest.raises(InferenceFailed):
        text_of(pool, NAMES[-1])  # this adapter needs a separate network
    busy.close()
    text_of(pool, NAMES[-1])
    assert pool.loaded_ids() == [NAMES[-1]]


@pytest.mark.slow
def test_unload_of_adapter_ends_no_running_answer(pool: ModelPool, base: str) -> None:
    alone = text_of(pool, NAMES[1], max_tokens=60)
    streams = {name: pool.submit(name, asked(max_tokens=60)) for name in (*NAMES[:2], base)}
    next(streams[NAMES[0]])
    pool.unload(NAMES[0])
    assert NAMES[0] not in pool.loaded_ids()
    assert streams[NAMES[1]].results()[0].text == alone
    assert streams[NAMES[0]].results()[0].tokens == 60
    assert streams[base].results()[0].tokens == 60
    assert [entry.uses for entry in pool._entries.values()] == [0, 1]  # by the other adapter
    pool.unload(base)
    assert pool.loaded_ids() == []
    assert text_of(pool, NAMES[1], max_tokens=60) == alone


def test_closing_pool_fails_running_answers_with_service_unavailable(
    base: str, caplog: pytest.LogCaptureFixture
) -> None:
    pool = ModelPool(1 << 30, cache=1 << 28)
    streams = [pool.submit(name, asked(max_tokens=300)) for name in (base, NAMES[0], base)]
    for stream in streams:
        next(stream)
    pool.close()
    for stream in streams:
        with pytest.raises(InferenceFailed) as refused:
            stream.results()
        assert refused.value.code == "ServiceUnavailable"
    assert not caplog.records


@pytest.mark.slow
def test_stream_is_unchanged_by_loading_and_unloading_adapters(pool: ModelPool) -> None:
    alone = text_of(pool, NAMES[0], max_tokens=300)
    stream = pool.submit(NAMES[0], asked(max_tokens=300))
    first = next(stream)
    assert isinstance(first, TokenChunk)
    done = threading.Event()

    def churn() -> None:
        for _ in range(3):
            for name in SHARING[1:]:
                text_of(pool, name, max_tokens=2)
                pool.unload(name)
        done.set()

    with ThreadPoolExecutor(1) as threads:
        threads.submit(churn).result()
    assert done.is_set() and first.text + stream.results()[0].text == alone


@pytest.mark.parametrize("damage", ["altered", "cut", "gone", "another network's"])
def test_damaged_adapter_file_is_refused(
    damage: str, pool: ModelPool, home: Path, base: str
) -> None:
    """A damaged file is an error, concurrent requests continue, and a repaired file works."""
    stored = find(NAMES[0])
    file = stored.folder / ADAPTER
    whole, expected = file.read_bytes(), text_of(pool, NAMES[0])
    other = text_of(pool, NAMES[1])
    pool.unload(NAMES[0])
    record = stored.folder / MANIFEST
    written = record.read_text()
    try:
        if damage == "gone":
            file.unlink()
        elif damage == "cut":
            file.write_bytes(whole[: len(whole) // 2])
        elif damage == "altered":
            file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        else:
            tensors = {
                n.replace("layers.0", "layers.9"): t for n, t in read_adapter(stored.folder).items()
            }
            save_file(tensors, file, metadata={"format": "pt"})
            fields = json.loads(written)
            del fields["files"]
            record.write_text(json.dumps(fields))
        with pytest.raises(InferenceFailed) as failed:
            pool.submit(NAMES[0], asked())
        assert failed.value.code == "ModelError"
        assert failed.value.code == "ModelError"
        with pytest.raises(CorruptFile) as refused:
            Generator.open(find(NAMES[0]))
        assert refused.value.rule in {"file.changed", "file.missing", "weights.layers"}
        assert text_of(pool, NAMES[1]) == other
        assert NAMES[0] not in pool.loaded_ids()
    finally:
        file.write_bytes(whole)
        record.write_text(written)
    assert text_of(pool, NAMES[0]) == expected


def test_the_bare_base_has_no_layer_of_an_adapter(pool: ModelPool, base: str) -> None:
    text_of(pool, NAMES[0])
    network = pool._entries[base].model._opened.network.model
    assert not any(isinstance(each, LoraBatchLayer) for each in network.modules())
    assert not any("lora" in name for name, _ in network.named_parameters())


def test_unloaded_adapters_free_their_layers(pool: ModelPool, base: str) -> None:
    text_of(pool, base)
    shared = pool._entries[base].model._backend._batch
    for name in SHARING:
        text_of(pool, name)
        adapter = pool._entries[name].model._backend._adapter
        layers = [weakref.ref(layer) for layer in adapter.layers.values()]
        del adapter
        pool.unload(name)
        until = time.monotonic() + 5
        while any(each() is not None for each in layers) and time.monotonic() < until:
            gc.collect()  # its last sequence is freed behind the last piece
        assert not [each for each in layers if each() is not None], name
    assert not shared._stacks


def test_prompt_of_unloaded_adapter_is_not_cached(pool: ModelPool, base: str) -> None:
    text_of(pool, base)
    text_of(pool, NAMES[0])
    model, backend = pool._entries[NAMES[0]].model, pool._entries[base].model._backend
    reading, gone = threading.Event(), threading.Event()
    honest = backend.prefill

    def slow(states: Any) -> Any:
        reading.set()
        assert gone.wait(20)
        return honest(states)

    backend.prefill = slow
    stream = pool.submit(NAMES[0], asked("fox " * 70))
    assert reading.wait(20)
    stream.close()
    pool.unload(NAMES[0])
    gone.set()
    text_of(pool, base)
    assert not [key for key in pool._prefixes._roots if key[0] is model]


def test_cancelled_request_of_unloaded_adapter_leaves_base_answers_unchanged(
    pool: ModelPool, base: str
) -> None:
    text_of(pool, base)
    text_of(pool, NAMES[0])
    expected = [
        pool.submit(base, asked(f"{word} " * 90)).results()[0].text for word in ("fox", "dog")
    ]
    backend = pool._entries[base].model._backend
    pool._prefixes.forget(pool._entries[base].model)
    reading, gone = threading.Event(), threading.Event()
    honest = backend.prefill

    def slow(states: Any) -> Any:
        if len(pool._entries[base].model._reading) == 3:  # two prompts fill a prefill
            reading.set()
            assert gone.wait(20)
        return honest(states)

    wake = pool._entries[base].model._wake
    with wake:  # all are there before any is read
        backend.prefill = slow
        others = [pool.submit(base, asked(f"{word} " * 90)) for word in ("fox", "dog")]
        leaving = pool.submit(NAMES[0], asked())
    assert reading.wait(20)
    leaving.close()
    pool.unload(NAMES[0])
    gone.set()
    assert [each.results()[0].text for each in others] == expected


def test_failed_adapter_load_leaves_base_without_stacks(
    pool: ModelPool, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text_of(pool, base)

    def fail(*given: Any) -> None:
        raise RuntimeError("no tokens")

    monkeypatch.setattr(StoredModel, "shared_chat", fail)
    with pytest.raises(InferenceFailed):
        pool.submit(NAMES[0], asked())
    assert not pool._entries[base].model._backend._batch._stacks
