"""STS as scripts use it: unmodified clients, temporary credentials on every face, and their end."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import subprocess
import sys
import time
import urllib.request
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import boto3
import openai
import pytest
from botocore import UNSIGNED
from botocore.auth import SigV4Auth, SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.config import Config
from botocore.credentials import Credentials
from botocore.exceptions import ClientError
from luthier_server import BASE, KEYS, ONE, OTHER, Served, home_with_tiny, until
from shifted_clock import shifted
from signing import clock
from sqlalchemy.orm import Session

from luthier.files import write_json
from luthier.store import accounts, principals
from luthier.store.database import Database

AWS = Path(sys.executable).with_name("aws")
NAMESPACE = "{https://sts.amazonaws.com/doc/2011-06-15/}"
ADMIN, GUEST = KEYS[ONE], KEYS[OTHER]
TALK: dict[str, Any] = {
    "modelId": BASE, "messages": [{"role": "user", "content": [{"text": "number 3?"}]}],
    "inferenceConfig": {"maxTokens": 4, "temperature": 0.0},
}  # fmt: skip


def document(*statements: tuple[str, str, str]) -> dict[str, Any]:
    named = [dict(zip(("Effect", "Action", "Resource"), each, strict=True)) for each in statements]
    return {"Version": "2012-10-17", "Statement": named}


def trust(*principals: str) -> dict[str, Any]:
    allow = {"Effect": "Allow", "Action": "sts:AssumeRole", "Principal": {"AWS": list(principals)}}
    return {"Version": "2012-10-17", "Statement": [allow]}


ALL = document(("Allow", "*", "*"))
HOME = f"arn:aws:iam::{ONE}:root"
READER = document(
    ("Allow", "s3:Get*", "*"), ("Allow", "bedrock:*", "*"), ("Allow", "luthier:openai.*", "*")
)
ROLES: list[dict[str, Any]] = [
    {"account": ONE, "name": "reader", "trust": trust(HOME, f"arn:aws:iam::{OTHER}:root"),
     "policies": [READER], "max_session_seconds": 7200},
    {"account": ONE, "name": "all", "trust": trust(HOME), "policies": [ALL],
     "max_session_seconds": 43200},
    {"account": ONE, "name": "for-bob", "trust": trust(f"arn:aws:iam::{ONE}:user/bob"),
     "policies": [ALL]},
    {"account": ONE, "name": "after-all", "trust": trust(f"arn:aws:iam::{ONE}:role/all"),
     "policies": [READER], "max_session_seconds": 43200},
    {"account": OTHER, "name": "theirs", "trust": trust(GUEST["account"]), "policies": [ALL]},
]  # fmt: skip
BOB = {
    "account": ONE, "user": "bob", "access_key_id": "AKIATESTBOB",
    "secret_access_key": "secret-bob-0123456789abcdef",
    "policies": [document(("Deny", "sts:GetCallerIdentity", "*"), ("Allow", "s3:*", "*"))],
}  # fmt: skip
EVE = {
    **BOB, "user": "eve", "access_key_id": "AKIATESTEVE",
    "policies": [document(("Allow", "*", "*"), ("Deny", "sts:AssumeRole", "*/for-*"))],
}  # fmt: skip


def home(folder: Path, model_folder: Path) -> Path:
    made = home_with_tiny(folder, model_folder)
    people = [ADMIN, GUEST, BOB, EVE]
    write_json(made / "bootstrap.json", {"principals": people, "roles": ROLES})
    return made


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Iterator[Served]:
    made = Served(home(tmp_path_factory.mktemp("service"), tiny_model_folder))
    made.start("--no-workers")
    made.client("s3").create_bucket(Bucket="data")
    made.client("s3").put_object(Bucket="data", Key="rows", Body=b"rows of data")
    yield made
    made.end()


Keys = dict[str, str]
"""As boto3 takes them."""


def keys_of(entry: dict[str, Any]) -> Keys:
    """Of a principal of the bootstrap file, or of an answer's ``Credentials``."""
    if "SessionToken" in entry:
        return {"aws_access_key_id": entry["AccessKeyId"], "aws_session_token": entry["SessionToken"],
                "aws_secret_access_key": entry["SecretAccessKey"]}  # fmt: skip
    names = "access_key_id", "secret_access_key"
    return {f"aws_{name}": entry[name] for name in names}


