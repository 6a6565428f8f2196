"""Requests to a decoder and their results."""

from __future__ import annotations

import time
from typing import Any

from luthier.inference.decoder import Decoder
from luthier.inference.inference import Chat, GenerationRequest, GenerationResult, Stream
from luthier.inference.scheduler import working_for
from luthier.types import Message

MEMORY = 1 << 28


def asked(text: str, **fields: Any) -> GenerationRequest:
    fields = {"temperature": 0, "max_tokens": 24, **fields}
    return GenerationRequest(Chat((Message("user", text),)), **fields)


def answer(decoder: Decoder, request: GenerationRequest) -> GenerationResult:
    return decoder.submit(request).results()[0]


def submit(decoder: Decoder, client: str, request: GenerationRequest) -> Stream:
    with working_for(client):
        return decoder.submit(request)


def settled(decoder: Decoder) -> bool:
    """Return True if the decoder is idle and empty within a second."""
    until = time.monotonic() + 1
    while time.monotonic() < until:
        if decoder.idle and decoder.memory.reserved_bytes == decoder._answers.total() == 0:
            return not any(bank.spans for bank in decoder._backend._banks._banks.values())  # type: ignore[attr-defined]
        time.sleep(0.01)
    return False
