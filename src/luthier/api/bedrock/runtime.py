"""The runtime of the Bedrock face: Converse, InvokeModel, their streams, and CountTokens."""

from __future__ import annotations

import base64
import binascii
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from luthier.api.bedrock import converse, invoke
from luthier.api.bedrock.bodies import json_object, malformed, native_object, parsed
from luthier.api.bedrock.conversations import Conversation
from luthier.api.bedrock.eventstream import CONTENT_TYPE, exception
from luthier.api.bedrock.invoke import ChatForm, EmbeddingBody, Form, Timed, form_of
from luthier.api.wire import Answer, Authorize, Call, Fault, Handler
from luthier.errors import UnknownModel
from luthier.serving.inference import InferenceFailed, InferenceRefused, Prompt, Request, Stream
from luthier.serving.pool import ModelPool

INVOKE, STREAM = "bedrock:InvokeModel", "bedrock:InvokeModelWithResponseStream"
COUNT = "bedrock:CountTokens"
_MID_STREAM = {
    "Throttling": "throttlingException",
    "ModelError": "modelStreamErrorException",
    "ModelTimeout": "modelTimeoutException",
    "ServiceUnavailable": "serviceUnavailableException",
    "Validation": "validationException",
}
"""Exceptions as events; everything else is ``internalServerException``."""

_log = logging.getLogger("luthier.api")


def runtime_handlers(
    pool: ModelPool,
    resolve: Callable[[str, str], str],
    authorize: Authorize,
    resource: Callable[[str], str] = lambda model_id: model_id,
    chat: ChatForm | None = None,
) -> Mapping[str, Handler]:
    """The handlers by the names of their operations; ``params`` of a call have ``modelId``.

    ``resolve(account, model_id)`` gives the stored id of the model that is called by ``model_id``;
    ``resource(model_id)`` the ARN that ``authorize(caller, action, resource)`` decides on, without
    looking whether it exists. ``chat`` reads bodies of OpenAI's chat completions.
    """
    runtime = _Runtime(pool, resolve, authorize, resource, chat)
    return {
        "Converse": runtime.converse,
        "ConverseStream": runtime.converse_stream,
        "InvokeModel": runtime.invoke,
        "InvokeModelWithResponseStream": runtime.invoke_stream,
        "CountTokens": runtime.count,
    }


@contextmanager
def faults() -> Iterator[None]:
    """What the engine refuses, as clients of AWS are told it."""
    try:
        yield
    except InferenceRefused as refused:
        raise Fault("Validation", str(refused), parameter=refused.parameter) from refused
    except UnknownModel as refused:
        raise Fault("ResourceNotFound", "The model is no longer there.") from refused
    except InferenceFailed as failed:
        raise Fault(failed.code, str(failed)) from failed


