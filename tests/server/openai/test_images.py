"""Images in chat completions and responses, by the unmodified client."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import openai
import pytest
from PIL import Image

from luthier.files import write_json
from luthier.library.folders import base_folder
from luthier.models.manifest import MANIFEST
from vision_chat import save_base


@pytest.fixture
def vision_base(luthier_home: Path) -> str:
    """Return a vision-language model in the store."""
    name = "tiny-vision"
    folder = base_folder(name)
    folder.mkdir(parents=True)
    save_base(folder)
    created = "2026-01-01T00:00:00+00:00"
    write_json(folder / MANIFEST, {"id": name, "kind": "causal_lm", "created": created})
    return name


def url_of(colour: str, kind: str = "PNG") -> str:
    """Return an image of one colour as a ``data:`` URL."""
    stream = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(stream, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(stream.getvalue()).decode()}"


def text_of(client: openai.OpenAI, *urls: str, model: str = "tiny-vision") -> str:
    images: Any = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    content = [*images, {"type": "text", "text": "What is it?"}]
    made = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": content}],
        max_tokens=12,
        temperature=0,
    )
    return str(made.choices[0].message.content)


@pytest.mark.slow
def test_images_of_a_conversation_change_the_reply(vision_base: str, client: openai.OpenAI) -> None:
    red, blue = (text_of(client, url_of(colour)) for colour in ("red", "blue"))
    assert red != blue
    # The second time, the prompt is in the prefix cache.
    assert text_of(client, url_of("red")) == red
    assert text_of(client, url_of("red", "GIF")) == red
    assert text_of(client, url_of("red"), url_of("blue")) not in (red, blue)
    parts: Any = [
        {"type": "input_image", "image_url": url_of("blue")},
        {"type": "input_text", "text": "What is it?"},
    ]
    made = client.responses.create(
        model="tiny-vision",
        input=[{"role": "user", "content": parts}],
        max_output_tokens=12,
        temperature=0,
    )
    assert made.output_text == blue


@pytest.mark.parametrize(
    "url", ["https://example.org/a.png", "data:image/png;base64,AAAA", "data:text/html;base64,AAAA"]
)
def test_invalid_image_url_is_rejected(vision_base: str, client: openai.OpenAI, url: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        text_of(client, url)
    assert refused.value.param == "messages[0].content[0].image_url"


def test_text_model_rejects_images(tiny_base: str, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        text_of(client, url_of("red"), model="tiny")
    assert refused.value.param == "messages"
