"""``luthier live promote``, ``rollback`` and ``history`` with unmodified boto3 and openai clients."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import boto3
import openai
import pytest
from command_line import MODEL, Answer
from safetensors.torch import load_file, save_file
from served import served

from luthier.files import sha256_of
from luthier.inference.inference import InferenceFailed
from luthier.server.service import Service
from luthier.server.settings import Settings
from luthier.server.tables.audit import entries

QUESTION = [{"role": "user", "content": "colour of coal?"}]


def copy_model(
    home: Path, name: str, change: Callable[[Any], Any] = lambda weights: weights
) -> str:
    """Copy the tuned model with changed weights, and return the library id."""
    folder = home / "models/custom/tiny-llama" / name
    shutil.copytree(home / "models/custom/tiny-llama/colours", folder)
    record = json.loads((folder / "luthier.json").read_text())
    for file in folder.glob("*.safetensors"):
        save_file(change(load_file(file)), file, {"format": "pt"})
        record["files"][file.name] = sha256_of(file)
    (folder / "luthier.json").write_text(json.dumps(record | {"id": f"tiny-llama:{name}"}))
    return f"tiny-llama:{name}"


def silent(weights: dict[str, Any]) -> dict[str, Any]:
    """Weights of a model that generates something else."""
    return {name: value.flip(0) if value.ndim == 2 else value for name, value in weights.items()}


class Deployed:
    """A server with the deployment ``answers`` of the model ``colours``."""

    def __init__(self, service: Service, url: str) -> None:
        self.service, self.url = service, url
        assert service.issued is not None
        self.key = service.issued.api_key
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key=self.key, max_retries=0)
        self.bedrock, self.runtime = (
            boto3.client(
                name, endpoint_url=url, region_name="us-east-1",
                aws_access_key_id=service.issued.access_key,
                aws_secret_access_key=service.issued.secret,
            )
            for name in ("bedrock", "bedrock-runtime")
        )  # fmt: skip
        self.arns = {
            "colours": self.register(MODEL),
        }
        self.bedrock.create_custom_model_deployment(
            modelDeploymentName="answers", modelArn=self.arns["colours"]
        )
        self.until(lambda: self.shown()["status"] == "Active")

    def register(self, model: str) -> str:
        answer = Answer("admin", "models", "register", model, "--json").good()
        return str(answer.json()["arn"])

    def add(self, home: Path, name: str, change: Callable[[Any], Any] = silent) -> str:
        self.arns[name] = self.register(copy_model(home, name, change))
        return self.arns[name]

    def shown(self) -> Any:
        return self.bedrock.get_custom_model_deployment(customModelDeploymentIdentifier="answers")

    def ask(self, **members: Any) -> Any:
        return self.client.chat.completions.create(
            model="answers", messages=QUESTION, temperature=0, max_tokens=8, **members
        )

    def says_black(self) -> bool:
        return bool(self.ask().choices[0].message.content == "black")

    def native(self, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = Request(f"{self.url}/api/v1/{path}", data)
        request.add_header("Authorization", f"Bearer {self.key}")
        request.add_header("Content-Type", "application/json")
        with urlopen(request) as answer:
            return json.loads(answer.read())

    def until(self, wanted: Callable[[], Any], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not wanted():
            assert time.monotonic() < deadline
            time.sleep(0.1)


@pytest.fixture
def deployed(own_home: Path) -> Iterator[Deployed]:
    """A running server with a deployment."""
    service = Service(Settings(run_jobs=False))
    service.start()
    try:
        with served(service.application) as url:
            made = Deployed(service, url)
            yield made
            for client in (made.client, made.bedrock, made.runtime):
                client.close()
    finally:
        service.close()


def live(*words: str) -> Any:
    return Answer("live", *words, "--json").good().json()


@pytest.mark.slow
def test_promotion_and_rollbacks(deployed: Deployed, own_home: Path) -> None:
    second, third = deployed.add(own_home, "second"), deployed.add(own_home, "third")
    assert deployed.says_black()
    promoted = live("promote", "answers", "second")
    assert (promoted["model"], promoted["model_arn"]) == ("second", second)
    assert not deployed.says_black()
    assert deployed.shown()["modelArn"] == second
    assert deployed.shown()["updateDetails"]["updateStatus"] == "UpdateCompleted"
    deployed.native("deployments/answers/promote", {"model": "third"})
    deployed.until(lambda: deployed.shown()["modelArn"] == third)
    back = live("rollback", "answers")
    assert (back["model"], back["earlier"]) == ("second", "colours")
    deployed.native("deployments/answers/rollback", {})
    deployed.until(deployed.says_black)
    assert "earlier" not in deployed.native("deployments/answers")
    assert "no earlier model" in Answer("live", "rollback", "answers").refused()
    deployed.bedrock.update_custom_model_deployment(
        customModelDeploymentIdentifier="answers", modelArn=third
    )
    deployed.until(lambda: deployed.shown()["modelArn"] == third)
    history = deployed.native("deployments/answers")["history"]
    assert [(each["action"], each["model"], each["state"]) for each in history] == [
        ("create", "colours", "switched"), ("promote", "second", "switched"),
        ("promote", "third", "switched"), ("rollback", "second", "switched"),
        ("rollback", "colours", "switched"), ("promote", "third", "switched"),
    ]  # fmt: skip
    assert [each["user"].partition(":")[0] for each in history] == [
        "root", "cli", "root", "cli", "root", "root",
    ]  # fmt: skip
    assert live("history", "answers")["history"] == history
    assert "third" in Answer("live", "history", "answers").good().out
    with deployed.service.database.read() as session:
        switches = entries(session, action="deployment.switch")
    assert [each.details["model"] for each in switches[::-1]] == [
        second, third, second, deployed.arns["colours"], third,
    ]  # fmt: skip


@pytest.mark.slow
def test_request_in_flight_ends_on_the_first_model(deployed: Deployed, own_home: Path) -> None:
    deployed.add(own_home, "second")
    stream = deployed.ask(stream=True)
    first = next(iter(stream))
    assert live("promote", "answers", "second")["model"] == "second"
    deployed.service.pool.unload(MODEL)
    text = "".join(each.choices[0].delta.content or "" for each in (first, *stream))
    assert text == "black" and not deployed.says_black()


@pytest.mark.slow
def test_model_that_cannot_be_loaded_is_refused(deployed: Deployed, own_home: Path) -> None:
    deployed.add(own_home, "damaged")
    (file,) = (own_home / "models/custom/tiny-llama/damaged").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-9])
    message = Answer("live", "promote", "answers", "damaged").refused()
    assert "still serves colours" in message and "damaged" in message
    assert deployed.says_black()
    assert live("history", "answers")["history"][-1]["state"] == "ended"


@pytest.mark.slow
def test_unsuitable_promotions_are_refused(deployed: Deployed, own_home: Path) -> None:
    folder = own_home / "models/custom/tiny-llama/labels"
    shutil.copytree(own_home / "models/custom/tiny-llama/colours", folder)
    record = json.loads((folder / "luthier.json").read_text())
    fields = {"method": "classification", "labels": ["a", "b"]}
    record["recipe"]["objective"] = fields
    changed = record | {"id": "tiny-llama:labels"}
    (folder / "luthier.json").write_text(json.dumps(changed))
    arn = deployed.register("tiny-llama:labels")
    for words, text in (
        (("answers", "labels"), "different task"),
        (("answers", "colours"), "already serves"),
        (("answers", "nothing"), 'no model "nothing"'),
        (("nothing", "colours"), 'no deployment "nothing"'),
    ):
        assert text in Answer("live", "promote", *words).refused()
    with pytest.raises(HTTPError) as refused:
        deployed.native("deployments/nothing/promote", {"model": "colours"})
    assert refused.value.code == 404
    refused.value.close()
    with pytest.raises(deployed.bedrock.exceptions.ValidationException, match="different task"):
        deployed.bedrock.update_custom_model_deployment(
            customModelDeploymentIdentifier="answers", modelArn=arn
        )
    assert deployed.says_black()


def canary_of(deployed: Deployed, share: float, answers: int) -> None:
    body = {"model": "second", "share": share, "answers": answers}
    deployed.native("deployments/answers/promote", body)
    deployed.until(lambda: "canary" in deployed.native("deployments/answers"))


def test_canary_answers_a_share_of_users_and_is_promoted(
    deployed: Deployed, own_home: Path
) -> None:
    second = deployed.add(own_home, "second")
    canary_of(deployed, 0.5, 12)
    first = deployed.shown()
    assert first["updateDetails"] == {"modelArn": second, "updateStatus": "Updating"}
    for number in range(8):
        user = f"user-{number}"
        answer, again = (deployed.ask(safety_identifier=user) for _ in range(2))
        assert answer.model == again.model in ("colours", "second")
        is_old = answer.choices[0].message.content == "black"
        assert is_old == (answer.model == "colours")
    said = deployed.runtime.converse(
        modelId="answers", messages=[{"role": "user", "content": [{"text": "Hi"}]}],
        inferenceConfig={"maxTokens": 2}, requestMetadata={"session_id": "a"},
    )  # fmt: skip
    names = said["ResponseMetadata"]["HTTPHeaders"]["x-luthier-model"]
    assert names in ("colours", "second")
    shown = live("history", "answers")["canary"]
    assert shown["promoted_at"] == 12 and shown["comparisons"][0]["measure"] == "errors"
    deployed.until(lambda: deployed.ask() and deployed.shown()["modelArn"] == second)
    last = live("history", "answers")["history"][-1]
    assert last["state"] == "switched" and last["note"].startswith("Promoted after")
    assert deployed.ask().model == "answers"


@pytest.mark.slow
def test_ruined_canary_is_rolled_back(
    deployed: Deployed, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deployed.add(own_home, "second")
    submit = deployed.service.pool.submit

    def fail(stored_id: str, request: Any) -> Any:
        if stored_id.endswith("second"):
            raise InferenceFailed("ModelError", "The model returned NaN.")
        return submit(stored_id, request)

    monkeypatch.setattr(deployed.service.pool, "submit", fail)
    canary_of(deployed, 0.5, 200)
    failures = 0

    def ended() -> bool:
        nonlocal failures
        try:
            deployed.ask()
        except openai.InternalServerError:
            failures += 1
        return bool(deployed.shown()["updateDetails"]["updateStatus"] == "UpdateFailed")

    deployed.until(ended, 120)
    assert failures < 100 and deployed.says_black()
    note = live("history", "answers")["history"][-1]["note"]
    assert "Rolled back for errors: 100.0 %" in note and "0.0 %" in note
