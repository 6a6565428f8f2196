"""Jobs whose bucket is at another endpoint, of which one request in ten fails."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from luthier_server import BASE, Served, home_with_tiny
from moto_server import KEYS, moto_client, moto_server

FILES, JOBS = 12, 3
FAULTS = ("500", "before", "within")
"""An error of the server, a connection that ends before the answer, and one that ends within it."""


class Flaky:
    """A proxy that passes on nine requests of ten."""

    def __init__(self, port: int) -> None:
        self.target, self.seen, self.failed = port, 0, 0
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self.handler())
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def fault(self) -> str | None:
        with self.lock:
            self.seen += 1
            if self.seen % 10:
                return None
            self.failed += 1
            return FAULTS[self.failed % len(FAULTS)]

    def handler(proxy) -> type[BaseHTTPRequestHandler]:  # noqa: N805
        class Handler(BaseHTTPRequestHandler):
            def passed(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                fault = proxy.fault()
                self.close_connection = True
                if fault == "before":
                    return
                status, headers, text = 500, [("Content-Length", "0")], b""
                if fault != "500":
                    # With the name that was signed.
                    inner = http.client.HTTPConnection("127.0.0.1", proxy.target, timeout=30)
                    inner.putrequest(
                        self.command, self.path, skip_host=True, skip_accept_encoding=True
                    )
                    for name, value in self.headers.items():
                        inner.putheader(name, value)
                    inner.endheaders(body)
                    answer = inner.getresponse()
                    status, headers, text = answer.status, answer.getheaders(), answer.read()
                    inner.close()
                self.send_response_only(status)
                for name, value in headers:
                    if name.lower() not in ("transfer-encoding", "connection"):
                        self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text[: len(text) // 2] if fault == "within" else text)

            do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = passed

            def log_message(self, *_: Any) -> None:
                pass

            def handle(self) -> None:
                with suppress(ConnectionError):
                    super().handle()

        return Handler


@pytest.fixture
def moto() -> Iterator[int]:
    with moto_server() as port:
        yield port


@pytest.mark.slow
def test_a_bucket_that_fails_one_request_in_ten_costs_no_job(
    moto: int, tmp_path: Path, tiny_model_folder: Path
) -> None:
    s3 = moto_client(moto)
    s3.create_bucket(Bucket="rows")
    rows = [{"prompt": f"number {n}?", "completion": f"it is {n}."} for n in range(24)]
    for number in range(FILES):
        body = "".join(json.dumps(row) + "\n" for row in rows[number * 2 : number * 2 + 2])
        s3.put_object(Bucket="rows", Key=f"in/{number:02d}.jsonl", Body=body.encode())
    proxy = Flaky(moto)
    server = Served(home_with_tiny(tmp_path / "home", tiny_model_folder))
    server.start("--s3-endpoint", proxy.url, **KEYS)
    try:
        names = [f"job-{number}" for number in range(JOBS)]
        for name in names:
            status, body = server.ask("POST", "/api/v1/jobs", {
                "name": name, "model_name": name, "base": BASE, "training": ["s3://rows/in/"],
                "output": "s3://rows/out/", "settings": {"training": {"max_steps": 4}},
            })  # fmt: skip
            assert status == 201, body
        deadline = time.monotonic() + 240
        while True:
            jobs = [server.ask("GET", f"/api/v1/jobs/{name}")[1] for name in names]
            if all(job["state"] in ("Completed", "Failed", "Stopped") for job in jobs):
                break
            assert time.monotonic() < deadline, jobs
            time.sleep(0.3)
    finally:
        server.end()
        proxy.server.shutdown()
        proxy.server.server_close()
    assert [(job["state"], job["attempts"]) for job in jobs] == [("Completed", 1)] * JOBS, jobs
    found = s3.list_objects_v2(Bucket="rows", Prefix="out/")["Contents"]
    for name in ("manifest.json", "step_wise_training_metrics.csv"):
        assert len([each for each in found if each["Key"].endswith(name) and each["Size"]]) == JOBS
    assert proxy.failed >= JOBS, (proxy.seen, proxy.failed)
