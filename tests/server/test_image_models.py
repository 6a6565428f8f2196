"""Models of images through each API with real clients."""

from __future__ import annotations

import base64
import io
import json
import struct
import time
import urllib.request
import wave
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import boto3
import numpy as np
import openai
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError
from PIL import Image
from served import served

from luthier.cli.model import load
from luthier.engine.train import train
from luthier.limits import ServerLimits
from luthier.recipe import Recipe
from luthier.server.service import Service
from luthier.server.settings import Settings
from luthier.server.stores.bootstrap import IssuedKeys
from luthier.server.tables.custom_models import ACTIVE, CustomModel
from luthier.server.tables.database import new_id, now
from luthier.server.tables.endpoints import DEPLOYMENT, READY, Endpoint
from luthier.server.tables.usage import report

ACCOUNT = "000000000000"
HEIGHT, WIDTH = 9, 7
CLASSES = ("cat", "dog")


@dataclass
class Server:
    """A service in this process and clients of the root user."""

    service: Service
    url: str
    keys: IssuedKeys
    stored: dict[str, str]
    """Ids in the store, by the names of models."""
    deployed: dict[str, str]
    """ARNs of deployments, by the names of models."""
    images: np.ndarray[Any, Any]
    """Images of 32 x 32 pixels, as in the classifier's training."""

    @cached_property
    def openai(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.keys.api_key, max_retries=0)

    @cached_property
    def runtime(self) -> Any:
        return boto3.client(
            "bedrock-runtime", endpoint_url=self.url, region_name="us-east-1",
            aws_access_key_id=self.keys.access_key, aws_secret_access_key=self.keys.secret,
            config=Config(retries={"total_max_attempts": 1}),
        )  # fmt: skip

    def close(self) -> None:
        self.openai.close()
        self.runtime.close()

    def invoke(self, model: str, **body: Any) -> Any:
        answer = self.runtime.invoke_model(modelId=self.deployed[model], body=json.dumps(body))
        return json.loads(answer["body"].read()), answer["ResponseMetadata"]["HTTPHeaders"]

    def post(
        self, path: str, body: Any, kind: str = "application/json", accept: str = "*/*"
    ) -> tuple[int, Any]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/api/v1/models/{path}", data, method="POST")
        for name, value in (
            ("Authorization", f"Bearer {self.keys.api_key}"),
            ("Content-Type", kind),
            ("Accept", accept),
        ):
            request.add_header(name, value)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                raw = answer.read()
                json_ = "json" in answer.headers["content-type"]
                return answer.status, json.loads(raw) if json_ else raw
        except HTTPError as error:
            return error.code, json.loads(error.read())["error"]

    def tokens(self, model: str) -> tuple[int, ...]:
        """Return today's usage of a model: input and output tokens."""
        last: tuple[int, ...] | None = None
        # The server counts a request after sending the response.
        while (found := self._tokens(model)) != last:
            last = found
            time.sleep(0.4)
        return found

    def _tokens(self, model: str) -> tuple[int, ...]:
        self.service.meter.write()
        with self.service.database.read() as session:
            rows = report(session, now().date(), now().date(), ACCOUNT)
        counted = [row for row in rows if row["model"] == model]
        kinds = ("prompt_tokens", "generated_tokens")
        return tuple(sum(row[kind] for row in counted) for kind in kinds)


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory,
    family_folder: Callable[[str], Path],
    tiny_model_folder: Path,
) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    large_N = random.integers(0, 256, (16, 32, 32), dtype=np.uint8)
    labels = np.array(CLASSES)[np.arange(16) % 2]
    small_N = random.integers(0, 256, (16, HEIGHT, WIDTH), dtype=np.uint8)
    np.savez(home / "large.npz", images=large_N, labels=labels)
    np.savez(home / "small.npz", images=small_N, labels=labels)
    sources = {
        "vae": ("small.npz", str(family_folder("vae")), {"method": "vae"}),
        "gan": ("small.npz", str(family_folder("dcgan")), {"method": "gan"}),
        "unet": ("small.npz", str(family_folder("unet")), {"method": "diffusion"}),
        "cnn": ("large.npz", "small-cnn", {"method": "classification"}),
        "series": ("series.csv", "small-window-vae", {"method": "vae"}),
    }
    values = [f"2026-01-01 {n // 60:02}:{n % 60:02}:00,{n % 7}" for n in range(120)]
    (home / "series.csv").write_text("\n".join(["timestamp,value", *values, ""]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LUTHIER_HOME", str(home))
        training = {"max_steps": 2, "batch_size": 4, "precision": "float32", "threads": 1}
        stored = {"text": str(tiny_model_folder)}
        for name, (file, base, objective) in sources.items():
            fields: dict[str, Any] = {
                "base": base,
                "name": name,
                "data": {"train": str(home / file)},
            }
            fields |= {"objective": objective, "training": training}
            fields["adaptation"] = {"method": "full"}
            stored[name] = train(Recipe.parse(fields)).model_id
        limits = ServerLimits(inputs=16, image_pixels=1_000_000, sound_samples=100_000)
        service = Service(Settings(database=f"sqlite:///{home / 's.db'}", limits=limits))
        deployed = {}
        with service.database.write() as session:
            for name, stored_id in stored.items():
                model = CustomModel(
                    id=new_id(), account=ACCOUNT, name=name, foundation="luthier.x",
                    root="luthier.x", base_model="", stored_id=stored_id, status=ACTIVE,
                    openai_id=f"ft:x:org:{name}:1", created=now(),
                )  # fmt: skip
                session.add(model)
                endpoint = Endpoint(
                    id=new_id(), account=ACCOUNT, kind=DEPLOYMENT, name=name, foundation="luthier.x",
                    model=model.arn(service.arns), status=READY, created=now(), modified=now(),
                )  # fmt: skip
                session.add(endpoint)
                deployed[name] = service.arns.of(ACCOUNT, DEPLOYMENT, endpoint.id)
        with served(service.application) as url:
            assert service.issued is not None
            with closing(Server(service, url, service.issued, stored, deployed, large_N)) as made:
                yield made
        service.close()


@pytest.fixture(autouse=True)
def luthier_home(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_HOME", str(Path(server.service.database.url[10:]).parent))


def png(pixels: Any, form: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format=form)
    return stream.getvalue()


def text_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def pixels_of(text: str) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


# Reading -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_classifier_predictions_match_sdk(server: Server, tmp_path: Path) -> None:
    paths = [tmp_path / f"{n}.png" for n in range(10)]
    for path, image in zip(paths, server.images, strict=False):
        path.write_bytes(png(image))
    expected = load(server.stored["cnn"]).predict([str(path) for path in paths])
    before, _ = server.tokens("cnn")
    files = [{"image": text_of(path.read_bytes())} for path in paths]
    status, body = server.post("cnn/predictions", {"inputs": files})
    assert (status, body["model"], len(body["answers"])) == (200, "cnn", 10)
    for answer, known in zip(body["answers"], expected, strict=True):
        assert answer["label"] == known["label"] and {*answer["scores"]} == {*CLASSES}
        assert answer["scores"]["cat"] == pytest.approx(known["scores"]["cat"], abs=1e-5)
    assert server.tokens("cnn") == (before + 10, 0)
    top = server.post("cnn/predictions", {"inputs": files[:1], "top": 1})[1]["answers"][0]
    assert [*top["scores"]] == [top["label"]]
    address = f"data:image/png;base64,{files[0]['image']}"
    again = server.post("cnn/predictions", {"inputs": [{"image": address}]})[1]["answers"]
    file = server.post("cnn/predictions", paths[0].read_bytes(), "image/png")[1]["answers"]
    assert again == file and again[0]["label"] == expected[0]["label"]


@pytest.mark.slow
def test_autoencoder_predicts_anomalies_and_reconstructs_images(server: Server) -> None:
    image = np.full((HEIGHT, WIDTH, 3), 90, dtype=np.uint8)
    body = {"inputs": [{"image": text_of(png(image))}]}
    status, found = server.post("vae/predictions", body)
    assert status == 200 and {*found["answers"][0]} == {"score", "anomalous"}
    status, found = server.post("vae/reconstructions", {"images": [text_of(png(image))] * 3})
    assert status == 200 and len(found["images"]) == 3
    assert found["compression_ratio"] > 1
    copy = pixels_of(found["images"][0]["png"])
    assert copy.shape == image.shape
    error = float(np.square((image.astype(float) - copy) / 255).mean())
    assert found["images"][0]["error"] == pytest.approx(error)
    status, picture = server.post("vae/reconstructions", png(image), "image/png", "image/png")
    assert (status, Image.open(io.BytesIO(picture)).size[0] > 2 * WIDTH) == (200, True)


def test_base_returns_image_embeddings(server: Server) -> None:
    images = [text_of(png(server.images[number])) for number in (0, 1, 0)]
    body = {"inputs": [{"image": image} for image in images]}
    status, found = server.post("small-cnn/predictions", body)
    first, second, same = (np.array(each["embedding"]) for each in found["answers"])
    assert (
        status == 200
        and np.allclose(first, same, atol=1e-4)
        and not np.allclose(first, second, atol=1e-3)
    )
    assert np.linalg.norm(first) == pytest.approx(1, abs=1e-4)


# Making --------------------------------------------------------------------------------------------


def test_same_seed_gives_same_images_on_every_api(server: Server) -> None:
    expected = [each.pixels for each in load(server.stored["gan"]).sample(3, seed=5, label="dog")]
    status, native = server.post("gan/images", {"count": 3, "seed": 5, "label": "dog"})
    assert status == 200
    assert (native["width"], native["height"], native["seed"]) == (WIDTH, HEIGHT, 5)
    assert [each["label"] for each in native["images"]] == ["dog"] * 3
    made = server.openai.images.generate(
        model="ft:x:org:gan:1", prompt="dog", n=3, size=f"{WIDTH}x{HEIGHT}",  # type: ignore[arg-type]
        response_format="b64_json", extra_body={"seed": 5},
    )  # fmt: skip
    assert made.data is not None and made.usage is not None
    assert made.usage.output_tokens == made.usage.total_tokens == 3
    config = {"numberOfImages": 3, "height": HEIGHT, "width": WIDTH, "seed": 5}
    invoked, headers = server.invoke(
        "gan", taskType="TEXT_IMAGE", textToImageParams={"text": "dog"},
        imageGenerationConfig={**config, "quality": "standard"},
    )  # fmt: skip
    assert invoked["error"] is None
    counts = [headers[f"x-amzn-bedrock-{kind}-token-count"] for kind in ("input", "output")]
    assert counts == ["0", "3"]
    answers = (
        [each["png"] for each in native["images"]],
        [each.b64_json for each in made.data],
        invoked["images"],
    )
    for answer in answers:
        assert len(answer) == 3
        for text, pixels in zip(answer, expected, strict=True):
            assert np.array_equal(pixels_of(text or ""), pixels)


@pytest.mark.parametrize("body", [{"count": True}, {"steps": "9"}, {"guidance_scale": True}])
def test_numbers_are_numbers(server: Server, body: dict[str, Any]) -> None:
    status, error = server.post("gan/images", body)
    assert status == 400 and next(iter(body)) in str(error)


def test_series_predictions_match_sdk(server: Server) -> None:
    windows = [[float(n % 7) for n in range(60)], [1, 2, 3, 90.5]]
    expected = load(server.stored["series"]).predict([{"window": each} for each in windows])
    status, body = server.post("series/predictions", {"inputs": [{"window": w} for w in windows]})
    assert status == 200 and [*body["answers"][0]] == ["score", "anomalous"]
    for answer, known in zip(body["answers"], expected, strict=True):
        assert answer["anomalous"] == known["predicted"]["anomalous"]
        assert answer["score"] == pytest.approx(known["predicted"]["score"], rel=1e-4)
    assert body["answers"][0]["anomalous"] in (True, False)
    assert body["answers"][1]["anomalous"] is None  # of 4 values of 48
    for wrong in ([], ["1"], [True], [1e200], [0.0] * 600, "1, 2"):
        status, error = server.post("series/predictions", {"inputs": [{"window": wrong}]})
        assert status == 400 and "inputs.0.window" in str(error), wrong
    status, error = server.post("cnn/predictions", {"inputs": [{"window": [1, 2]}]})
    assert (status, error["parameter"]) == (400, "inputs.0.window")
    status, error = server.post("series/images", {"count": 1})
    assert (status, error["parameter"]) == (400, "model")


def test_generated_images_cycle_through_classes(server: Server) -> None:
    _, written = server.tokens("gan")
    status, found = server.post("gan/images", {"count": 4})
    assert [each["label"] for each in found["images"]] == ["cat", "dog", "cat", "dog"]
    assert server.tokens("gan") == (0, written + 4)
    again = server.post("gan/images", {"count": 4, "seed": found["seed"]})[1]
    assert again == found
    assert server.post("gan/images", {"count": 4})[1]["seed"] != found["seed"]
    status, picture = server.post("gan/images", {"count": 4, "seed": 1}, accept="image/png")
    assert status == 200 and Image.open(io.BytesIO(picture)).size == (
        2 * (WIDTH + 2) + 2,
        2 * 11 + 2,
    )


def test_diffusion_model_accepts_steps_and_guidance(server: Server) -> None:
    model = load(server.stored["unet"])
    (expected,) = model.sample(1, seed=3, label="cat", guidance_scale=4.0)
    body = {"seed": 3, "label": "cat", "guidance_scale": 4.0}
    (made,) = server.post("unet/images", body)[1]["images"]
    invoked, _ = server.invoke(
        "unet", taskType="TEXT_IMAGE", textToImageParams={"text": "cat"},
        imageGenerationConfig={"seed": 3, "cfgScale": 4.0},
    )  # fmt: skip
    for png_text in (made["png"], invoked["images"][0]):
        assert np.array_equal(pixels_of(png_text), expected.pixels)
    other = server.post("unet/images", {**body, "steps": 2})[1]["images"][0]
    assert other["png"] != made["png"]
    status, error = server.post("gan/images", {"steps": 2})
    assert (status, error["parameter"]) == (400, "steps")
    status, error = server.post("unet/images", {**body, "negative_prompt": "dog"})
    assert (status, error["parameter"]) == (400, "negative_prompt")


# What is refused ----------------------------------------------------------------------------------


def bomb(width: int, height: int) -> bytes:
    """Return a small file with the header of a huge image."""
    stream = io.BytesIO()
    Image.new("1", (1, 1)).save(stream, format="PNG")
    small = stream.getvalue()
    # Behind 8 bytes of signature and 4 of length: the sizes, five bytes of format, a checksum.
    header = b"IHDR" + struct.pack(">2I", width, height) + small[24:29]
    return small[:12] + header + struct.pack(">I", zlib.crc32(header)) + small[33:]


def silence(samples: int) -> bytes:
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes(b"\0\0" * samples)
    return stream.getvalue()


IMAGE = text_of(png(np.zeros((32, 32, 3), np.uint8)))
REJECTED: list[tuple[str, Any, str]] = [
    ("cnn/predictions", {"inputs": [{"image": IMAGE}, {"image": text_of(bomb(2000, 600))}]},
     "inputs.1.image"),
    ("cnn/predictions", {"inputs": [{"image": "???"}]}, "inputs.0.image"),
    ("cnn/predictions", {"inputs": [{"image": text_of(b"no picture")}]}, "inputs.0.image"),
    ("cnn/predictions", {"inputs": [{"image": IMAGE[:60]}]}, "inputs.0.image"),
    ("cnn/predictions", {"inputs": [{"image": f"data:text/html;base64,{IMAGE}"}]},
     "inputs.0.image"),
    ("cnn/predictions", {"inputs": [{"audio": text_of(silence(10))}]}, "inputs.0.audio"),
    ("cnn/predictions", {"inputs": [{"text": "a cat"}]}, "inputs.0.text"),
    ("cnn/predictions", {"inputs": []}, "inputs"),
    ("cnn/predictions", {"inputs": [{"image": IMAGE}] * 17}, "inputs"),
    ("cnn/predictions", {"inputs": [{"image": IMAGE, "text": "x"}]}, "inputs.0"),
    ("cnn/predictions", {"inputs": [{"image": IMAGE}], "top": 0}, "top"),
    ("cnn/images", {}, "model"),
    ("gan/reconstructions", {"images": [IMAGE]}, "model"),
    ("gan/predictions", {"inputs": [{"image": IMAGE}]}, "model"),
    ("gan/images", {"count": 17}, "count"),
    ("gan/images", {"label": "cow"}, "label"),
    ("vae/images", {"label": "cow"}, "label"),
    ("text/images", {}, "model"),
    ("text/predictions", {"inputs": [{"text": "x"}]}, "model"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "parameter"), REJECTED)
def test_native_image_api_names_invalid_parameter(
    server: Server, path: str, body: Any, parameter: str
) -> None:
    status, error = server.post(path, body)
    assert (status, error["code"], error["parameter"]) == (400, "Validation", parameter), error


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model": "text"}, "model"),
    ({"model": "cnn"}, "model"),
    ({"prompt": "cow"}, "prompt"),
    ({"model": "vae", "prompt": "cow"}, "prompt"),
    ({"n": 11}, "n"),
    ({"n": 0}, "n"),
    ({"size": "256x256"}, "size"),
    ({"size": "large"}, "size"),
    ({"response_format": "url"}, "response_format"),
    ({"quality": "hd"}, "quality"),
    ({"style": "vivid"}, "style"),
    ({"background": "transparent"}, "background"),
    ({"output_format": "webp"}, "output_format"),
    ({"stream": True}, "stream"),
]


def test_openai_image_api_names_unsupported_parameter(server: Server) -> None:
    for changes, param in REFUSED:
        asked = {"model": "gan", "prompt": "cat", **changes}
        with pytest.raises(openai.BadRequestError) as refused:
            server.openai.images.generate(**asked)
        assert refused.value.param == param, changes
    with pytest.raises(openai.NotFoundError):
        server.openai.images.generate(model="dall-e-3", prompt="cat")


CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"taskType": "INPAINTING"}, "#/taskType"),
    ({"taskType": 3}, "#/taskType"),
    ({"textToImageParams": {"text": "cow"}}, "#/textToImageParams/text"),
    (
        {"textToImageParams": {"text": "cat", "negativeText": "dog"}},
        "#/textToImageParams/negativeText",
    ),
    ({"textToImageParams": {"text": "cat", "negativeText": 3}}, "negativeText"),
    ({"textToImageParams": {"text": "cat", "negativeText": "x" * 1025}}, "negativeText"),
    ({"textToImageParams": {"text": "cat", "conditionImage": IMAGE}}, "conditionImage"),
    ({"textToImageParams": None}, "textToImageParams"),
    ({"imageGenerationConfig": {"numberOfImages": 6}}, "numberOfImages"),
    ({"imageGenerationConfig": {"height": 512, "width": 512}}, "#/imageGenerationConfig"),
    ({"imageGenerationConfig": {"height": HEIGHT}}, "#/imageGenerationConfig"),
    ({"imageGenerationConfig": {"cfgScale": 8.0}}, "cfgScale"),
    ({"imageGenerationConfig": {"quality": "premium"}}, "quality"),
    ({"imageGenerationConfig": {"seed": -1}}, "seed"),
    ({"imageGenerationConfig": {"steps": 9}}, "steps"),
    ({"more": 1}, "more"),
]


