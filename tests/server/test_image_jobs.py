"""Image jobs from uploads to a served model, in real processes (slow)."""

from __future__ import annotations

import base64
import io
import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from imported_models import BUCKET, create, deployed, ended, put
from luthier_server import KEYS, ONE, Served, home_with_tiny, until
from PIL import Image, ImageDraw

pytestmark = pytest.mark.slow

ROLE = "arn:aws:iam::000000000000:role/x"
CLASSES = {"disc": "ellipse", "square": "rectangle"}


def picture(shape: str, seed: int) -> bytes:
    """A bright shape on a dark ground, PNG."""
    random = np.random.default_rng(seed)
    image = Image.new("RGB", (32, 32), tuple(random.integers(0, 60, 3).tolist()))
    left = int(random.integers(2, 12))
    getattr(ImageDraw.Draw(image), CLASSES[shape])((left, 6, left + 18, 24), outline="yellow")
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Iterator[Served]:
    made = Served(home_with_tiny(tmp_path_factory.mktemp("service"), tiny_model_folder))
    made.start()
    s3 = made.client("s3")
    for bucket in ("data", BUCKET):
        s3.create_bucket(Bucket=bucket)
    for number in range(24):
        shape = [*CLASSES][number % 2]
        s3.put_object(
            Bucket="data", Key=f"photos/{shape}/{number}.png", Body=picture(shape, number)
        )
    yield made
    made.end()


def test_bedrock_job_trains_image_classifier_from_prefix(server: Served) -> None:
    bedrock = server.client("bedrock")
    members: dict[str, Any] = {
        "roleArn": ROLE, "baseModelIdentifier": "luthier.small-cnn",
        "outputDataConfig": {"s3Uri": "s3://data/out/"},
    }  # fmt: skip
    rows = [
        {"image": f"s3://data/photos/{shape}/{number}.png", "label": shape}
        for number, shape in enumerate([*CLASSES] * 12)
    ]
    body = "".join(json.dumps(row) + "\n" for row in rows).encode()
    server.client("s3").put_object(Bucket="data", Key="rows.jsonl", Body=body)
    for name, source in (("shapes", "s3://data/photos/"), ("named", "s3://data/rows.jsonl")):
        arn = bedrock.create_model_customization_job(
            **members, jobName=name, customModelName=name, trainingDataConfig={"s3Uri": source},
            hyperParameters={"epochCount": "6", "batchSize": "8"},
        )["jobArn"]  # fmt: skip
        asked = lambda arn=arn: bedrock.get_model_customization_job(jobIdentifier=arn)  # noqa: E731
        until(lambda asked=asked: asked()["status"] != "InProgress")
        assert asked()["status"] == "Completed", asked().get("failureMessage")
        image = base64.b64encode(picture("disc", 99)).decode()
        status, answer = server.ask(
            "POST", f"/api/v1/models/{name}/predictions", {"inputs": [{"image": image}]}
        )
        assert status == 200 and {*answer["answers"][0]["scores"]} == {*CLASSES}
    certificate = server.ask("GET", "/api/v1/models/named/certificate")[1]["certificate"]
    assert "images and sounds that rows name" in json.dumps(certificate)
    status, report = server.ask(
        "POST", "/api/v1/inspections", {"training": "s3://data/photos/", "base": "small-cnn"}
    )
    assert (status, report["report"]["rows"]["train"]) == (200, 24), report


def test_zip_upload_trains_image_generator_through_openai_api(server: Served) -> None:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        for number in range(24):
            file.writestr(f"{number}.png", picture("disc", number))
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEYS[ONE]["api_key"])
    with client:
        uploaded = client.files.create(file=("a.zip", archive.getvalue()), purpose="fine-tune")
        job = client.fine_tuning.jobs.create(
            model="small-vae", training_file=uploaded.id,
            method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}},
        )  # fmt: skip
        until(lambda: client.fine_tuning.jobs.retrieve(job.id).finished_at)
        ended = client.fine_tuning.jobs.retrieve(job.id)
        assert ended.status == "succeeded" and ended.fine_tuned_model, ended.error
        made = client.images.generate(model=ended.fine_tuned_model, prompt="", n=2)
        assert made.data and made.size == "32x32"
        file = io.BytesIO(base64.b64decode(made.data[1].b64_json or ""))
        assert Image.open(file).size == (32, 32)


def test_imported_pipeline_is_trained_and_generates_images(
    server: Served, family_folder: Callable[[str], Path]
) -> None:
    source = put(server, family_folder("stable_diffusion"), "sd")
    found = ended(server, create(server, "painter", source))
    assert found["modelStatus"] == "Active", found
    bedrock, runtime = server.client("bedrock"), server.client("bedrock-runtime")
    rows = [
        {"image-ref": f"s3://data/photos/{shape}/{number}.png", "caption": f"a {shape}"}
        for number, shape in enumerate([*CLASSES] * 8)
    ]
    body = "".join(json.dumps(row) + "\n" for row in rows).encode()
    server.client("s3").put_object(Bucket="data", Key="captions.jsonl", Body=body)
    bedrock.create_model_customization_job(
        roleArn=ROLE, baseModelIdentifier=found["modelArn"], jobName="style",
        customModelName="style", trainingDataConfig={"s3Uri": "s3://data/captions.jsonl"},
        outputDataConfig={"s3Uri": "s3://data/out/"},
        hyperParameters={"epochCount": "2", "batchSize": "4"},
    )  # fmt: skip
    asked = lambda: bedrock.get_model_customization_job(jobIdentifier="style")  # noqa: E731
    until(lambda: asked()["status"] != "InProgress")
    assert asked()["status"] == "Completed", asked().get("failureMessage")
    asked_for = {
        "taskType": "TEXT_IMAGE", "textToImageParams": {"text": "a disc"},
        "imageGenerationConfig": {"seed": 1, "cfgScale": 3.0},
    }  # fmt: skip
    status, drawn = server.ask(
        "POST", "/api/v1/models/painter/images", {"prompt": "a disc", "seed": 1, "steps": 2}
    )
    assert status == 200 and len(drawn["images"]) == 1, drawn
    job = bedrock.get_model_customization_job(jobIdentifier="style")
    assert job["baseModelArn"] == found["modelArn"]
    made = {}
    for name in ("painter", "style"):
        arn = bedrock.get_custom_model(modelIdentifier=name)["modelArn"]
        answer = runtime.invoke_model(
            modelId=deployed(server, name, arn), body=json.dumps(asked_for)
        )
        (image,) = json.loads(answer["body"].read())["images"]
        made[name] = Image.open(io.BytesIO(base64.b64decode(image)))
    assert made["painter"].size == made["style"].size
    assert made["painter"].tobytes() != made["style"].tobytes()
