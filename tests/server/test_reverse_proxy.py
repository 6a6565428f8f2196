"""The nginx configuration of the guide in front of ``luthier serve``, with unmodified clients."""

from __future__ import annotations

import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import httpx
import openai
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError
from luthier_server import BASE, KEYS, ONE, Served, home_with_tiny, until

GUIDE = Path(__file__).parents[2] / "docs" / "guide" / "operation.md"
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
AWS = Path(sys.executable).with_name("aws")
KEY = KEYS[ONE]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NGINX is None, reason="nginx is not installed"),
]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


def configuration(folder: Path, port: int, upstream: str, certificate: tuple[Path, Path]) -> str:
    """Return the block of the guide with the addresses of the test."""
    found = re.search(r"^```nginx\n(.*?)^```", GUIDE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    assert found is not None
    block = found[1]
    for old, new in (
        ("listen 443 ssl", f"listen 127.0.0.1:{port} ssl"),
        ("llm.example.com", "127.0.0.1"),
        ("/etc/ssl/llm.pem", str(certificate[0])),
        ("/etc/ssl/llm.key", str(certificate[1])),
        ("http://127.0.0.1:8080", upstream),
    ):
        assert block.count(old) == 1
        block = block.replace(old, new)
    paths = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = "".join(f"{name}_temp_path {folder}/{name};\n" for name in paths)
    return (
        f"user root;\ndaemon off;\npid {folder}/nginx.pid;\nerror_log {folder}/error.log;\n"
        f"events {{}}\nhttp {{\naccess_log off;\n{temporary}{block}}}\n"
    )


class Proxy:
    """nginx in front of a server, and clients of the proxy's address."""

    def __init__(self, folder: Path, upstream: str, certificate: tuple[Path, Path]) -> None:
        port = free_port()
        self.url, self.certificate = f"https://127.0.0.1:{port}", str(certificate[0])
        file = folder / "nginx.conf"
        file.write_text(configuration(folder, port, upstream, certificate), encoding="utf-8")
        assert NGINX is not None
        self.process = subprocess.Popen([NGINX, "-c", file, "-e", folder / "error.log"])
        until(self._listens, 20)

    def _listens(self) -> bool:
        assert self.process.poll() is None
        with socket.socket() as connecting:
            return connecting.connect_ex(("127.0.0.1", int(self.url.rpartition(":")[2]))) == 0

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(20)

    def client(self, service: str) -> Any:
        return boto3.client(
            service, endpoint_url=self.url, region_name="us-east-1", verify=self.certificate,
            aws_access_key_id=KEY["access_key_id"], config=Config(retries={"total_max_attempts": 1}),
            aws_secret_access_key=KEY["secret_access_key"],
        )  # fmt: skip

    def openai(self) -> openai.OpenAI:
        context = ssl.create_default_context(cafile=self.certificate)
        client = httpx.Client(verify=context)
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=KEY["api_key"], http_client=client, max_retries=0
        )


@pytest.fixture(scope="module")
def proxy(
    server: Served, tmp_path_factory: pytest.TempPathFactory, certificate: tuple[Path, Path]
) -> Iterator[Proxy]:
    made = Proxy(tmp_path_factory.mktemp("nginx"), server.url, certificate)
    yield made
    made.close()


def test_boto3_uploads_and_queries_a_model(proxy: Proxy) -> None:
    s3 = proxy.client("s3")
    s3.create_bucket(Bucket="boto")
    body, key = os.urandom(3 << 20), "é/a b+c.bin"
    s3.put_object(Bucket="boto", Key=key, Body=body)
    assert s3.get_object(Bucket="boto", Key=key)["Body"].read() == body
    models = proxy.client("bedrock").list_foundation_models()["modelSummaries"]
    assert BASE in {each["modelId"] for each in models}
    messages = [{"role": "user", "content": [{"text": "number 3?"}]}]
    streamed = proxy.client("bedrock-runtime").converse_stream(
        modelId=BASE, messages=messages, inferenceConfig={"maxTokens": 4}
    )
    assert "messageStop" in [next(iter(event)) for event in streamed["stream"]]


@pytest.mark.skipif(not AWS.exists(), reason="awscli is not installed")
def test_aws_cli_uploads_in_parts(proxy: Proxy, tmp_path: Path) -> None:
    proxy.client("s3").create_bucket(Bucket="aws-cli")
    body = os.urandom(9 << 20)
    (tmp_path / "big.bin").write_bytes(body)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    variables = {
        **kept, "HOME": str(tmp_path), "AWS_ENDPOINT_URL": proxy.url, "AWS_MAX_ATTEMPTS": "1",
        "AWS_CA_BUNDLE": proxy.certificate, "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": KEY["access_key_id"],
        "AWS_SECRET_ACCESS_KEY": KEY["secret_access_key"],
    }  # fmt: skip
    for source, target in (("big.bin", "s3://aws-cli/k"), ("s3://aws-cli/k", "back.bin")):
        command = [AWS, "s3", "cp", source, target, "--no-progress"]
        done = subprocess.run(
            command, cwd=tmp_path, env=variables, check=False, capture_output=True, text=True,
            timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "back.bin").read_bytes() == body


def test_openai_uploads_and_streams(proxy: Proxy) -> None:
    with proxy.openai() as client:
        rows = b'{"prompt": "a", "completion": "b"}\n' * 50_000
        file = client.files.create(file=("rows.jsonl", rows), purpose="fine-tune")
        assert client.files.content(file.id).read() == rows
        stream = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "number 3?"}], max_tokens=4,
            stream=True,
        )  # fmt: skip
        assert [each.choices[0].finish_reason for each in stream][-1] == "length"


def test_upload_through_an_untrusted_proxy(
    tmp_path: Path, tiny_model_folder: Path, certificate: tuple[Path, Path]
) -> None:
    server = Served(home_with_tiny(tmp_path / "service", tiny_model_folder))
    server.start("--no-workers", "--trusted-proxy", "192.0.2.1")
    proxy = Proxy(tmp_path, server.url, certificate)
    s3 = proxy.client("s3")
    s3.create_bucket(Bucket="untrusted")
    with pytest.raises(ClientError) as refused:
        s3.put_object(Bucket="untrusted", Key="k", Body=b"x")
    assert refused.value.response["Error"]["Code"] == "SignatureDoesNotMatch"
    proxy.close()
    server.end()