@dataclass(frozen=True)
class _Runtime:
    pool: ModelPool
    resolve: Callable[[str, str], str]
    authorize: Authorize
    resource: Callable[[str], str]
    chat: ChatForm | None

    def converse(self, call: Call) -> Answer:
        """The whole answer to a conversation."""
        timed, stored_id = _timed(), self._model(call, INVOKE)
        body = parsed(converse.ConverseBody, json_object(call))
        with faults():
            stream = self.pool.submit(stored_id, body.request())
            return Answer.of(converse.answer_of(body, stream, timed.latency))

    def converse_stream(self, call: Call) -> Answer:
        """The same as it is written."""
        timed, stored_id = _timed(), self._model(call, STREAM)
        body = parsed(converse.ConverseBody, json_object(call))
        stream = self._begin(stored_id, body.request)
        events = Events(converse.events_of(body, stream, timed.latency), stream)
        return Answer(200, events, {"Content-Type": CONTENT_TYPE})

    def invoke(self, call: Call) -> Answer:
        """The answer to a body in the model's own form."""
        timed, stored_id = _timed(), self._model(call, INVOKE)
        form = self._form(call)
        if isinstance(form, EmbeddingBody):
            value, read, written = *self._embedding(stored_id, form), 0
        else:
            with faults():
                stream = self.pool.submit(stored_id, form.request())
                value, written = form.answer(stream)
            read = stream.prompt_tokens
        headers = {
            "Content-Type": "application/json",
            "X-Amzn-Bedrock-Input-Token-Count": str(read),
            "X-Amzn-Bedrock-Output-Token-Count": str(written),
            "X-Amzn-Bedrock-Invocation-Latency": str(timed.latency()),
        }
        return Answer(200, json.dumps(value, ensure_ascii=False).encode(), headers)

    def invoke_stream(self, call: Call) -> Answer:
        """The same as it is written."""
        timed, stored_id = _timed(), self._model(call, STREAM)
        form = self._form(call)
        if isinstance(form, EmbeddingBody):
            raise Fault("Validation", "The model is not supported for streaming.")
        stream = self._begin(stored_id, form.request)
        headers = {
            "Content-Type": CONTENT_TYPE,
            "X-Amzn-Bedrock-Content-Type": "application/json",
        }
        return Answer(200, Events(invoke.framed(form, stream, timed), stream), headers)

    def count(self, call: Call) -> Answer:
        """How many tokens a request would be read as."""
        stored_id = self._model(call, COUNT)
        kind, value = _counted(json_object(call).get("input"))
        if kind == "converse":
            prompt: Prompt = parsed(Conversation, value, "input.converse").chat()
        else:
            inner = replace(call, body=_decoded(value.get("body")))
            form = form_of(call.params["modelId"], native_object(inner), self.chat)
            if isinstance(form, EmbeddingBody):
                _, tokens = self._embedding(stored_id, form)
                return Answer.of({"inputTokens": tokens})
            with faults():
                prompt = form.request().prompt
        with faults():
            return Answer.of({"inputTokens": self.pool.count(stored_id, prompt)})

    def _model(self, call: Call, action: str) -> str:
        """The stored id of the model that is called, where the caller may have it answer."""
        model_id = call.params["modelId"]
        self.authorize(call.caller, action, self.resource(model_id))
        return self.resolve(call.caller.account, model_id)

    def _begin(self, stored_id: str, build: Callable[[], Request]) -> Stream:
        with faults():
            return self.pool.submit(stored_id, build())

    def _form(self, call: Call) -> Form | EmbeddingBody:
        if call.headers.get("x-amzn-bedrock-guardrailidentifier"):
            raise Fault("Validation", "Guardrails are not supported by this server.")
        kind = call.headers.get("content-type", "").partition(";")[0].strip()
        if kind not in ("", "application/json"):
            raise Fault("Validation", f"The content type {kind} is not supported by the model.")
        return form_of(call.params["modelId"], native_object(call), self.chat)

    def _embedding(self, stored_id: str, form: EmbeddingBody) -> tuple[dict[str, Any], int]:
        with faults():
            (found,) = self.pool.embed(stored_id, [form.inputText])
        vector = list(found.vector)
        if form.dimensions is not None:
            if form.dimensions > len(vector):
                raise malformed(
                    f"#/dimensions: {form.dimensions} is more than the model's {len(vector)}"
                )
            vector = vector[: form.dimensions]
        if form.normalize or form.dimensions is not None:
            length = math.sqrt(sum(value * value for value in vector)) or 1.0
            vector = [value / length for value in vector]
        return {"embedding": vector, "inputTextTokenCount": found.tokens}, found.tokens


class Events:
    """Messages of an event stream as they come. Closing it ends the work behind it."""

    def __init__(self, frames: Iterator[bytes], stream: Stream) -> None:
        self._frames, self._stream = frames, stream
        self._ended = False

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        if self._ended:
            raise StopIteration
        try:
            return next(self._frames)
        except StopIteration:
            self._ended = True
            raise
        except InferenceFailed as failed:
            kind = _MID_STREAM.get(failed.code, "internalServerException")
            return self._fail(kind, str(failed))
        except Exception:
            _log.exception("a stream failed")
            return self._fail("internalServerException", "Something failed inside the service.")

    def interrupt(self) -> None:
        """Make an exception the next message, and the last: the service ends."""
        self._stream.interrupt()

    def close(self) -> None:
        """Let go of the answer, whether any of it was read or not."""
        self._ended = True
        self._stream.close()

    def _fail(self, kind: str, message: str) -> bytes:
        self.close()
        return exception(kind, message)


def _timed() -> Timed:
    return Timed(time.perf_counter, time.perf_counter())


def _counted(given: Any) -> tuple[str, dict[str, Any]]:
    """Which kind of request is to be counted, and its members."""
    if isinstance(given, dict):
        kinds = [kind for kind in ("converse", "invokeModel") if given.get(kind) is not None]
        if len(kinds) == 1 and isinstance(given[kinds[0]], dict):
            return kinds[0], given[kinds[0]]
    raise Fault(
        "Validation",
        "1 validation error detected: Value at 'input' failed to satisfy constraint: exactly one of "
        "converse and invokeModel is set",
    )


def _decoded(body: Any) -> bytes:
    """A body inside a body: base64."""
    try:
        return base64.b64decode(body, validate=True)
    except (TypeError, ValueError, binascii.Error):
        text = "1 validation error detected: Value at 'input.invokeModel.body' is not base64."
        raise Fault("Validation", text) from None