SESSION = boto3.Session()
"""Reads each service model once."""


def client(server: Served, service: str, keys: Keys, **settings: Any) -> Any:
    # What the client itself would refuse is for the server to refuse, too.
    config = Config(retries={"total_max_attempts": 1}, parameter_validation=False, **settings)
    return SESSION.client(
        service, endpoint_url=server.url, region_name="us-east-1", config=config, **keys
    )


def assumed(server: Served, role: str, keys: Keys | None = None, **more: Any) -> dict[str, Any]:
    sts = client(server, "sts", keys or keys_of(ADMIN))
    account = more.pop("account", ONE)
    arn = f"arn:aws:iam::{account}:role/{role}"
    found: dict[str, Any] = sts.assume_role(RoleArn=arn, RoleSessionName="work", **more)
    return found


def code(call: Callable[..., Any], **arguments: Any) -> str:
    with pytest.raises(ClientError) as refused:
        call(**arguments)
    return str(refused.value.response["Error"]["Code"])


# --- who asks


def test_an_endpoint_alone_is_enough(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    found = boto3.Session(**keys_of(ADMIN)).client("sts").get_caller_identity()
    assert (found["Account"], found["Arn"]) == (ONE, f"arn:aws:iam::{ONE}:user/user-0")
    assert found["UserId"].startswith("AIDA") and len(found["UserId"]) == 21


def test_nobody_can_be_denied_to_ask_who_he_is(server: Served) -> None:
    found = client(server, "sts", keys_of(BOB)).get_caller_identity()
    assert found["Arn"] == f"arn:aws:iam::{ONE}:user/bob"
    nothing = json.dumps(document(("Deny", "*", "*")))
    session = keys_of(assumed(server, "all", Policy=nothing)["Credentials"])
    found = client(server, "sts", session).get_caller_identity()
    assert found["Arn"] == f"arn:aws:sts::{ONE}:assumed-role/all/work"
    assert found["UserId"].startswith("AROA") and found["UserId"].endswith(":work")


def plain(
    server: Served, method: str = "POST", *, presign: bool = False, path: str = "/",
    entry: dict[str, Any] = ADMIN, **form: str,
) -> tuple[int, ElementTree.Element]:  # fmt: skip
    """A request as any signer makes it, and the document of its answer."""
    text = urlencode({"Version": "2011-06-15", **form})
    url = f"{server.url}{path}" + (f"?{text}" if method == "GET" else "")
    kind = {"Content-Type": "application/x-www-form-urlencoded"}
    request = AWSRequest(method, url, kind, text.encode() if method == "POST" else b"")
    credentials = Credentials(entry["access_key_id"], entry["secret_access_key"])
    (SigV4QueryAuth if presign else SigV4Auth)(credentials, "sts", "us-east-1").add_auth(request)
    prepared = request.prepare()
    target = prepared.url.removeprefix(server.url)
    status, body = send(server, method, target, prepared.body or b"", dict(prepared.headers))
    return status, ElementTree.fromstring(body)


def send(
    server: Served, method: str, target: str, body: bytes, headers: dict[str, Any]
) -> tuple[int, bytes]:
    with closing(http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=30)) as to:
        to.request(method, target, body, headers)
        answer = to.getresponse()
        return answer.status, answer.read()


def test_the_query_protocol(server: Served) -> None:
    for method, presign in (("POST", False), ("GET", False), ("GET", True)):
        status, root = plain(server, method, presign=presign, Action="GetCallerIdentity")
        assert (status, root.tag) == (200, f"{NAMESPACE}GetCallerIdentityResponse")
        assert root.findtext(f"{NAMESPACE}GetCallerIdentityResult/{NAMESPACE}Account") == ONE
        assert len(root.findtext(f"{NAMESPACE}ResponseMetadata/{NAMESPACE}RequestId") or "") == 36


