"""How soon a decoder writes, and how well it guesses, as it counts it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from decoding import MEMORY, answer, asked

from luthier.models.manifest import Manifest
from luthier.models.speculation import Speculation
from luthier.serving import latency
from luthier.serving.decoder import Decoder, RunningAnswer
from luthier.serving.inference import InferenceFailed
from luthier.serving.latency import BOUNDS, OTHER, AnswerLatency, LatencyHistogram, LatencyTable
from luthier.serving.memory import CacheBudget
from luthier.store.models import StoredModel, find

SAME = {"logit_bias": {7: 100.0}}
"""One token again and again: whoever guesses that is right."""


@pytest.fixture
def decoder(tiny_model_folder: Path, in_float32: None) -> Decoder:
    return Decoder.open(find(str(tiny_model_folder)), CacheBudget(MEMORY))


def test_a_histogram_counts_up_to_each_bound() -> None:
    made = LatencyHistogram()
    for seconds in (0.0, BOUNDS[0], BOUNDS[0] + 1e-9, BOUNDS[-1] + 1):
        made.observe(seconds)
    counts, total = made.read()
    assert counts == [2, 1, *[0] * (len(BOUNDS) - 2), 1]
    assert total == pytest.approx(2 * BOUNDS[0] + BOUNDS[-1] + 1)


def test_labels_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "MOST_LABELS", 3)
    table = LatencyTable(lambda stored: stored.id)
    models = [StoredModel(str(n), Path(str(n)), Manifest(id=str(n))) for n in range(6)]
    found = [table.of(each) for each in models]
    assert list(table.by_label()) == ["0", "1", "2", OTHER]
    assert found[3] is found[4] is found[5] is table.by_label()[OTHER]
    assert table.of(models[1]) is found[1]


def test_each_request_has_a_first_token_and_each_other_one_a_time(decoder: Decoder) -> None:
    began = time.perf_counter()
    answer(decoder, asked("Hi", max_tokens=5, **SAME))
    decoder.submit(asked("Hello", n=3, max_tokens=4, **SAME)).whole()
    whole = time.perf_counter() - began
    decoder.close()
    first, seconds = decoder.latency.first_token.read()
    assert sum(first) == 2 and 0 < seconds < whole
    between, more = decoder.latency.between_tokens.read()
    assert sum(between) == 4 + 3 * 3 and 0 < more < 3 * whole


def test_a_wait_for_a_turn_is_part_of_the_first_token(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = decoder.memory.take
    refused: list[float] = []

    def take(*each: Any) -> bool:
        if len(refused) < 3:
            refused.append(time.perf_counter())
            return False
        return taken(*each)

    monkeypatch.setattr(decoder.memory, "take", take)
    answer(decoder, asked("Hi", max_tokens=3, **SAME))
    decoder.close()
    assert decoder.latency.first_token.read()[1] > refused[-1] - refused[0] > 0
    assert sum(decoder.latency.between_tokens.read()[0]) == 2


def test_a_token_that_ends_an_answer_or_fails_is_not_measured(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = decoder.chat.stop_ids[0]
    answer(decoder, asked("Hi", logit_bias={stop: 100.0}))

    def fail(*_: Any) -> None:
        raise InferenceFailed("ModelError", "no score")

    monkeypatch.setattr(RunningAnswer, "_score", fail)
    with pytest.raises(InferenceFailed):
        answer(decoder, asked("Hi", **SAME))
    decoder.close()
    assert sum(decoder.latency.first_token.read()[0]) == 0


def test_guesses_are_counted_once_an_answer_has_ended(decoder: Decoder) -> None:
    assert decoder.speculation == Speculation()
    answer(decoder, asked("Hi", max_tokens=60, **SAME))
    decoder.close()
    found = decoder.speculation
    assert 20 < found.accepted < 60 and found.accepted <= found.proposed
    assert decoder.latency.speculation == found


def test_two_models_of_a_label_are_counted_together() -> None:
    one = AnswerLatency()
    for _ in range(2):
        one.add_speculation(Speculation(5, 3))
    assert one.speculation == Speculation(10, 6)
