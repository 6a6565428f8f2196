"""``luthier serve`` as a separate process, with unmodified clients, and ways to kill the process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import boto3
import psutil
from botocore.config import Config
from forked_commands import Command, forked_workers, run

from luthier.files import write_json
from luthier.models.manifest import MANIFEST
from luthier.server.tables.jobs import ENDED

BASE = "luthier.tiny"
ENCODER = "luthier.encoder"
"""Id of an embedding base model that a test adds."""
KEYS = {
    account: {
        "account": account,
        "user": f"user-{account[0]}",
        "access_key_id": f"AKIATEST{account}",
        "secret_access_key": f"secret-{account}-0123456789abcdef",
        "api_key": f"sk-{account}-0123456789abcdef0123456789abcdef",
        "role": "administrator",
    }
    for account in ("000000000000", "111111111111")
}
ONE, OTHER = KEYS


class Served:
    """A server, and clients of an account."""

    def __init__(self, home: Path, forked: bool = True) -> None:
        self.home = home
        self.forked = forked
        """True if the server is a fork with all imports. Memory figures then include shared pages."""
        self.options: list[str] = []
        """Options of ``luthier serve``."""
        self.own: dict[str, str] = {}
        """Environment variables of commands, but not of the server."""
        self.process: subprocess.Popen[str] | None = None
        self.url = ""

    def start(self, *options: str, **variables: str) -> None:
        environment = {
            **os.environ,
            "LUTHIER_HOME": str(self.home),
            "LUTHIER_BOOTSTRAP": str(self.home / "bootstrap.json"),
            "OMP_NUM_THREADS": "1",
            **variables,
        }
        environment.pop("LUTHIER_DATABASE", None)
        command = ["serve", "--port", "0", *self.options, *options]
        with (self.home / "server.log").open("a") as log:
            streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": log}
            if self.forked:
                before = forked_workers()
                self.process = Command(*command, before=before, env=environment, **streams)
            else:
                whole = [sys.executable, "-m", "luthier", *command]
                self.process = subprocess.Popen(whole, env=environment, text=True, **streams)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert "http://" in line, (self.home / "server.log").read_text()
        self.url = line.split()[-1]
        self.process.stdout.close()

    def end(self) -> None:
        """Terminate the server like a system does, if running."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            assert self.process.wait(60) == 0

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def command(self, *arguments: str, fails: bool = False) -> subprocess.CompletedProcess[str]:
        """Run ``luthier`` on the server's store."""
        done = run(
            *arguments,
            env={**os.environ, "LUTHIER_HOME": str(self.home), **self.own},
            timeout=60,
        )
        assert (done.returncode != 0) == fails, done.stdout + done.stderr
        return done

    def client(self, service: str, account: str = ONE, tries: int = 5) -> Any:
        keys = KEYS[account]
        return boto3.client(
            service, endpoint_url=self.url, region_name="us-east-1",
            aws_access_key_id=keys["access_key_id"],
            aws_secret_access_key=keys["secret_access_key"],
            config=Config(retries={"total_max_attempts": tries}),
        )  # fmt: skip

    def ask(self, method: str, path: str, body: Any = None, account: str = ONE) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}{path}", data, method=method)
        request.add_header("Authorization", f"Bearer {KEYS[account]['api_key']}")
        request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                text = answer.read()
        except HTTPError as error:
            return error.code, json.loads(error.read())
        kind = answer.headers["content-type"]
        return answer.status, json.loads(text) if "json" in kind else text.decode()

    def put_rows(self, key: str, lines: Iterable[Any]) -> bytes:
        """Put rows into the bucket ``bucket``, and return the bytes."""
        body = "".join(json.dumps(line) + "\n" for line in lines).encode()
        self.client("s3").put_object(Bucket="bucket", Key=key, Body=body)
        return body

    def ended(self, path: str) -> Any:
        """Return the work at a path of the native API after its end."""
        until(lambda: self.ask("GET", path)[1]["state"] in ENDED, 280)
        return self.ask("GET", path)[1]

    def train_mine(self, **fields: Any) -> None:
        """Train the custom model ``mine``, a LoRA adapter, on ``rows.jsonl`` in ``bucket``."""
        asked = {
            "name": "job", "model_name": "mine", "base": BASE,
            "training": ["s3://bucket/rows.jsonl"],
            "settings": {"training": {"max_steps": 2}, "adaptation": {"method": "lora", "rank": 2}},
        } | fields  # fmt: skip
        status, body = self.ask("POST", "/api/v1/jobs", asked)
        assert status == 201, body
        assert self.ended("/api/v1/jobs/job")["state"] == "Completed"

    def worker_of(self, work: str) -> int | None:
        """Return the process id of the worker of an export or measurement."""
        processes = psutil.process_iter(["cmdline"])
        return next((each.pid for each in processes if work in (each.info["cmdline"] or ())), None)


def until(wanted: Callable[[], Any], seconds: float = 120) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := wanted():
            return found
        time.sleep(0.1)
    raise AssertionError("it did not come to be in time")


def home_with_tiny(home: Path, model_folder: Path) -> Path:
    """A store in ``home`` with the base model ``tiny`` and the principals of :data:`KEYS`."""
    add_base(home, "tiny", "causal_lm", model_folder)
    write_json(home / "bootstrap.json", {"principals": list(KEYS.values())})
    return home


def add_base(home: Path, name: str, kind: str, model_folder: Path) -> None:
    """A base model of the store in ``home``."""
    base = home / "models" / "base" / name
    shutil.copytree(model_folder, base)
    manifest = {"id": name, "kind": kind, "created": "2026-01-01T00:00:00+00:00"}
    write_json(base / MANIFEST, manifest)
