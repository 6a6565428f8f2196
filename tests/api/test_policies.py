"""What callers may do, as IAM evaluates it."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from typing import Any

import anyio
import anyio.to_thread
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from principals_of import ALLOW_ALL

from luthier.api.http.messages import Caller, Fault
from luthier.api.policies import authorize, record_actions, refuse_denied, trusts
from luthier.errors import RefusedInput
from luthier.store.database import now
from luthier.store.policy_documents import ROLES, check_document, check_role, check_trust
from luthier.store.sessions import TemporarySession

MODEL = "arn:aws:bedrock:us-east-1:000000000000:custom-model/hf.smol/abcdefabcdef"


def caller(*statements: dict[str, Any], bearer: bool = False) -> Caller:
    policies = tuple({"Version": "2012-10-17", "Statement": each} for each in statements)
    for policy in policies:
        check_document(policy)
    return Caller("000000000000", "ann", policies, bearer)


def allow(action: Any = "*", resource: Any = "*", **more: Any) -> dict[str, Any]:
    return {"Effect": "Allow", "Action": action, "Resource": resource, **more}


def deny(action: Any = "*", resource: Any = "*", **more: Any) -> dict[str, Any]:
    return {**allow(action, resource, **more), "Effect": "Deny"}


def allows(caller: Caller, action: str, resource: str) -> bool:
    """Whether :func:`authorize` would let it pass."""
    try:
        authorize(caller, action, resource)
    except Fault:
        return False
    return True


def test_nothing_is_allowed_by_default() -> None:
    with pytest.raises(Fault) as caught:
        authorize(caller(), "bedrock:GetCustomModel", MODEL)
    assert caught.value.code == "AccessDenied"
    assert caught.value.message == (
        "User: arn:aws:iam::000000000000:user/ann is not authorized to perform: "
        f"bedrock:GetCustomModel on resource: {MODEL} because no identity-based policy allows the "
        "bedrock:GetCustomModel action"
    )


def test_a_deny_is_looked_for_alone_where_another_action_was_allowed() -> None:
    for statements in ((), ([allow("s3:GetObject")],), ([allow()], [deny("s3:Put*")])):
        refuse_denied(caller(*statements), "s3:DeleteObject", "arn:aws:s3:::data/x")
    # A statement with a condition denies as if it held.
    held = deny("s3:Delete*", "arn:aws:s3:::data/*", Condition={"Bool": {"aws:x": "true"}})
    for denied in (held, deny("s3:DeleteObject"), deny(resource="arn:aws:s3:::data/x")):
        with record_actions() as asked, pytest.raises(Fault) as caught:
            refuse_denied(caller([allow(), denied]), "s3:DeleteObject", "arn:aws:s3:::data/x")
        assert caught.value.code == "AccessDenied" and "explicit deny" in caught.value.message
        assert asked == [("s3:DeleteObject", "arn:aws:s3:::data/x")]


def test_deny_wins_wherever_it_stands() -> None:
    for statements in ([allow(), deny("bedrock:Delete*")], [deny("bedrock:Delete*"), allow()]):
        ann = caller(*statements)
        assert allows(ann, "bedrock:GetCustomModel", MODEL)
        with pytest.raises(Fault, match="with an explicit deny in an identity-based policy"):
            authorize(ann, "bedrock:DeleteCustomModel", MODEL)


@pytest.mark.parametrize(
    ("pattern", "action", "matches"),
    [
        ("*", "bedrock:InvokeModel", True),
        ("bedrock:*", "bedrock:InvokeModel", True),
        ("BEDROCK:invokemodel", "bedrock:InvokeModel", True),
        ("bedrock:Invoke*", "bedrock:InvokeModelWithResponseStream", True),
        ("bedrock:Invoke", "bedrock:InvokeModel", False),
        ("bedrock:?nvokeModel", "bedrock:InvokeModel", True),
        ("bedrock:?nvokeModel", "bedrock:nvokeModel", False),
        ("s3:*", "bedrock:InvokeModel", False),
        ("*:InvokeModel", "bedrock:InvokeModel", None),
        ("bedrock.InvokeModel", "bedrock:InvokeModel", None),
        ("luthier:openai.*", "luthier:openai.files.create", True),
        ("luthier:openai.*", "luthier:openaixfiles.create", False),
    ],
)
def test_actions(pattern: str, action: str, matches: bool | None) -> None:
    if matches is None:
        with pytest.raises(RefusedInput, match="is not like"):
            caller(allow(pattern))
    else:
        assert allows(caller(allow(["s3:None", pattern])), action, MODEL) is matches


@pytest.mark.parametrize(
    ("pattern", "resource", "matches"),
    [
        ("*", MODEL, True),
        (MODEL, MODEL, True),
        (MODEL.upper().replace("ARN", "arn"), MODEL, False),
        ("arn:aws:bedrock:*:*:custom-model/*", MODEL, True),
        ("arn:aws:bedrock:*:custom-model/*", MODEL, True),
        ("arn:aws:bedrock:*:111111111111:custom-model/*", MODEL, False),
        ("arn:aws:s3:::bucket/rows/*", "arn:aws:s3:::bucket/rows/a/b.jsonl", True),
        ("arn:aws:s3:::bucket/rows/*", "arn:aws:s3:::bucket/rows", False),
        ("arn:aws:s3:::bucket/[ab]", "arn:aws:s3:::bucket/a", False),
        ("arn:aws:s3:::bucket/[ab]", "arn:aws:s3:::bucket/[ab]", True),
        ("arn:aws:s3:::bucket/?", "arn:aws:s3:::bucket/\n", True),
        ("arn:aws:s3:::bucket/a", "arn:aws:s3:::bucket/a\n", False),
        ("arn:aws:s3:::b.c/*", "arn:aws:s3:::bxc/k", False),
    ],
)
def test_resources(pattern: str, resource: str, matches: bool) -> None:
    assert allows(caller(allow("*", pattern)), "s3:GetObject", resource) is matches


def test_negated_elements() -> None:
    others = caller({"Effect": "Allow", "NotAction": "bedrock:Delete*", "Resource": "*"})
    assert allows(others, "bedrock:GetCustomModel", MODEL)
    assert not allows(others, "bedrock:DeleteCustomModel", MODEL)
    fenced = caller(
        allow(), {"Effect": "Deny", "Action": "*", "NotResource": [MODEL, "arn:aws:s3:*"]}
    )
    assert allows(fenced, "bedrock:GetCustomModel", MODEL)
    assert not allows(fenced, "bedrock:GetCustomModel", f"{MODEL}x")


def test_conditions_allow_nothing_and_deny_always() -> None:
    condition = {"Condition": {"IpAddress": {"aws:SourceIp": "10.0.0.0/8"}}}
    assert not allows(caller(allow(**condition)), "bedrock:InvokeModel", MODEL)
    assert not allows(caller(allow(), deny(**condition)), "bedrock:InvokeModel", MODEL)
    assert allows(caller(allow(Condition={})), "bedrock:InvokeModel", MODEL)


def test_bearer_keys_need_one_right_more() -> None:
    invoke = allow("bedrock:InvokeModel")
    assert allows(caller(invoke), "bedrock:InvokeModel", MODEL)
    with pytest.raises(Fault, match="bedrock:CallWithBearerToken on resource: \\*"):
        authorize(caller(invoke, bearer=True), "bedrock:InvokeModel", MODEL)
    both = allow(["bedrock:InvokeModel", "bedrock:CallWithBearerToken"])
    assert allows(caller(both, bearer=True), "bedrock:InvokeModel", MODEL)
    assert not allows(
        caller(both, deny("bedrock:CallWith*"), bearer=True), "bedrock:InvokeModel", MODEL
    )


def test_what_was_asked_for_is_noted_across_threads() -> None:
    ann = caller(allow())

    async def handle() -> list[tuple[str, str]]:
        with record_actions() as asked:
            await anyio.to_thread.run_sync(authorize, ann, "bedrock:GetCustomModel", MODEL)
            assert not await anyio.to_thread.run_sync(allows, caller(), "s3:GetObject", "arn:x")
        authorize(ann, "bedrock:ListCustomModels", "*")
        return asked

    asked = anyio.run(handle)
    assert asked == [("bedrock:GetCustomModel", MODEL), ("s3:GetObject", "arn:x")]


def test_patterns_take_time_in_proportion() -> None:
    """Where each star may go back, this pattern takes longer than anybody lives."""
    pattern = "arn:" + "a*" * 500 + "b"
    began = time.process_time()
    assert not allows(caller(allow("*", pattern)), "s3:GetObject", "arn:" + "a" * 2000)
    assert time.process_time() - began < 1


def naive(pattern: str, text: str) -> bool:
    """The same by the definition, one letter after the other."""
    reached = {0}
    for letter in pattern:
        if letter == "*":
            reached = set(range(min(reached, default=len(text) + 1), len(text) + 1))
        else:
            reached = {
                place + 1 for place in reached if place < len(text) and letter in ("?", text[place])
            }
    return len(text) in reached


@settings(max_examples=300, deadline=None)
@given(st.text("ab*?[].\n", max_size=10), st.text("ab[].\n", max_size=10))
def test_wildcards_mean_what_they_are_defined_to(pattern: str, text: str) -> None:
    statement = allow("*", f"arn:{pattern}")
    assert allows(caller(statement), "s3:GetObject", f"arn:{text}") is naive(pattern, text)


ROLE_MAY = {
    "admin": {"bedrock:DeleteCustomModel", "luthier:admin.users.create", "bedrock:GetCustomModel",
              "bedrock:InvokeModel", "s3:GetObject", "luthier:audit.list",
              "luthier:openai.files.list", "luthier:openai.fine_tuning.jobs.list_events",
              "luthier:openai.batches.retrieve", "luthier:openai.files.content",
              "luthier:openai.models.retrieve", "luthier:ListJobs", "luthier:GetModel",
              "luthier:CreateJob"},
    "developer": {"bedrock:DeleteCustomModel", "bedrock:GetCustomModel", "bedrock:InvokeModel",
                  "s3:GetObject", "luthier:openai.files.list",
                  "luthier:openai.fine_tuning.jobs.list_events",
                  "luthier:openai.batches.retrieve", "luthier:openai.files.content",
                  "luthier:openai.models.retrieve", "luthier:ListJobs", "luthier:GetModel",
                  "luthier:CreateJob"},
    "auditor": {"bedrock:GetCustomModel", "luthier:audit.list", "luthier:openai.files.list",
                "luthier:openai.fine_tuning.jobs.list_events", "luthier:openai.batches.retrieve",
                "luthier:openai.models.retrieve", "luthier:ListJobs", "luthier:GetModel"},
    "invoke-only": {"bedrock:InvokeModel", "luthier:openai.models.retrieve"},
}  # fmt: skip


@pytest.mark.parametrize("role", ROLES)
def test_roles(role: str) -> None:
    user = Caller("000000000000", "u", (check_document(ROLES[role]),), bearer=True)
    assert {each for each in ROLE_MAY["admin"] if allows(user, each, MODEL)} == ROLE_MAY[role]
    assert check_role(role) == role
    with pytest.raises(RefusedInput, match="there are admin, developer, auditor, invoke-only"):
        check_role("king")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"Effect": "allow"}, 'Effect is neither "Allow" nor "Deny"'),
        ({"Action": None}, "Action is not a string"),
        ({"Action": []}, "Action is empty"),
        ({"Action": "InvokeModel"}, "is not like"),
        ({"Action": "bedrock:a b"}, "is not like"),
        ({"Resource": "custom-model/x"}, 'neither "\\*" nor an ARN'),
        ({"Resource": "arn:" + "x" * 2050}, "1 to 2048 characters"),
        ({"Resource": "arn:aws:s3:::${aws:username}/*"}, "policy variables"),
        ({"NotAction": "s3:*"}, "needs one of Action and NotAction"),
        ({"Principal": "*"}, "Principal cannot stand here"),
        ({"Condition": []}, "Condition is not an object"),
        ({"Sid": 1}, "Sid is not a string"),
    ],
)
def test_documents_that_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RefusedInput, match=message):
        check_document({"Statement": [allow("s3:*"), {**allow("s3:*"), **change}]})


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "policy is not an object"),
        ({}, "has no Statement"),
        ({"Statement": []}, "0 statements"),
        ({"Statement": ["x"]}, r"Statement\[0\] is not an object"),
        ({**ALLOW_ALL, "Version": "2020-01-01"}, "Version is not"),
        ({**ALLOW_ALL, "Extra": 1}, "unknown member Extra"),
        (
            {"Statement": {"Effect": "Allow", "Action": "*"}},
            "needs one of Resource and NotResource",
        ),
    ],
)
def test_forms_that_are_refused(document: Any, message: str) -> None:
    with pytest.raises(RefusedInput, match=message):
        check_document(document)


# --- session policies and trust policies


def within(policies: list[dict[str, Any]], boundary: list[dict[str, Any]]) -> Caller:
    """A caller in a session whose policy has the statements ``boundary``."""
    session = TemporarySession(
        account="000000000000", user="ann", access_key="AKIA", key_created=now(), expires=now(),
        policy=json.dumps({"Version": "2012-10-17", "Statement": boundary}),
    )  # fmt: skip
    return replace(caller(*policies), session=session)


@pytest.mark.parametrize(
    ("policies", "boundary", "allowed"),
    [
        ([allow()], [allow()], True),
        ([allow()], [allow("s3:*")], False),
        ([allow("s3:*")], [allow()], False),
        ([allow(), deny("bedrock:Get*")], [allow()], False),
        ([allow()], [allow(), deny("bedrock:Get*")], False),
        ([allow()], [allow("bedrock:*", Condition={"Bool": {}})], False),
        ([allow()], [allow("bedrock:GetCustomModel", MODEL)], True),
        ([allow()], [allow("bedrock:GetCustomModel", MODEL + "x")], False),
    ],
)
def test_a_session_policy_has_to_allow_as_well(
    policies: list[dict[str, Any]], boundary: list[dict[str, Any]], allowed: bool
) -> None:
    assert allows(within(policies, boundary), "bedrock:GetCustomModel", MODEL) is allowed


def test_a_deny_of_a_session_policy_holds_for_what_comes_to_the_same() -> None:
    bound = within([allow()], [allow("luthier:*"), deny("bedrock:DeleteCustomModel")])
    with pytest.raises(Fault, match="explicit deny in a session policy"):
        refuse_denied(bound, "bedrock:DeleteCustomModel", MODEL)
    refuse_denied(bound, "bedrock:GetCustomModel", MODEL)


ANN, ROOT = "arn:aws:iam::000000000000:user/ann", "arn:aws:iam::000000000000:root"
OTHERS = "arn:aws:iam::111111111111:root"


def lets(principal: Any, **more: Any) -> dict[str, Any]:
    given = principal if isinstance(principal, (dict, str)) else {"AWS": principal}
    return {"Effect": "Allow", "Action": "sts:AssumeRole", "Principal": given, **more}


@pytest.mark.parametrize(
    ("statements", "expected"),
    [
        ([lets([ANN])], "principal"),
        ([lets([ROOT])], "account"),
        ([lets(["000000000000"])], "account"),
        ([lets([ROOT]), lets([ANN])], "principal"),
        ([lets([OTHERS])], None),
        ([lets([ANN + "e"])], None),
        ([lets({"Service": "bedrock.amazonaws.com"})], None),
        ([lets([ANN], Action="sts:*")], "principal"),
        ([lets([ANN], Action="sts:TagSession")], None),
        ([lets([ANN], Condition={"StringEquals": {"sts:ExternalId": "x"}})], None),
        ([lets([ANN]), lets([ROOT], Effect="Deny")], None),
        ([lets([ANN]), lets("*", Effect="Deny")], None),
        ([lets([ANN]), lets([OTHERS], Effect="Deny")], "principal"),
        ([lets([ROOT]), lets([ANN], Effect="Deny", Condition={"Bool": {}})], None),
    ],
)
def test_trust_policies(statements: list[dict[str, Any]], expected: str | None) -> None:
    trust = {"Version": "2012-10-17", "Statement": statements}
    assert trusts(check_trust(trust), caller()) == expected


def test_a_session_of_a_role_is_named_by_its_role_or_its_own_arn() -> None:
    session = Caller("000000000000", "assumed-role/tuner/work", ())
    for arn, expected in (
        ("arn:aws:iam::000000000000:role/tuner", "principal"),
        ("arn:aws:sts::000000000000:assumed-role/tuner/work", "principal"),
        ("arn:aws:sts::000000000000:assumed-role/tuner/other", None),
        ("arn:aws:iam::000000000000:role/work", None),
        ("arn:aws:iam::000000000000:user/tuner", None),
        (ROOT, "account"),
    ):
        assert trusts(check_trust({"Statement": lets([arn])}), session) == expected, arn