def test_unknown_actions_are_refused_in_xml(server: Served) -> None:
    for form in (
        {"Action": "CreateUser"}, {"Action": ""}, {"Action": "<&>"}, {},
        {"Action": "GetFederationToken", "Name": "xy"},
        {"Action": "GetCallerIdentity", "Version": "2010-05-08"},
    ):  # fmt: skip
        status, root = plain(server, **form)
        error = root.find(f"{NAMESPACE}Error")
        assert (status, root.tag) == (400, f"{NAMESPACE}ErrorResponse") and error is not None
        values = [error.findtext(f"{NAMESPACE}{name}") for name in ("Type", "Code")]
        assert values == ["Sender", "InvalidAction"]
    status, _ = plain(server, "PUT", Action="GetCallerIdentity")
    assert status == 400


def test_who_does_not_sign_reads_the_refusal(server: Served) -> None:
    unsigned = Config(signature_version=UNSIGNED, retries={"max_attempts": 0})
    sts = boto3.client("sts", endpoint_url=server.url, region_name="us-east-1", config=unsigned)
    calls: list[Callable[[], Any]] = [
        sts.get_caller_identity,
        lambda: sts.assume_role_with_web_identity(
            RoleArn=f"arn:aws:iam::{ONE}:role/all", RoleSessionName="xx", WebIdentityToken="a" * 9
        ),
    ]
    for call in calls:
        with pytest.raises(ClientError) as refused:
            call()
        assert refused.value.response["Error"]["Code"] == "MissingAuthenticationToken"


def test_forms_that_are_none(server: Served) -> None:
    twice = [("Action", "GetCallerIdentity"), ("Action", "AssumeRole")]
    for body in (urlencode(twice).encode(), b"Action=\xff", b"Action=%ff"):
        request = AWSRequest("POST", f"{server.url}/", {}, body)
        credentials = Credentials(ADMIN["access_key_id"], ADMIN["secret_access_key"])
        SigV4Auth(credentials, "sts", "us-east-1").add_auth(request)
        status, answer = send(server, "POST", "/", body, dict(request.headers.items()))
        assert (status, b"MalformedQueryString" in answer) == (400, True)
    assert plain(server, Action="GetCallerIdentity", Padding="x" * 70_000)[0] == 413


def test_who_is_not_let_in_hears_it_in_xml(server: Served) -> None:
    def asked(**keys: str) -> str:
        return code(client(server, "sts", {**keys_of(ADMIN), **keys}).get_caller_identity)

    assert asked(aws_secret_access_key="guessed") == "SignatureDoesNotMatch"
    assert asked(aws_access_key_id="AKIANOBODY") == "InvalidClientTokenId"
    assert asked(aws_session_token="nonsense") == "InvalidClientTokenId"
    # An API key that says it were of STS is none the less no signature.
    key = f"Bearer {ADMIN['api_key']}, Credential=a/b/c/sts/d"
    status, body = send(server, "POST", "/", b"Action=GetCallerIdentity", {"Authorization": key})
    assert (status, b"ErrorResponse" in body) == (403, True)
    for shown in (f"Bearer {ADMIN['api_key']}", "Basic x"):
        status, _ = send(server, "POST", "/", b"Action=GetCallerIdentity", {"Authorization": shown})
        assert 400 <= status < 500


# --- sessions on every face


def use_everywhere(server: Served, keys: Keys) -> None:
    """Reads objects and talks to a model by each way there is to sign."""
    s3 = client(server, "s3", keys, signature_version="s3v4")
    assert s3.get_object(Bucket="data", Key="rows")["Body"].read() == b"rows of data"
    url = s3.generate_presigned_url("get_object", {"Bucket": "data", "Key": "rows"})
    assert "X-Amz-Security-Token" in url
    with urllib.request.urlopen(url, timeout=30) as answer:
        assert answer.read() == b"rows of data"
    client(server, "bedrock", keys).list_foundation_models()
    answered = client(server, "bedrock-runtime", keys).converse(**TALK)
    text = answered["output"]["message"]["content"][0]["text"]
    asked = {"model": BASE, "messages": [{"role": "user", "content": "number 3?"}],
             "max_tokens": 4, "temperature": 0}  # fmt: skip
    with openai_clients(server, keys) as clients:
        for each in clients:
            answer = each.chat.completions.create(**asked)
            assert answer.choices[0].message.content == text


