"""InvokeModel and its stream: bodies in native forms, recognized by members.

{"prompt", …}                              Meta: raw text, without a chat template {"schemaVersion":
"messages-v1", …}        Amazon: like Converse {"messages", …}                            OpenAI:
chat completion {"inputText"}                              Titan: embedding {"taskType":
"TEXT_IMAGE", …}              Titan and Nova Canvas: images
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field

from luthier.inference.inference import (
    FinishEvent,
    GenerationRequest,
    GenerationResult,
    ImageRequest,
    InferenceRefused,
    Stream,
    TokenChunk,
)
from luthier.models.decoding.sampling import MOST_TOKENS
from luthier.server.bedrock.bodies import NativeBody, malformed_input, parse_native
from luthier.server.bedrock.converse import (
    TEMPERATURE,
    TOP_P,
    named_events,
    parse_chat,
    render_reply,
)
from luthier.server.bedrock.eventstream import event
from luthier.server.bedrock.shapes import operation_models, parse_body
from luthier.server.http.messages import PREDICTIONS, Fault
from luthier.server.sampling_fields import sampling_of, with_sampling

LENGTH = 512
"""Default of ``max_gen_len``, equal to Llama's on Bedrock."""


class NativeForm(Protocol):
    """A native form of text generation."""

    def request(self) -> GenerationRequest:
        """Return the request for the engine."""
        ...

    def response(self, stream: Stream) -> tuple[dict[str, Any], int]:
        """Return the complete response and the number of generated tokens."""
        ...

    def chunks(self, stream: Stream) -> Iterator[tuple[dict[str, Any], int]]:
        """Yield chunks of the response, each with the number of tokens generated so far, if known."""
        ...


ChatForm = Callable[[str, Mapping[str, Any]], NativeForm]
"""Parses a body of OpenAI's chat completions for a model id."""


@with_sampling
class PromptBody(NativeBody):
    """Meta's form of text generation."""

    prompt: Annotated[str, Field(min_length=1)]
    max_gen_len: Annotated[int, Field(ge=1, le=MOST_TOKENS)] = LENGTH
    temperature: Annotated[float, Field(ge=0, le=1)] = TEMPERATURE
    top_p: Annotated[float, Field(ge=0, le=1)] = TOP_P
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=2500)] = Field(
        default_factory=list
    )

    def request(self) -> GenerationRequest:
        """Return the request for the engine: the prompt without a chat template."""
        return GenerationRequest(
            self.prompt,
            max_tokens=self.max_gen_len,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
            stop=tuple(self.stop),
            **sampling_of(self),
        )

    def response(self, stream: Stream) -> tuple[dict[str, Any], int]:
        """Return the complete response."""
        (reply,) = stream.results()
        return _generation(reply.text, stream, reply.tokens, reply), reply.tokens

    def chunks(self, stream: Stream) -> Iterator[tuple[dict[str, Any], int]]:
        """Yield one chunk of ``generation`` per piece of text. The last chunk has reason and
        counts."""
        reply = GenerationResult()
        for each in stream:
            reply.add(each)
            if isinstance(each, TokenChunk) and each.text:
                yield _generation(each.text, stream, None, None), 0
            elif isinstance(each, FinishEvent):
                yield _generation("", stream, each.tokens, reply), each.tokens


def _generation(
    text: str, stream: Stream, tokens: int | None, reply: GenerationResult | None
) -> dict[str, Any]:
    return {
        "generation": text,
        "prompt_token_count": stream.prompt_tokens,
        "generation_token_count": tokens,
        "stop_reason": _stop_reason(reply) if reply else None,
    }


def _stop_reason(reply: GenerationResult) -> str:
    """Return the stop reason in Llama's form, which has two values."""
    return "length" if reply.reason in ("length", "context") else "stop"


class MessagesConfig(NativeBody):
    """Sampling settings of Amazon's form."""

    maxTokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None
    max_new_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None
    temperature: Annotated[float, Field(ge=0, le=1)] = TEMPERATURE
    topP: Annotated[float, Field(ge=0, le=1)] = TOP_P
    topK: Annotated[int, Field(ge=0, le=MOST_TOKENS)] = 0
    stopSequences: Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=2500)] = (
        Field(default_factory=list)
    )


class MessagesForm:
    """Amazon's form: a Converse request with different sampling members."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        """Parse ``body``; raises :class:`Fault` for invalid members."""
        if body.get("schemaVersion") != "messages-v1":
            raise malformed_input("#/schemaVersion: must be messages-v1")
        self._config = parse_native(MessagesConfig, body.get("inferenceConfig") or {})
        conversation = {name: body.get(name) for name in ("messages", "system", "toolConfig")}
        # The members of the conversation are those of Converse, so botocore's model of Converse
        # checks both.
        self._members = parse_body(operation_models()["Converse"], conversation)

    def request(self) -> GenerationRequest:
        """Return the request for the engine."""
        config = self._config
        return GenerationRequest(
            parse_chat(self._members),
            max_tokens=config.maxTokens or config.max_new_tokens,
            temperature=config.temperature,
            top_p=config.topP,
            top_k=config.topK,
            stop=tuple(config.stopSequences),
        )

    def response(self, stream: Stream) -> tuple[dict[str, Any], int]:
        """Return the response of Converse."""
        (reply,) = stream.results()
        return render_reply(stream, reply), reply.tokens

    def chunks(self, stream: Stream) -> Iterator[tuple[dict[str, Any], int]]:
        """Yield the events of ConverseStream by name."""
        for kind, value in named_events(stream):
            tokens = value["usage"]["outputTokens"] if kind == "metadata" else 0
            yield {kind: value}, tokens


class EmbeddingBody(NativeBody):
    """Titan's form of embeddings."""

    inputText: Annotated[str, Field(min_length=1)]
    dimensions: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None
    normalize: bool = True
    """Normalize a shortened vector to length 1; the whole vector has length 1."""
    embeddingTypes: list[Literal["float"]] | None = None