def test_bedrock_image_api_rejects_unsupported_requests(server: Server) -> None:
    body = {"taskType": "TEXT_IMAGE", "textToImageParams": {"text": "cat"}}
    for changes, words in CONFIGS:
        with pytest.raises(ClientError) as refused:
            server.invoke("gan", **{**body, **changes})
        assert refused.value.response["Error"]["Code"] == "ValidationException"
        assert words in str(refused.value), changes
    for model in ("text", "cnn"):
        with pytest.raises(ClientError):
            server.invoke(model, **body)
    asked = {"modelId": server.deployed["gan"], "body": json.dumps(body)}
    with pytest.raises(ClientError):
        server.runtime.invoke_model_with_response_stream(**asked)
    with pytest.raises(ClientError):
        server.runtime.count_tokens(
            modelId=asked["modelId"], input={"invokeModel": {"body": asked["body"].encode()}}
        )


def test_image_model_rejects_text_requests(server: Server) -> None:
    for model in ("gan", "cnn"):
        with pytest.raises(openai.BadRequestError):
            server.openai.chat.completions.create(
                model=model, messages=[{"role": "user", "content": "x"}]
            )
        with pytest.raises(openai.BadRequestError):
            server.openai.embeddings.create(model=model, input="x")
        with pytest.raises(ClientError):
            server.invoke(model, prompt="x")