@contextmanager
def openai_clients(server: Served, keys: Keys) -> Iterator[tuple[openai.OpenAI, openai.OpenAI]]:
    """One that signs, and one that shows a short-term key."""
    key = short_term_key(keys)
    with (
        openai.BedrockOpenAI(
            base_url=f"{server.url}/openai/v1", aws_region="us-east-1", max_retries=0, **keys
        ) as signing,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0) as showing,
    ):
        yield signing, showing


def short_term_key(keys: Keys, seconds: int = 3600) -> str:
    """As Amazon's token generator makes it."""
    host = "bedrock.amazonaws.com"
    request = AWSRequest("POST", f"https://{host}/?Action=CallWithBearerToken", {"host": host})
    credentials = Credentials(*keys.values())
    if "aws_session_token" in keys:
        credentials = Credentials(
            keys["aws_access_key_id"], keys["aws_secret_access_key"], keys["aws_session_token"]
        )
    SigV4QueryAuth(credentials, "bedrock", "us-east-1", expires=seconds).add_auth(request)
    text = f"{request.url.removeprefix('https://')}&Version=1"
    return "bedrock-api-key-" + base64.b64encode(text.encode()).decode()


def test_a_session_token_does_what_its_user_may(server: Served) -> None:
    got = client(server, "sts", keys_of(ADMIN)).get_session_token(DurationSeconds=900)
    credentials = got["Credentials"]
    assert credentials["AccessKeyId"].startswith("ASIA") and len(credentials["AccessKeyId"]) == 20
    assert len(credentials["SecretAccessKey"]) == 40 and len(credentials["SessionToken"]) < 1024
    left = credentials["Expiration"] - datetime.now(UTC)
    assert timedelta(seconds=880) < left <= timedelta(seconds=900)
    keys = keys_of(credentials)
    use_everywhere(server, keys)
    sts = client(server, "sts", keys)
    assert sts.get_caller_identity()["Arn"] == f"arn:aws:iam::{ONE}:user/user-0"
    assert code(sts.get_session_token) == "AccessDenied"
    # It goes beyond a role's hour: the session that is left behind is a user's.
    assumed(server, "all", keys, DurationSeconds=43200)


def test_an_upload_in_signed_chunks_and_parts(server: Served) -> None:
    keys = keys_of(assumed(server, "all")["Credentials"])
    s3 = client(server, "s3", keys, request_checksum_calculation="when_supported")
    s3.put_object(Bucket="data", Key="streamed", Body=io.BytesIO(b"x" * 300_000))
    upload = s3.create_multipart_upload(Bucket="data", Key="parts")["UploadId"]
    named = {"Bucket": "data", "Key": "parts", "UploadId": upload}
    part = s3.upload_part(**named, PartNumber=1, Body=b"y" * 100)["ETag"]
    parts = {"Parts": [{"ETag": part, "PartNumber": 1}]}
    s3.complete_multipart_upload(**named, MultipartUpload=parts)
    assert s3.head_object(Bucket="data", Key="streamed")["ContentLength"] == 300_000


def test_a_role_has_policies_of_its_own(server: Served) -> None:
    found = assumed(server, "reader", DurationSeconds=7200)
    assert found["AssumedRoleUser"]["Arn"] == f"arn:aws:sts::{ONE}:assumed-role/reader/work"
    assert found["AssumedRoleUser"]["AssumedRoleId"].endswith(":work")
    assert "PackedPolicySize" not in found
    keys = keys_of(found["Credentials"])
    use_everywhere(server, keys)
    s3 = client(server, "s3", keys)
    with pytest.raises(ClientError, match="assumed-role/reader/work is not authorized"):
        s3.put_object(Bucket="data", Key="other", Body=b"")


