"""A local server with the Hugging Face hub's download API."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def hub_server(repository: str, folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield the address and the list of served paths of one repository."""
    given: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Print nothing."""

        def reply(self, body: bytes, status: int = 200, **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            api, files = f"/api/models/{repository}", f"/{repository}/resolve/{COMMIT}/"
            if path in (api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
                record = {"id": repository, "modelId": repository, "sha": COMMIT, "siblings": []}
                self.reply(json.dumps(record).encode(), Content_Type="application/json")
            elif path == f"{api}/tree/{COMMIT}":
                listed = [
                    {
                        "type": "file",
                        "path": file.relative_to(folder).as_posix(),
                        "size": file.stat().st_size,
                        "oid": hashlib.sha1(file.read_bytes()).hexdigest(),
                    }
                    for file in sorted(folder.rglob("*"))
                    if file.is_file()
                ]
                self.reply(json.dumps(listed).encode(), Content_Type="application/json")
            elif path.startswith(files) and (folder / path.removeprefix(files)).is_file():
                name = path.removeprefix(files)
                body = (folder / name).read_bytes()
                if self.command == "GET":
                    given.append(name)
                etag = f'"{hashlib.sha1(body).hexdigest()}"'
                self.reply(body, ETag=etag, X_Repo_Commit=COMMIT)
            else:
                self.reply(b"{}", 404, X_Error_Code="RepoNotFound")

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", given
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
