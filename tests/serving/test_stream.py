"""Streams of answers that are closed while somebody reads them, or before."""

from __future__ import annotations

from queue import SimpleQueue
from typing import Any

import pytest

from luthier.serving.inference import InferenceFailed
from luthier.serving.stream import Stream


def test_whole_answers_of_a_stream_that_was_closed_before() -> None:
    events: SimpleQueue[Any] = SimpleQueue()
    stream = Stream(events, prompt_tokens=3, n=1)
    stream.close()  # as by a client that hung up while its request was submitted
    with pytest.raises(InferenceFailed, match="given up") as failed:
        stream.whole()
    assert failed.value.code == "ServiceUnavailable"