def test_a_session_policy_narrows_and_never_widens(server: Served) -> None:
    policy = document(
        ("Allow", "s3:*", "arn:aws:s3:::data/ro*"), ("Allow", "bedrock:Get*", "*"),
        ("Deny", "s3:DeleteObject", "*"),
    )  # fmt: skip
    for role, put in (("all", None), ("reader", "AccessDenied")):
        found = assumed(server, role, Policy=json.dumps(policy))
        assert 0 < found["PackedPolicySize"] <= 100
        keys = keys_of(found["Credentials"])
        s3 = client(server, "s3", keys)
        assert s3.get_object(Bucket="data", Key="rows")["Body"].read() == b"rows of data"
        if put is None:
            s3.put_object(Bucket="data", Key="robots", Body=b"")
        else:
            assert code(s3.put_object, Bucket="data", Key="robots", Body=b"") == put
        assert code(s3.get_object, Bucket="data", Key="other") == "AccessDenied"
        assert code(s3.delete_object, Bucket="data", Key="rows") == "AccessDenied"
        bedrock = client(server, "bedrock", keys)
        bedrock.get_foundation_model(modelIdentifier=BASE)
        with pytest.raises(ClientError, match="no session policy allows"):
            bedrock.list_foundation_models()
        # Bearer keys need their own Allow, here too.
        refused = pytest.raises(openai.PermissionDeniedError, match="session policy")
        with openai_clients(server, keys) as (_, narrow), refused:
            narrow.models.list()


@pytest.mark.parametrize("denied", ["luthier:openai.chat.*", "s3:DeleteObject"])
def test_a_batch_is_answered_within_the_policy_of_its_session(server: Served, denied: str) -> None:
    policy = document(("Allow", "*", "*"), ("Deny", denied, "*"))
    keys = keys_of(assumed(server, "all", Policy=json.dumps(policy))["Credentials"])
    asked = {"model": BASE, "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    row = {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": asked}
    with openai_clients(server, keys) as (_, showing):
        file = showing.files.create(file=("rows.jsonl", json.dumps(row).encode()), purpose="batch")
        made = showing.batches.create(
            input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
        )
        until(lambda: showing.batches.retrieve(made.id).status == "completed")
        ended = showing.batches.retrieve(made.id)
        wanted = ended.error_file_id if "chat" in denied else ended.output_file_id
        body = json.loads(showing.files.content(wanted or "none").read())["response"]
    assert body["status_code"] == (403 if "chat" in denied else 200)
    if "chat" in denied:
        assert "assumed-role/all/work" in json.dumps(body) and "session policy" in json.dumps(body)


def test_what_assume_role_does_not_take(server: Served) -> None:
    wrong: list[tuple[dict[str, Any], str, str]] = [
        ({"DurationSeconds": 899}, "ValidationError", "greater than or equal to 900"),
        ({"DurationSeconds": 43201}, "ValidationError", "less than or equal to 43200"),
        ({"DurationSeconds": 7201}, "ValidationError", "MaxSessionDuration"),
        ({"RoleSessionName": "a b"}, "ValidationError", "regular expression"),
        ({"RoleSessionName": "x"}, "ValidationError", "greater than or equal to 2"),
        ({"RoleSessionName": "../../all/x"}, "ValidationError", "regular expression"),
        ({"RoleArn": "arn:aws:iam::1"}, "ValidationError", "RoleArn"),
        ({"Policy": "{"}, "MalformedPolicyDocument", "not JSON"),
        ({"Policy": "[" * 2000}, "MalformedPolicyDocument", "not JSON"),
        ({"Policy": json.dumps(trust(HOME))}, "MalformedPolicyDocument", "Principal"),
        ({"Policy": json.dumps(ALL) + " " * 2048}, "ValidationError", "2048"),
        ({"PolicyArns": [{"arn": "arn:aws:iam::aws:policy/ReadOnlyAccess"}]}, "ValidationError",
         "managed policies"),
        ({"Tags": [{"Key": "a", "Value": "b"}]}, "ValidationError", "Tags"),
        ({"SourceIdentity": "me"}, "ValidationError", "SourceIdentity"),
        ({"SerialNumber": "GAHT12345678", "TokenCode": "123456"}, "ValidationError", "MFA"),
    ]  # fmt: skip
    sts = client(server, "sts", keys_of(ADMIN))
    good = {"RoleArn": f"arn:aws:iam::{ONE}:role/reader", "RoleSessionName": "work"}
    for change, name, word in wrong:
        with pytest.raises(ClientError, match=word) as refused:
            sts.assume_role(**{**good, **change})
        assert refused.value.response["Error"]["Code"] == name, change
    sts.assume_role(**good, ExternalId="anything")  # as with AWS where no condition asks for one
    for seconds in (899, 129_601):
        assert code(sts.get_session_token, DurationSeconds=seconds) == "ValidationError"
    assert plain(server, Action="GetSessionToken", DurationSeconds="9" * 5000)[0] == 400