class TextToImage(NativeBody):
    """Content of the images."""

    text: Annotated[str, Field(max_length=1024)] = ""
    """Name of a class that the model knows. AWS requires a character; here a model without classes
    needs an empty text, and a model with classes generates each class in turn for an empty text."""
    negativeText: Annotated[str, Field(max_length=1024)] = ""
    """Negative prompt, for diffusion models trained on captions."""


class ImageConfig(NativeBody):
    """Settings of image generation."""

    numberOfImages: Annotated[int, Field(ge=1, le=5)] = 1
    height: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None
    width: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None
    seed: Annotated[int, Field(ge=0, le=2**31 - 2)] = 0
    """Random seed. As with AWS's models, repeated requests without a seed return equal images."""
    quality: Literal["standard"] = "standard"
    cfgScale: Annotated[float, Field(ge=1, le=100)] | None = None


class ImageBody(NativeBody):
    """The form of image generation that Titan and Nova Canvas share."""

    taskType: Literal["TEXT_IMAGE"]
    textToImageParams: TextToImage
    imageGenerationConfig: ImageConfig = Field(default_factory=ImageConfig)

    def request(self) -> ImageRequest:
        """Return the request for the engine."""
        config = self.imageGenerationConfig
        size = None
        if config.height is not None and config.width is not None:
            size = config.height, config.width
        elif config.height is not None or config.width is not None:
            raise malformed_input("#/imageGenerationConfig: send both height and width")
        return ImageRequest(
            config.numberOfImages,
            self.textToImageParams.text,
            config.seed,
            size,
            guidance_scale=config.cfgScale,
            negative_prompt=self.textToImageParams.negativeText,
        )

    @staticmethod
    def response(files: Sequence[bytes]) -> dict[str, Any]:
        """Return the response: PNG files in base64."""
        return {"images": [base64.b64encode(file).decode() for file in files], "error": None}

    @staticmethod
    def to_fault(refused: InferenceRefused) -> Fault:
        """Return the engine's rejection as a fault that names the member."""
        place = _IMAGE_MEMBERS.get(refused.parameter or "")
        if place is None:
            return Fault("Validation", str(refused), parameter=refused.parameter)
        text = str(refused)
        return malformed_input(f"#/{place}: {text[:1].lower()}{text[1:]}")


_IMAGE_MEMBERS = {
    "label": "textToImageParams/text",
    "count": "imageGenerationConfig/numberOfImages",
    "size": "imageGenerationConfig",
    "seed": "imageGenerationConfig/seed",
    "guidance_scale": "imageGenerationConfig/cfgScale",
    "negative_prompt": "textToImageParams/negativeText",
}


def parse_form(
    model_id: str, body: Mapping[str, Any], chat: ChatForm | None
) -> NativeForm | EmbeddingBody | ImageBody:
    """Return ``body``, parsed in the native form of the body.

    Raises:
        Fault: Validation for an unknown form or invalid members.
    """
    # The body decides the form, and not the model: AWS names one form for each vendor, and here one
    # model serves clients of all vendors.
    if "taskType" in body:
        return parse_native(ImageBody, body)
    if "inputText" in body:
        return parse_native(EmbeddingBody, body)
    if "prompt" in body:
        return parse_native(PromptBody, body)
    if "schemaVersion" in body:
        return MessagesForm(body)
    if "messages" in body and chat is not None:
        try:
            return chat(model_id, body)
        except Fault as fault:
            raise malformed_input(fault.message) from fault
    if "inputImage" in body:
        raise malformed_input(f"[inputImage] is not supported. Use {PREDICTIONS} to embed images")
    raise malformed_input("required key [prompt], [messages], [inputText] or [taskType] not found")


@dataclass
class LatencyTimer:
    """Latency of a reply, measured from the creation of the timer."""

    began: float = field(default_factory=time.perf_counter)
    first_byte: int | None = None
    """Milliseconds until the first chunk."""

    def latency(self) -> int:
        """Return the milliseconds since the start."""
        return round((time.perf_counter() - self.began) * 1000)


def frame_chunks(form: NativeForm, stream: Stream, timer: LatencyTimer) -> Iterator[bytes]:
    """Yield the encoded chunks of a stream. The last chunk has the metrics, so each chunk waits for
    the next."""
    previous: dict[str, Any] | None = None
    output_tokens = 0
    for value, tokens in form.chunks(stream):
        # Chunks before the last have no count.
        output_tokens = max(output_tokens, tokens)
        if timer.first_byte is None:
            timer.first_byte = timer.latency()
        if previous is not None:
            yield _chunk(previous)
        previous = value
    latency = timer.latency()
    metrics = {
        "inputTokenCount": stream.prompt_tokens,
        "outputTokenCount": output_tokens,
        "invocationLatency": latency,
        "firstByteLatency": latency if timer.first_byte is None else timer.first_byte,
    }
    yield _chunk({**(previous or {}), "amazon-bedrock-invocationMetrics": metrics})


def _chunk(value: Mapping[str, Any]) -> bytes:
    raw = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    return event("chunk", {"bytes": base64.b64encode(raw).decode()})
