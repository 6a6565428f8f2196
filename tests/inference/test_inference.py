"""Invalid requests are rejected before a model runs."""

from __future__ import annotations

from functools import partial
from queue import SimpleQueue
from typing import Any

import pytest

from luthier.inference.inference import (
    FinishEvent,
    GenerationRequest,
    InferenceFailed,
    InferenceRefused,
    Stream,
    TokenChunk,
)

WRONG: list[dict[str, Any]] = [
    {"max_tokens": 0}, {"temperature": 2.1}, {"temperature": float("nan")}, {"top_p": -0.1},
    {"top_k": -1}, {"min_p": 2}, {"repetition_penalty": 0}, {"n": 0}, {"n": 129},
    {"frequency_penalty": 3}, {"presence_penalty": -3}, {"logit_bias": {1: 101}},
    {"top_logprobs": 21}, {"stop": ("",)}, {"logit_bias": dict.fromkeys(range(1025), 1.0)},
]  # fmt: skip


@pytest.mark.parametrize("fields", WRONG)
def test_invalid_request_values_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(InferenceRefused) as refused:
        GenerationRequest("x", **fields)
    assert refused.value.parameter == next(iter(fields))


def test_stream_end_callbacks_run_in_order() -> None:
    stream, done = Stream(SimpleQueue(), prompt_tokens=3, n=1), list[str]()
    for act in ("cancel", "release", "count"):
        stream.at_end(partial(done.append, act))
    stream.close()
    assert done == ["cancel", "release", "count"]


def test_results_of_closed_stream_fail_with_service_unavailable() -> None:
    events: SimpleQueue[Any] = SimpleQueue()
    stream = Stream(events, prompt_tokens=3, n=1)
    stream.close()  # as by a client that hung up while its request was submitted
    with pytest.raises(InferenceFailed) as failed:
        stream.results()
    assert failed.value.code == "ServiceUnavailable"


def test_wait_returns_at_first_chunk() -> None:
    events: SimpleQueue[Any] = SimpleQueue()
    stream = Stream(events, prompt_tokens=3, n=1)
    pieces = [TokenChunk(0, "a"), TokenChunk(0, "b"), FinishEvent(0, "stop", 2)]
    for piece in pieces:
        events.put(piece)
    stream.wait()
    stream.wait()
    assert [*stream] == pieces
    stream.wait()  # returns at once after the end


@pytest.mark.parametrize("closes", [False, True])
def test_wait_on_stream_without_first_chunk_fails(closes: bool) -> None:
    events: SimpleQueue[Any] = SimpleQueue()
    stream = Stream(events, prompt_tokens=3, n=1)
    if closes:
        stream.close()
        stream.wait()
    else:
        events.put(InferenceFailed.busy(3))
        with pytest.raises(InferenceFailed) as refused:
            stream.wait()
        assert refused.value.code == "Throttling"
    assert [*stream] == []


def test_interrupted_stream_fails_wait() -> None:
    stream = Stream(SimpleQueue(), prompt_tokens=3, n=1)
    stream.interrupt()
    with pytest.raises(InferenceFailed):
        stream.wait()