def test_the_longest_policy_has_room_in_a_token(server: Served) -> None:
    actions = [f"s3:Get{n:04}{'x' * (n % 7)}" for n in range(119)]
    policy = json.dumps(document(("Allow", "s3:Get*", "*")) | {"Id": ""}, separators=(",", ":"))
    policy = policy.replace('"s3:Get*"', json.dumps(["s3:Get*", *actions], separators=(",", ":")))
    policy += " " * (2048 - len(policy))
    found = assumed(server, "all", Policy=policy)
    assert len(found["Credentials"]["SessionToken"]) <= 4096
    s3 = client(server, "s3", keys_of(found["Credentials"]))
    assert s3.get_object(Bucket="data", Key="rows")["Body"].read() == b"rows of data"


# --- who may assume what


def test_trust_and_permission(server: Served) -> None:
    def tries(keys: Keys, role: str, account: str = ONE) -> str:
        try:
            assumed(server, role, keys, account=account)
            return "ok"
        except ClientError as refused:
            return str(refused.response["Error"]["Code"])

    admin, bob, eve, guest = (keys_of(each) for each in (ADMIN, BOB, EVE, GUEST))
    assert tries(admin, "reader") == "ok"
    # The account is trusted, and bob's own policies do not let him.
    assert tries(bob, "reader") == "AccessDenied"
    # Named himself, he needs no other Allow; others of the account are not named.
    assert [tries(each, "for-bob") for each in (bob, admin)] == ["ok", "AccessDenied"]
    # An explicit Deny wins.
    assert tries(eve, "for-bob") == "AccessDenied"
    # Another account is let in where the role names it, and only there.
    assert [tries(guest, role) for role in ("reader", "all")] == ["ok", "AccessDenied"]
    assert tries(admin, "theirs", OTHER) == "AccessDenied"
    assert tries(guest, "theirs", OTHER) == "ok"
    theirs = assumed(server, "reader", guest)["Credentials"]
    s3 = client(server, "s3", keys_of(theirs))
    assert s3.get_object(Bucket="data", Key="rows")["Body"].read() == b"rows of data"


def test_roles_that_are_not_there_look_like_those_that_trust_nobody(server: Served) -> None:
    answer = set()
    for role in ("for-bob", "nothing", "../all", "all/x"):
        with pytest.raises(ClientError) as refused:
            assumed(server, role)
        answer.add(str(refused.value).replace(role, "ROLE"))
    assert len(answer) == 1, answer


def test_chained_roles_last_an_hour(server: Served) -> None:
    first = keys_of(assumed(server, "all", DurationSeconds=43200)["Credentials"])
    with pytest.raises(ClientError, match="role chaining"):
        assumed(server, "after-all", first, DurationSeconds=3601)
    found = assumed(server, "after-all", first)["Credentials"]
    assert found["Expiration"] - datetime.now(UTC) <= timedelta(hours=1)
    assert code(client(server, "s3", keys_of(found)).list_buckets) == "AccessDenied"
    assert code(client(server, "sts", first).get_session_token) == "AccessDenied"
    # The policy of the first session binds what it may assume.
    policy = json.dumps(document(("Allow", "s3:*", "*")))
    bound = keys_of(assumed(server, "all", Policy=policy)["Credentials"])
    assert code(lambda: assumed(server, "after-all", bound)) == "AccessDenied"


# --- what proves nothing, and the end


