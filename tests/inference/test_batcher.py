"""Dynamic batching: equal predictions, no waiting for large requests, isolated failures."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from luthier.engine import machine as machines
from luthier.engine.train import train
from luthier.inference.inference import InferenceFailed, InferenceRefused
from luthier.inference.pool import ModelPool
from luthier.inference.scheduler import working_for
from luthier.limits import ModelLimits
from luthier.processes import cancelled_by
from luthier.recipe import Recipe

WORDS = ("fox", "dog", "card", "capital", "question", "answer")
TEXTS = [" ".join([word] * count) for word in WORDS for count in (1, 4, 9, 2)]
LABELLED = [{"text": text, "label": f"class {n % 3}"} for n, text in enumerate(TEXTS)]
RATED = [{"text": text, "rating": n} for n, text in enumerate(TEXTS)]
TAGGED = [{"tokens": text.split(), "tags": ["B-x"] * len(text.split())} for text in TEXTS]
MODELS: dict[str, tuple[list[dict[str, Any]], str]] = {
    "classes": (LABELLED, "classification"),
    "ratings": (RATED, "regression"),
    "tags": (TAGGED, "token_classification"),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, family_folder: Callable[[str], Path]) -> Path:
    """Return a store with a model of each kind."""
    home = tmp_path_factory.mktemp("reading")
    machine = machines.Machine(torch.device("cpu"), torch.float32, 1, "a test")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LUTHIER_HOME", str(home))
        patch.setattr(machines, "choose_machine", lambda *arguments: machine)
        for name, (rows, method) in MODELS.items():
            file = home / f"{name}.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
            fields: dict[str, Any] = {
                "base": str(family_folder("bert")), "name": name, "data": {"train": str(file)},
                "objective": {"method": method}, "adaptation": {"method": "full"},
                "training": {"max_steps": 2, "precision": "float32", "threads": 1},
            }  # fmt: skip
            train(Recipe.parse(fields))
    return home


@pytest.fixture
def pool(home: Path, monkeypatch: pytest.MonkeyPatch, in_float32: None) -> Iterator[ModelPool]:
    monkeypatch.setenv("LUTHIER_HOME", str(home))
    made = ModelPool(1 << 30, 1 << 26, limits=ModelLimits(waiting_requests=12))
    yield made
    made.close()


class Passes:
    """Records the rows of each pass; the first pass waits for :attr:`go_on`."""

    def __init__(self, pool: ModelPool, model: str, patch: pytest.MonkeyPatch) -> None:
        pool.predict(model, ["fox"])
        self.model: Any = pool._entries[model].model
        self.rows: list[list[Any]] = []
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.honest = self.model._predictor.read
        patch.setattr(self.model._predictor, "read", self.read)

    def read(self, rows: Any, **settings: Any) -> Any:
        self.rows.append(list(rows))
        if not self.begun.is_set():
            self.begun.set()
            assert self.go_on.wait(20)
        return self.honest(rows, **settings)

    @property
    def waiting(self) -> int:
        return len([*self.model._batcher._waiting])

    def wait_for(self, count: int) -> None:
        until = time.monotonic() + 20
        while self.waiting < count and time.monotonic() < until:
            time.sleep(0.005)
        assert self.waiting == count


def ask_for(pool: ModelPool, client: str, model: str, count: int = 1) -> Any:
    with working_for(client):
        return pool.predict(model, ["fox"] * count)


def name_of(model: str) -> str:
    return f"bert:{model}"


def check_close(found: Any, expected: Any) -> None:
    """Compare predictions up to rounding."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            check_close(found[key], value)
    elif isinstance(expected, list):
        for each, value in zip(found, expected, strict=True):
            check_close(each, value)
    else:
        assert found == (
            pytest.approx(expected, rel=1e-4) if isinstance(expected, float) else expected
        )


