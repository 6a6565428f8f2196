"""The runtime of the Bedrock API: Converse, InvokeModel, the streams of both, and CountTokens."""

from __future__ import annotations

import base64
import binascii
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from luthier.inference.inference import (
    GenerationRequest,
    InferenceFailed,
    InferenceRefused,
    Prompt,
    Stream,
)
from luthier.inference.pool import ModelPool
from luthier.server.actions import record_action
from luthier.server.bedrock import converse, invoke
from luthier.server.bedrock.bodies import json_object, native_object
from luthier.server.bedrock.eventstream import CONTENT_TYPE, exception
from luthier.server.bedrock.invoke import (
    ChatForm,
    EmbeddingBody,
    ImageBody,
    LatencyTimer,
    NativeForm,
    parse_form,
)
from luthier.server.bedrock.shapes import operation_models, parse_body
from luthier.server.http.messages import Fault, Request, Response, inference_faults
from luthier.server.http.routes import Handler
from luthier.server.http.streams import GeneratedPieces
from luthier.server.routing import report_failure

INVOKE, STREAM = "bedrock:InvokeModel", "bedrock:InvokeModelWithResponseStream"
COUNT = "bedrock:CountTokens"
_MID_STREAM = {
    "Throttling": "throttlingException",
    "ModelError": "modelStreamErrorException",
    "ModelTimeout": "modelTimeoutException",
    "ServiceUnavailable": "serviceUnavailableException",
    "Validation": "validationException",
}
"""Event types of exceptions by error code. The default is ``internalServerException``."""
_MID_CONVERSE = {**_MID_STREAM, "ModelTimeout": "modelStreamErrorException"}
"""Event types for ConverseStream, which has no timeout exception: clients could not parse one."""

_log = logging.getLogger("luthier.server")


def runtime_handlers(
    pool: ModelPool,
    resolve: Callable[[str, str], str],
    resource: Callable[[str, str], str] = lambda account, model_id: model_id,
    chat: ChatForm | None = None,
) -> Mapping[str, Handler]:
    """Return the handlers by operation name. ``params`` of a request have ``modelId``.

    Args:
        pool: the inference pool.
        resolve: returns the stored id for an account and a model id.
        resource: returns the ARN for the audit log, for an account and a model id.
        chat: parses bodies of OpenAI's chat completions.
    """
    runtime = _Runtime(pool, resolve, resource, chat)
    return {
        "Converse": runtime.converse,
        "ConverseStream": runtime.converse_stream,
        "InvokeModel": runtime.invoke,
        "InvokeModelWithResponseStream": runtime.invoke_stream,
        "CountTokens": runtime.count,
    }