def test_tokens_that_prove_nothing(server: Served) -> None:
    one = keys_of(assumed(server, "all")["Credentials"])
    other = keys_of(assumed(server, "all")["Credentials"])
    token = one["aws_session_token"]
    middle = len(token) // 2
    flipped = token[:middle] + ("A" if token[middle] != "A" else "B") + token[middle + 1 :]
    forged = [
        {**one, "aws_session_token": flipped},
        {**one, "aws_session_token": token[:-4]},
        {**one, "aws_session_token": "A" * 5000},
        {**one, "aws_session_token": "not base64!"},
        {**one, "aws_session_token": other["aws_session_token"]},
        {**other, "aws_session_token": token},
        {**keys_of(ADMIN), "aws_session_token": token},
        {name: value for name, value in one.items() if name != "aws_session_token"},
    ]
    for keys in forged:
        assert code(client(server, "bedrock", keys).list_foundation_models) == (
            "UnrecognizedClientException"
        )
        assert code(client(server, "s3", keys).list_buckets) == "InvalidAccessKeyId"
        assert code(client(server, "sts", keys).get_caller_identity) == "InvalidClientTokenId"
        with openai_clients(server, keys) as (_, showing):
            assert outcome(showing.models.list) == ("invalid_api_key", 401)
    wrong = {**one, "aws_secret_access_key": other["aws_secret_access_key"]}
    assert code(client(server, "sts", wrong).get_caller_identity) == "SignatureDoesNotMatch"


def test_a_token_that_is_not_signed(server: Served) -> None:
    keys = keys_of(assumed(server, "all")["Credentials"])
    request = AWSRequest("GET", f"{server.url}/foundation-models", {})
    pair = keys["aws_access_key_id"], keys["aws_secret_access_key"]
    SigV4Auth(Credentials(*pair), "bedrock", "us-east-1").add_auth(request)
    request.headers["X-Amz-Security-Token"] = keys["aws_session_token"]
    status, body = send(server, "GET", "/foundation-models", b"", dict(request.headers.items()))
    assert (status, b"x-amz-security-token has to be signed" in body) == (403, True)


def works(sts: Any) -> bool:
    try:
        sts.get_caller_identity()
        return True
    except ClientError as refused:
        assert refused.response["Error"]["Code"] == "InvalidClientTokenId"
        return False


@pytest.mark.slow
def test_sessions_end_with_what_they_stand_on(tmp_path: Path, tiny_model_folder: Path) -> None:
    """Another process disables and removes; the server has noticed a second later."""
    server = Served(home(tmp_path / "service", tiny_model_folder))
    server.start("--no-workers")
    guest = keys_of(GUEST)
    own = keys_of(client(server, "sts", guest).get_session_token()["Credentials"])
    role = keys_of(assumed(server, "reader", guest)["Credentials"])
    first = keys_of(assumed(server, "all")["Credentials"])
    chained = keys_of(assumed(server, "after-all", first)["Credentials"])
    clients = [client(server, "sts", keys) for keys in (own, role, first, chained)]
    database = Database(f"sqlite:///{server.home / 'luthier.db'}")

    def after(change: Callable[[Session], Any]) -> list[bool]:
        with database.write() as session:
            change(session)
        time.sleep(accounts.FRESH_SECONDS + 0.1)
        return [works(each) for each in clients]

    def user(disabled: bool) -> Callable[[Session], Any]:
        return lambda s: principals.disable_user(
            s, principals.user_of(s, OTHER, "user-1"), disabled
        )

    def key(disabled: bool) -> Callable[[Session], Any]:
        identifier = GUEST["access_key_id"]
        return lambda s: principals.disable_key(s, principals.key_of(s, identifier), disabled)

    def account(name: str) -> Callable[[bool], Callable[[Session], Any]]:
        return lambda disabled: lambda s: accounts.disable_account(s, name, disabled)

    guests, both = [False, False, True, True], [True] * 4
    assert after(lambda s: None) == both
    for switch in (user, key, account(OTHER)):
        assert [after(switch(True)), after(switch(False))] == [guests, both]
    # Whose role it is, is asked too; and with the first role of a chain the second ends.
    assert after(account(ONE)(True)) == [True, False, False, False]
    assert after(account(ONE)(False)) == both
    gone = after(lambda s: principals.remove_role(s, principals.role_of(s, ONE, "all")))
    assert gone == [True, True, False, False]
    database.close()
    server.end()


def outcome(call: Callable[[], Any]) -> tuple[str, int]:
    """Code and status."""
    try:
        call()
    except ClientError as refused:
        answer = refused.response
        return str(answer["Error"]["Code"]), answer["ResponseMetadata"]["HTTPStatusCode"]
    except openai.APIStatusError as refused:
        return str(refused.code), refused.status_code
    return "ok", 200


