"""Latencies and guessed tokens of a decoder."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from decoding import MEMORY, answer, asked

from luthier.inference import latency
from luthier.inference.decoder import Decoder
from luthier.inference.inference import InferenceFailed
from luthier.inference.latency import OTHER, LatencyTable, ModelMetrics
from luthier.inference.memory import CacheBudget
from luthier.inference.running_requests import RunningAnswer
from luthier.library.models import StoredModel, find
from luthier.models.decoding.speculation import Speculation
from luthier.models.manifest import Manifest

SAME = {"logit_bias": {7: 100.0}}
"""Forces the same token repeatedly, so that every guess is right."""


@pytest.fixture
def decoder(tiny_model_folder: Path, in_float32: None) -> Decoder:
    stored = find(str(tiny_model_folder))
    return Decoder.open(stored, CacheBudget(MEMORY), latency=LatencyTable().of(stored))


def value(metric: Any, name: str) -> float:
    """Return the sample of a Prometheus metric with the given suffix."""
    samples = [each for family in metric.collect() for each in family.samples]
    (found,) = [each.value for each in samples if each.name.endswith(name)]
    return float(found)


def of(decoder: Decoder) -> ModelMetrics:
    assert decoder.latency is not None
    return decoder.latency


def test_labels_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "MAX_LABELS", 3)
    table = LatencyTable(lambda stored: stored.id)
    models = [StoredModel(str(n), Path(str(n)), Manifest(id=str(n))) for n in range(6)]
    found = [table.of(each) for each in models]
    labels = {each.labels["model"] for family in table.collect() for each in family.samples}
    assert labels == {"0", "1", "2", OTHER}
    assert found[3] == found[4] == found[5] != found[2]
    assert table.of(models[1]) == found[1]
    for each in found[3:]:
        each.add_speculation(Speculation(5, 3))
    assert value(found[3].proposed, "_total") == 15 and value(found[3].accepted, "_total") == 9


def test_latency_has_a_first_token_and_intervals(decoder: Decoder) -> None:
    began = time.perf_counter()
    answer(decoder, asked("Hi", max_tokens=5, **SAME))
    decoder.submit(asked("Hello", n=3, max_tokens=4, **SAME)).results()
    whole = time.perf_counter() - began
    decoder.close()
    first, between = of(decoder).first_token, of(decoder).between_tokens
    assert value(first, "_count") == 2 and 0 < value(first, "_sum") < whole
    assert value(between, "_count") == 4 + 3 * 3 and 0 < value(between, "_sum") < 3 * whole


def test_first_token_latency_includes_queue_time(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    reserve = decoder.memory.reserve
    refused: list[float] = []

    def reserve_later(*each: Any) -> bool:
        if len(refused) < 3:
            refused.append(time.perf_counter())
            return False
        return reserve(*each)

    monkeypatch.setattr(decoder.memory, "reserve", reserve_later)
    answer(decoder, asked("Hi", max_tokens=3, **SAME))
    decoder.close()
    assert value(of(decoder).first_token, "_sum") > refused[-1] - refused[0] > 0
    assert value(of(decoder).between_tokens, "_count") == 2


def test_stop_tokens_and_failures_are_not_measured(
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
    assert value(of(decoder).first_token, "_count") == 0


def test_guesses_are_counted_once_an_answer_has_ended(decoder: Decoder) -> None:
    assert decoder.speculation == Speculation()
    answer(decoder, asked("Hi", max_tokens=60, **SAME))
    decoder.close()
    found = decoder.speculation
    assert 20 < found.accepted < 60 and found.accepted <= found.proposed
    assert value(of(decoder).proposed, "_total") == found.proposed
    assert value(of(decoder).accepted, "_total") == found.accepted