@dataclass(frozen=True)
class _Runtime:
    pool: ModelPool
    resolve: Callable[[str, str], str]
    resource: Callable[[str, str], str]
    chat: ChatForm | None

    def converse(self, request: Request) -> Response:
        """Return the complete reply to a conversation."""
        timer, stored_id = LatencyTimer(), self._model(request, INVOKE)
        members = parse_body(operation_models()["Converse"], json_object(request))
        with inference_faults():
            stream = self.pool.submit(stored_id, converse.generation_request(members))
            (reply,) = stream.results()
        metrics = {"metrics": {"latencyMs": timer.latency()}}
        paths = members.get("additionalModelResponseFieldPaths", ())
        return Response.json(converse.render_reply(stream, reply, paths) | metrics)

    def converse_stream(self, request: Request) -> Response:
        """Stream the reply to a conversation."""
        timer, stored_id = LatencyTimer(), self._model(request, STREAM)
        members = parse_body(operation_models()["ConverseStream"], json_object(request))
        stream = self._begin(stored_id, partial(converse.generation_request, members))
        paths = members.get("additionalModelResponseFieldPaths", ())
        events = converse.encode_events(stream, timer.latency, paths)
        events = _with_failure(events, _MID_CONVERSE)
        pieces = GeneratedPieces(events, [stream])
        return Response(200, pieces, {"Content-Type": CONTENT_TYPE})

    def invoke(self, request: Request) -> Response:
        """Return the complete reply to a body in a native form."""
        timer, stored_id = LatencyTimer(), self._model(request, INVOKE)
        form = self._form(request)
        if isinstance(form, EmbeddingBody):
            value, input_tokens, output_tokens = *self._embed(stored_id, form), 0
        elif isinstance(form, ImageBody):
            value, input_tokens, output_tokens = (
                self._sample(stored_id, form, request.params["modelId"]),
                0,
                form.request().count,
            )
        else:
            with inference_faults():
                stream = self.pool.submit(stored_id, form.request())
                value, output_tokens = form.response(stream)
            input_tokens = stream.prompt_tokens
        headers = {
            "Content-Type": "application/json",
            "X-Amzn-Bedrock-Input-Token-Count": str(input_tokens),
            "X-Amzn-Bedrock-Output-Token-Count": str(output_tokens),
            "X-Amzn-Bedrock-Invocation-Latency": str(timer.latency()),
        }
        return Response(200, json.dumps(value, ensure_ascii=False).encode(), headers)

    def invoke_stream(self, request: Request) -> Response:
        """Stream the reply to a body in a native form."""
        timer, stored_id = LatencyTimer(), self._model(request, STREAM)
        form = self._form(request)
        if isinstance(form, EmbeddingBody | ImageBody):
            raise Fault("Validation", "The model is not supported for streaming.")
        stream = self._begin(stored_id, form.request)
        headers = {
            "Content-Type": CONTENT_TYPE,
            "X-Amzn-Bedrock-Content-Type": "application/json",
        }
        chunks = _with_failure(invoke.frame_chunks(form, stream, timer))
        return Response(200, GeneratedPieces(chunks, [stream]), headers)

    def count(self, request: Request) -> Response:
        """Return the number of input tokens of a request."""
        stored_id = self._model(request, COUNT)
        members = parse_body(operation_models()["CountTokens"], json_object(request))
        ((kind, value),) = members["input"].items()
        if kind == "converse":
            prompt: Prompt = converse.parse_chat(value)
        else:
            inner = replace(request, body=_decode_body(value["body"]))
            form = parse_form(request.params["modelId"], native_object(inner), self.chat)
            if isinstance(form, EmbeddingBody):
                _, tokens = self._embed(stored_id, form)
                return Response.json({"inputTokens": tokens})
            if isinstance(form, ImageBody):
                raise Fault("Validation", "The model is not supported for counting tokens.")
            with inference_faults():
                prompt = form.request().prompt
        with inference_faults():
            return Response.json({"inputTokens": self.pool.count(stored_id, prompt)})

    def _model(self, request: Request, action: str) -> str:
        """Return the stored id of the requested model and record the action in the audit log."""
        model_id = request.params["modelId"]
        record_action(action, self.resource(request.caller.account, model_id))
        return self.resolve(request.caller.account, model_id)

    def _begin(self, stored_id: str, build: Callable[[], GenerationRequest]) -> Stream:
        with inference_faults():
            return self.pool.submit(stored_id, build())

    def _form(self, request: Request) -> NativeForm | EmbeddingBody | ImageBody:
        if request.headers.get("x-amzn-bedrock-guardrailidentifier"):
            raise Fault("Validation", "Guardrails are not supported by this server.")
        kind = request.headers.get("content-type", "").partition(";")[0].strip()
        if kind not in ("", "application/json"):
            raise Fault("Validation", f"The content type {kind} is not supported by the model.")
        return parse_form(request.params["modelId"], native_object(request), self.chat)

    def _embed(self, stored_id: str, form: EmbeddingBody) -> tuple[dict[str, Any], int]:
        with inference_faults():
            (embedding,) = self.pool.embed(stored_id, [form.inputText])
            vector = embedding.shortened(form.dimensions, form.normalize).tolist()
        return {"embedding": vector, "inputTextTokenCount": embedding.tokens}, embedding.tokens

    def _sample(self, stored_id: str, form: ImageBody, model: str) -> dict[str, Any]:
        from luthier.media.image_grid import encode_png

        with inference_faults():
            try:
                sampled = self.pool.sample(stored_id, form.request())
            except InferenceRefused as refused:
                raise form.to_fault(refused) from refused
        return form.response([encode_png(each.pixels, model) for each in sampled.images])


def _with_failure(
    frames: Iterator[bytes], kinds: Mapping[str, str] = _MID_STREAM
) -> Iterator[bytes]:
    """Yield the frames of an event stream. After a failure the last frame is an exception."""
    try:
        yield from frames
    except InferenceFailed as failed:
        report_failure()
        yield exception(kinds.get(failed.code, "internalServerException"), str(failed))
    except Exception:
        report_failure()
        _log.exception("the stream failed")
        yield exception("internalServerException", "Something failed inside the service.")


def _decode_body(body: Any) -> bytes:
    """Decode the base64 of a nested body."""
    try:
        return base64.b64decode(body, validate=True)
    except (TypeError, ValueError, binascii.Error):
        text = "1 validation error detected: Value at 'input.invokeModel.body' is not base64."
        raise Fault("Validation", text) from None
