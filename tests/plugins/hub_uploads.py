"""A local server with the Hugging Face hub's upload API."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_a_token_that_may_write"
_LARGE = (".safetensors", ".gguf", ".onnx")


@dataclass
class HubUploads:
    """Content of the hub, and received requests."""

    url: str = ""
    private: dict[str, bool] = field(default_factory=dict)
    """Visibility of each repository."""
    files: dict[str, bytes] = field(default_factory=dict)
    """Content by repository and path."""
    objects: dict[str, bytes] = field(default_factory=dict)
    """Large files by their SHA-256, committed or not."""
    commits: list[str] = field(default_factory=list)
    """Their messages."""
    puts: list[str] = field(default_factory=list)
    """SHA-256 of the uploaded large files."""
    refused: set[str] = field(default_factory=set)
    """Requests to answer with 403: ``commit``, or ``upload``, which also breaks half-way."""

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """Status and JSON."""
        asked = json.loads(body) if body.startswith(b"{") and b"\n{" not in body else {}
        if method == "POST" and path == "/api/repos/create":
            name = f"{asked['organization']}/{asked['name']}"
            self.private[name] = asked["visibility"] == "private"
            return 200, {"url": f"{self.url}/{name}"}
        if method == "POST" and path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if found := re.fullmatch(r"/upload/(\w{64})", path):
            self.puts.append(found[1])
            if "upload" in self.refused or hashlib.sha256(body).hexdigest() != found[1]:
                return 403, {"error": "the disk of this hub is full"}
            self.objects[found[1]] = body
            return 200, {}
        if path == "/verify":
            return (200 if asked["oid"] in self.objects else 404), {}
        repository = "/".join(path.removeprefix("/api/models").split("/")[1:3])
        name = repository.removesuffix(".git")
        if name not in self.private:
            return 404, {}
        if path == f"/api/models/{name}":
            return 200, {"id": name, "private": self.private[name], "sha": "0" * 40, "siblings": []}
        if path == f"/api/models/{name}/preupload/main":
            return 200, {
                "files": [
                    {
                        "path": each["path"],
                        "uploadMode": "lfs" if each["path"].endswith(_LARGE) else "regular",
                        "shouldIgnore": False,
                    }
                    for each in asked["files"]
                ]
            }
        if path == f"/{name}.git/info/lfs/objects/batch":
            return 200, {"transfer": "basic", "objects": [*map(self._actions, asked["objects"])]}
        if path == f"/api/models/{name}/commit/main":
            return self._commit(name, body)
        return 404, {}

    def _actions(self, asked: Any) -> Any:
        if asked["oid"] in self.objects:
            return asked
        actions = {
            "upload": {"href": f"{self.url}/upload/{asked['oid']}", "header": {}},
            "verify": {"href": f"{self.url}/verify", "header": {}},
        }
        return {**asked, "actions": actions}

    def _commit(self, name: str, body: bytes) -> tuple[int, Any]:
        if "commit" in self.refused:
            return 403, {"error": "you may not write to main"}
        for line in body.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                self.commits.append(value["summary"])
            elif key == "file":
                self.files[f"{name}/{value['path']}"] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                self.files[f"{name}/{value['path']}"] = self.objects[value["oid"]]
        oid = hashlib.sha1(body).hexdigest()
        url = f"{self.url}/{name}/commit/{oid}"
        return 200, {"commitUrl": url, "commitOid": oid, "pullRequestUrl": None}


@contextmanager
def hub_uploads() -> Iterator[HubUploads]:
    """An empty hub while the block runs."""
    hub = HubUploads()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Print nothing."""

        def reply(self) -> None:
            path = unquote(urlsplit(self.path).path)
            body = self.body()
            # Large files are uploaded to presigned addresses.
            known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            if known or path.startswith("/upload/"):
                status, answer = hub.answer(self.command, path, body)
            else:
                status, answer = 401, {"error": "Invalid username or password."}
            text = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            if "error" in answer and status != 200:
                self.send_header("X-Error-Message", answer["error"])
            self.end_headers()
            self.wfile.write(text)

        def body(self) -> bytes:
            if "chunked" not in self.headers.get("Transfer-Encoding", ""):
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            whole = b""
            while size := int(self.rfile.readline(), 16):
                whole += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return whole

        do_GET = do_POST = do_PUT = reply

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