def test_sessions_expire(tmp_path: Path, tiny_model_folder: Path) -> None:
    """The server's clock goes on by an hour, and the client's with it."""
    shift = tmp_path / "shift"
    variables = shifted(shift)
    server = Served(home(tmp_path / "service", tiny_model_folder))
    server.start("--no-workers", **variables)
    server.client("s3").create_bucket(Bucket="data")
    keys = keys_of(assumed(server, "all", DurationSeconds=900)["Credentials"])

    def told() -> list[tuple[str, int]]:
        with openai_clients(server, keys) as clients:
            return [
                outcome(call)
                for call in (
                    client(server, "sts", keys).get_caller_identity,
                    client(server, "s3", keys).list_buckets,
                    client(server, "bedrock", keys).list_foundation_models,
                    *(each.models.list for each in clients),
                )
            ]

    assert told() == [("ok", 200)] * 5
    shift.write_text("+901")
    with clock(datetime.now(UTC) + timedelta(seconds=901)):
        assert told() == [
            ("ExpiredToken", 403), ("ExpiredToken", 400), ("ExpiredTokenException", 403),
            ("expired_token", 401), ("expired_token", 401),
        ]  # fmt: skip
    server.end()


def server_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}


# --- what is written down of it, and the AWS CLI


@pytest.mark.slow
def test_the_audit_log_names_sessions(server: Served) -> None:
    client(server, "sts", keys_of(ADMIN)).get_session_token()
    keys = keys_of(assumed(server, "all")["Credentials"])
    client(server, "s3", keys).put_object(Bucket="data", Key="by-a-role", Body=b"")
    code(lambda: assumed(server, "for-bob"))
    listed = json.loads(server.command("audit", "list", "--limit", "20", "--json").stdout)
    entries = [
        (each["account"], each["user"], each["action"], each["resource"], each["outcome"])
        for each in listed["entries"]
    ]
    session = f"arn:aws:sts::{ONE}:assumed-role/all/work"
    user = f"arn:aws:iam::{ONE}:user/user-0"
    assert (ONE, "user-0", "sts:GetSessionToken", user, "ok") in entries
    assert (ONE, "user-0", "sts:AssumeRole", session, "ok") in entries
    wrote = (ONE, "assumed-role/all/work", "s3:PutObject", "arn:aws:s3:::data/by-a-role", "ok")
    assert wrote in entries
    denied = (ONE, "user-0", "sts:AssumeRole", f"arn:aws:iam::{ONE}:role/for-bob", "AccessDenied")
    assert denied in entries


@pytest.mark.skipif(not AWS.exists(), reason="awscli is not installed")
def test_the_aws_cli_and_its_profiles_with_a_role(server: Served, tmp_path: Path) -> None:
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws" / "config").write_text(
        f"[default]\nregion = us-east-1\nendpoint_url = {server.url}\n"
        f"[profile reader]\nregion = us-east-1\nendpoint_url = {server.url}\n"
        f"role_arn = arn:aws:iam::{ONE}:role/reader\nsource_profile = default\n"
        "role_session_name = by-the-cli\n"
    )
    (tmp_path / ".aws" / "credentials").write_text(
        f"[default]\naws_access_key_id = {ADMIN['access_key_id']}\n"
        f"aws_secret_access_key = {ADMIN['secret_access_key']}\n"
    )

    def aws(*arguments: str) -> Any:
        done = subprocess.run(
            [AWS, *arguments], capture_output=True, text=True, timeout=60, cwd=tmp_path,
            env={**server_environment(), "HOME": str(tmp_path), "AWS_PAGER": ""},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout) if done.stdout.startswith("{") else done.stdout

    assert aws("sts", "get-caller-identity")["Arn"] == f"arn:aws:iam::{ONE}:user/user-0"
    found = aws("sts", "get-caller-identity", "--profile", "reader")
    assert found["Arn"] == f"arn:aws:sts::{ONE}:assumed-role/reader/by-the-cli"
    aws("s3", "cp", "s3://data/rows", "rows", "--profile", "reader", "--no-progress")
    assert (tmp_path / "rows").read_bytes() == b"rows of data"
    assert aws("sts", "get-session-token", "--duration-seconds", "900")["Credentials"]
