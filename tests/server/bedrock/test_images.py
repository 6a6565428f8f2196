"""Image blocks of Converse, called with boto3."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
import runtime_service as serving
from botocore.exceptions import ClientError
from PIL import Image
from runtime_service import client_of, said, serve, streamed, text_of

from luthier.inference.pool import ModelPool
from vision_chat import save_base

runtime_pool = serving.runtime_pool


@pytest.fixture(scope="module")
def client(runtime_pool: ModelPool, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Return a client of a server with a vision-language model."""
    folder = save_base(tmp_path_factory.mktemp("vision"))
    for _, url in serve(runtime_pool, str(folder)):
        with closing(client_of(url)) as made:
            yield made


def asked(colour: str, kind: str = "png", **source: Any) -> dict[str, Any]:
    """Return a request with an image of one colour."""
    stream = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(stream, kind, lossless=True, quality=100)
    image = {"format": kind, "source": source or {"bytes": stream.getvalue()}}
    content = [{"image": image}, {"text": "What is it?"}]
    return {**said(), "messages": [{"role": "user", "content": content}]}


@pytest.mark.slow
def test_images_of_every_format_change_the_reply(client: Any) -> None:
    red, blue = (text_of(client.converse(**asked(colour))) for colour in ("red", "blue"))
    assert red != blue
    for kind in ("gif", "webp"):
        assert text_of(client.converse(**asked("red", kind))) == red
    assert client.converse(**asked("red", "jpeg"))["usage"]["inputTokens"] > 20
    events = streamed(client, **asked("red"))
    deltas = [each["contentBlockDelta"] for each in events if "contentBlockDelta" in each]
    assert "".join(each["delta"]["text"] for each in deltas) == red


def test_s3_and_invalid_image_sources_are_rejected(client: Any) -> None:
    for source in ({"s3Location": {"uri": "s3://data/a.png"}}, {"bytes": b"no image"}):
        with pytest.raises(ClientError) as refused:
            client.converse(**asked("red", **source))
        assert refused.value.response["Error"]["Code"] == "ValidationException"