@pytest.mark.parametrize("model", MODELS)
def test_concurrent_predictions_share_a_pass_and_match_single_rows(
    pool: ModelPool, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = name_of(model)
    asked = [*TEXTS[:9], " ".join(TEXTS[:7])]
    alone = [pool.predict(model, [text])[0] for text in asked]
    passes = Passes(pool, model, monkeypatch)
    passes.model._batcher._size = 512
    with ThreadPoolExecutor(len(asked)) as clients:
        answers = [clients.submit(pool.predict, model, [asked[0]])]
        assert passes.begun.wait(20)
        answers += [clients.submit(pool.predict, model, [text]) for text in asked[1:]]
        passes.wait_for(len(asked))
        passes.go_on.set()
        for answer, expected in zip(answers, alone, strict=True):
            check_close(answer.result(20)[0], expected)
    assert [len(rows) for rows in passes.rows] == [1, len(asked) - 1]
    assert passes.waiting == 0 and pool.memory.reserved_bytes == 0


@pytest.mark.slow
def test_single_row_is_served_between_many_rows(
    pool: ModelPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = name_of("classes")
    passes = Passes(pool, model, monkeypatch)
    passes.model._batcher._size = passes.model._batcher._most = 32
    with ThreadPoolExecutor(2) as clients:
        many = clients.submit(pool.predict, model, ["fox dog card"] * 60)
        assert passes.begun.wait(20)
        one: Future[Any] = clients.submit(pool.predict, model, ["fox"])
        passes.wait_for(2)
        passes.go_on.set()
        one.result(20)
        assert len(many.result(20)) == 60
    # Threads can receive answers late; the pass of the single row is fixed.
    assert [len({len(row) for row in rows}) for rows in passes.rows[:4]] == [1, 2, 1, 1]
    assert max(sum(len(row) for row in rows) for rows in passes.rows) <= 32


def test_unreadable_row_leaves_remaining_requests_running(
    pool: ModelPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = name_of("classes")
    alone = pool.predict(model, ["dog"])
    passes = Passes(pool, model, monkeypatch)
    length = len(passes.model._encode_text("card card card card", 0))
    honest = passes.honest

    def read(rows: Any, **settings: Any) -> Any:
        if any(len(row) == length for row in rows):
            raise RuntimeError("this row")
        return honest(rows, **settings)

    passes.honest = read
    with ThreadPoolExecutor(3) as clients:
        first = clients.submit(pool.predict, model, ["fox"])
        assert passes.begun.wait(20)
        wrong = clients.submit(pool.predict, model, ["fox", "card card card card"])
        other = clients.submit(pool.predict, model, ["dog"])
        passes.wait_for(3)
        passes.go_on.set()
        assert first.result(20) and other.result(20) == alone
        with pytest.raises(RuntimeError):
            wrong.result(20)
    assert passes.waiting == 0 and pool.memory.reserved_bytes == 0


@pytest.mark.slow
def test_rows_of_cancelled_request_are_skipped(
    pool: ModelPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = name_of("classes")
    passes = Passes(pool, model, monkeypatch)
    works: list[Any] = []

    def leave() -> None:
        with cancelled_by(works.append):
            pool.predict(model, ["card"] * 5)

    with ThreadPoolExecutor(3) as clients:
        first = clients.submit(pool.predict, model, ["fox"])
        assert passes.begun.wait(20)
        gone = clients.submit(leave)
        stays = clients.submit(pool.predict, model, ["dog"])
        passes.wait_for(3)
        works[0].close()
        passes.go_on.set()
        assert first.result(20) and stays.result(20)
        with pytest.raises(InferenceFailed, match="unloaded"):
            gone.result(20)
    assert sum(map(len, passes.rows)) == 2 and passes.waiting == 0


def test_full_queue_is_throttled_per_client(
    pool: ModelPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = name_of("classes")
    passes = Passes(pool, model, monkeypatch)
    with ThreadPoolExecutor(14) as clients:
        running = [clients.submit(pool.predict, model, ["fox"]) for _ in range(12)]
        passes.wait_for(12)
        with pytest.raises(InferenceFailed) as busy:
            pool.predict(model, ["fox"])
        assert busy.value.code == "Throttling"
        other = clients.submit(ask_for, pool, "somebody else", model)
        passes.go_on.set()
        assert all(each.result(20) for each in [*running, other])


def test_passes_reserve_memory_from_the_cache_budget(
    pool: ModelPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = name_of("classes")
    passes = Passes(pool, model, monkeypatch)
    total = pool.memory.total
    with ThreadPoolExecutor(1) as clients:
        first = clients.submit(pool.predict, model, ["fox"])
        assert passes.begun.wait(20)
        assert pool.memory.reserved_bytes == sum(len(row) for row in passes.rows[0]) * (
            passes.model._batcher._row_bytes
        )
        passes.go_on.set()
        assert first.result(20)
        # Another client reserves all memory for a while.
        assert pool.memory.reserve("others", total)
        waits = clients.submit(pool.predict, model, ["dog"])
        time.sleep(0.15)
        assert not waits.done()
        pool.memory.release("others", total)
        assert waits.result(20)
    pool.memory.total = 10
    with pytest.raises(InferenceRefused):
        pool.predict(model, ["fox"])
    pool.memory.total = total


@pytest.mark.usefixtures("pool")
def test_deterministic_batcher_encodes_single_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    made = ModelPool(1 << 30, cache=1 << 28, deterministic=True)
    model = name_of("classes")
    alone = [made.predict(model, [text])[0] for text in TEXTS[:6]]
    passes = Passes(made, model, monkeypatch)
    passes.go_on.set()
    with ThreadPoolExecutor(3) as clients:
        answers = [clients.submit(made.predict, model, TEXTS[at : at + 2]) for at in (0, 2, 4)]
        assert [row for answer in answers for row in answer.result(20)] == alone
    made.close()
    assert [len(rows) for rows in passes.rows] == [1] * 6
