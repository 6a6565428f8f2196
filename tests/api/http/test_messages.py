"""What is wrong with a large body costs no more than what is wrong with a small one."""

from __future__ import annotations

import gc
import time
import tracemalloc
from typing import Any

import pytest

from luthier.api.bedrock.shapes import body_members, operation_models
from luthier.api.http.messages import Fault
from luthier.api.openai.chat import ChatRequest
from luthier.api.openai.completions import CompletionRequest
from luthier.api.openai.embeddings import EmbeddingRequest
from luthier.api.openai.protocol import validate
from luthier.api.openai.responses import ResponseRequest
from luthier.serving.inference import TURNS

SAID = {"role": "user", "content": "a"}
BODIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "numbers": (EmbeddingRequest, {"input": [1.5] * 300_000}),
    "lists of numbers": (CompletionRequest, {"prompt": [[1.5]] * 300_000}),
    "no messages": (ChatRequest, {"messages": [1] * 300_000}),
    "no parts": (ChatRequest, {"messages": [{"role": "user", "content": [1] * 300_000}]}),
    "too many messages": (ChatRequest, {"messages": [SAID] * 300_000}),
    "too many items": (ResponseRequest, {"input": [SAID] * 300_000}),
    "no biases": (ChatRequest, {"messages": [SAID], "logit_bias": {str(n): "" for n in range(9**6)}}),
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
def test_a_body_is_refused_at_its_first_wrong_item(name: str) -> None:
    kind, given = BODIES[name]
    gc.disable()  # a pass over what earlier tests have left takes longer than all of this
    tracemalloc.start()
    try:
        began = time.thread_time()
        with pytest.raises(Fault) as caught:
            validate({"model": "tiny", **given}, kind)
        assert time.thread_time() - began < 1
        assert tracemalloc.get_traced_memory()[1] < 20 << 20
    finally:
        tracemalloc.stop()
        gc.enable()
    assert caught.value.code == "Validation" and len(str(caught.value)) < 500


def test_conversations_of_many_messages_are_taken() -> None:
    validate({"model": "tiny", "messages": [SAID] * TURNS}, ChatRequest)


def test_bedrock_tells_of_the_first_one() -> None:
    blocks = [{"role": "user", "content": [{"text": "a"}] * 300_000}]
    few = {"role": "user", "content": [{"toolUse": {"toolUseId": ""}}] * TURNS}
    for messages, text in (
        ([1] * 300_000, r"^1 validation error detected: Value .* at 'messages' failed .* 10000"),
        (
            blocks,
            r"^1 validation error detected: Value .* at 'messages\.1\.member\.content' failed",
        ),
        ([1] * TURNS, r"'messages\.1\.member' has to be an object"),
        ([few] * 30, r"^50 validation errors detected"),
    ):
        with pytest.raises(Fault, match=text) as caught:
            body_members(operation_models()["Converse"], {"messages": messages})
        assert len(str(caught.value)) < 15_000
