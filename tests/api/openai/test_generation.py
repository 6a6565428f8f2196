"""Who may have which model answer, decided before anybody looks whether it is there."""

from __future__ import annotations

from typing import Any

import pytest

from luthier.api.http.messages import Caller, Fault
from luthier.api.identifiers import Invocable
from luthier.api.openai import models
from luthier.api.openai.generation import Inference
from luthier.api.openai.models import Catalogue
from luthier.api.openai.protocol import Access
from luthier.store.arns import Arns

ARN = "arn:aws:bedrock:us-east-1:000000000000:custom-model-deployment/abcdefghijkl"
ACTION = "chat.completions.create"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was asked for: ARNs by policies, and whether anybody looked for one."""
    noted: list[str] = []

    def look(*arguments: object) -> Invocable:
        noted.append("looked")
        raise Fault("ModelNotReady", "The deployment is being created.")

    monkeypatch.setattr(models, "invocable", look)
    return noted


def inference(service: Any, allowed: str, asked: list[str]) -> Inference:
    """Over a deployment that is still being made; only the ARN ``allowed`` may be asked."""

    def authorize(caller: Caller, action: str, resource: str) -> None:
        asked.append(resource)
        if resource != allowed:
            raise Fault("AccessDenied", f"not authorized to perform {action} on {resource}")

    catalogue = Catalogue(service.database, Arns("us-east-1"))
    return Inference(catalogue, Access(authorize, "us-east-1"), service.pool)


def test_the_policy_is_asked_before_anybody_looks(service: Any, asked: list[str]) -> None:
    caller = Caller("000000000000", "anna", ())
    for allowed, code in (("another", "AccessDenied"), (ARN, "ModelNotReady")):
        with pytest.raises(Fault) as refused:
            inference(service, allowed, asked).target(caller, ACTION, ARN)
        assert refused.value.code == code
    assert asked == [ARN, ARN, ARN, "looked"]


def test_a_name_is_decided_on_by_the_arn_it_stands_for(service: Any, asked: list[str]) -> None:
    caller = Caller("000000000000", "anna", ())
    unknown = Arns("us-east-1").foundation_model("no-such")
    for allowed, code in (("another", "AccessDenied"), (unknown, "ResourceNotFound")):
        with pytest.raises(Fault) as refused:
            inference(service, allowed, asked).target(caller, ACTION, "no-such")
        assert refused.value.code == code
    assert set(asked) == {unknown}
