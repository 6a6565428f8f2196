"""Clients that try to take a server down: ``python attacks.py NAME PORT KEYS``, a process each.

Each comes from an address of its own (127.0.0.2 and on): what one is refused for protects the server
from none of the others. Each prints one line of JSON: how often it got which answer, and the last
answer of each kind.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

SECONDS = 8
"""Of an attack at least: one that is over sooner is made again."""
LARGE = 24_000_000
SIGNATURE = (
    "AWS4-HMAC-SHA256 Credential={key}/{day}/us-east-1/bedrock/aws4_request, "
    "SignedHeaders=host;x-amz-date, Signature=" + "0" * 64
)


class Attacker:
    """Sends what is hostile, and counts what comes back."""

    def __init__(self, address: str, port: int, keys: dict[str, str]) -> None:
        self.address, self.port, self.keys = address, port, keys
        self.answers: Counter[str] = Counter()
        self.last: dict[str, str] = {}
        self.lock = threading.Lock()

    def connect(self) -> socket.socket:
        made = socket.create_connection(
            ("127.0.0.1", self.port), timeout=60, source_address=(self.address, 0)
        )
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return made

    def note(self, answer: bytes) -> None:
        status = answer.split(b" ", 2)[1].decode() if answer.startswith(b"HTTP/") else "closed"
        with self.lock:
            self.answers[status] += 1
            self.last[status] = answer.partition(b"\r\n\r\n")[2][:300].decode("utf-8", "replace")

    def send(self, head: bytes, pieces: Callable[[], Any] = tuple, seconds: float = 60) -> None:
        """One request on a connection of its own; what is answered ends it."""
        try:
            with self.connect() as connection:
                answer = b""
                try:
                    connection.sendall(head)
                    for piece in pieces():
                        connection.sendall(piece)
                except OSError:
                    pass
                connection.settimeout(seconds)
                try:
                    while piece := connection.recv(1 << 16):
                        answer += piece
                except OSError:
                    pass
                self.note(answer)
        except OSError:
            self.note(b"")

    def post(self, path: str, body: bytes, seconds: float = 60, **headers: str) -> None:
        """A request whose body is sent whole, with a valid key unless ``headers`` name another."""
        given = {"Authorization": f"Bearer {self.keys['api_key']}", **headers}
        lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in given.items())
        head = (
            f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\nConnection: close\r\n{lines}"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        self.send(head.encode(), lambda: [body], seconds)

    def together(self, work: Callable[[], None], count: int, at_once: int) -> None:
        with ThreadPoolExecutor(at_once) as pool:
            for done in [pool.submit(work) for _ in range(count)]:
                done.result()

    def signed(self, key: str) -> dict[str, str]:
        """Headers of a signature that is none."""
        moment = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        return {
            "Authorization": SIGNATURE.format(key=key, day=moment[:8]),
            "X-Amz-Date": moment,
        }

    def chat(self, content: str, **fields: Any) -> bytes:
        messages = [{"role": "user", "content": content}]
        body = {"model": self.keys["model"], "messages": messages, "max_tokens": 4, **fields}
        return json.dumps(body).encode()


def endless_headers(attacker: Attacker) -> None:
    """1.5 GB of header in all, in 8 connections."""
    piece = b"a" * (1 << 20)
    for start in (b"GET /healthz HTTP/1.1\r\nX: ", b"GET /healthz?"):
        attacker.together(lambda s=start: attacker.send(s, lambda: [piece] * 96), 8, 8)
    lines = b"".join(b"X-%d: %s\r\n" % (number, b"b" * 1000) for number in range(1000))
    attacker.together(lambda: attacker.send(b"GET / HTTP/1.1\r\n", lambda: [lines] * 100), 8, 8)


def half_heads(attacker: Attacker) -> None:
    """400 connections that never finish a head, and 100 that say nothing."""
    attacker.together(lambda: attacker.send(b"GET /healthz HTTP/1.1\r\nX-A: b\r\n"), 400, 400)
    attacker.together(lambda: attacker.send(b""), 100, 100)


def many_connections(attacker: Attacker) -> None:
    """5,000 connections one after the other, as many of them open as there may be."""
    held = []
    for _ in range(5000):
        try:
            connection = attacker.connect()
        except OSError:
            attacker.note(b"")
            continue
        connection.settimeout(0)
        held.append(connection)
    time.sleep(1)
    for connection in held:
        try:
            attacker.note(connection.recv(4096))
        except BlockingIOError:
            attacker.note(b"HTTP/1.1 open")
        except OSError:
            attacker.note(b"")
        connection.close()


def unknown_signatures(attacker: Attacker) -> None:
    """60 bodies of 24 MB at once under the access key of nobody."""
    body = b"a" * LARGE
    path = "/model/x/converse"
    attacker.together(lambda: attacker.post(path, body, **attacker.signed("AKIANOBODY")), 60, 60)


def wrong_signatures(attacker: Attacker) -> None:
    """60 bodies of 24 MB at once under an access key that is known, and a signature that is wrong."""
    body, key = b"a" * LARGE, attacker.keys["access_key_id"]
    path = f"/model/{attacker.keys['model']}/converse"
    attacker.together(lambda: attacker.post(path, body, **attacker.signed(key)), 60, 60)


def large_bodies(attacker: Attacker) -> None:
    """Chats of 24 MB that are nothing but values, or one text outside of the BMP."""
    bombs = [
        b"[" + b"[]," * 7_000_000 + b"[]]",
        b"[" + b'{"":0},' * 3_000_000 + b"1]",
        json.dumps({"a": "a" * LARGE, "b": "😀"}, ensure_ascii=False).encode(),
        b'{"a": "' + b"\\u00e9" * 3_900_000 + b'"}',
        b"[" * 20_000_000,
    ]
    for bomb in bombs:
        attacker.together(lambda b=bomb: attacker.post("/v1/chat/completions", b), 6, 6)


def sent_ahead(attacker: Attacker) -> None:
    """Requests by the ten thousand on connections whose answers nobody reads."""
    key = attacker.keys["api_key"]
    one = f"GET /v1/models HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {key}\r\n\r\n".encode()
    attacker.together(lambda: attacker.send(b"", lambda: [one * 10_000]), 40, 40)


def slow_bodies(attacker: Attacker) -> None:
    """200 bodies with a valid key that come a byte a second."""

    def drip() -> Any:
        for _ in range(30):
            time.sleep(1)
            yield b"a"

    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {LARGE}\r\n"
        f"Authorization: Bearer {attacker.keys['api_key']}\r\n\r\n"
    ).encode()
    attacker.together(lambda: attacker.send(head, drip), 200, 200)


def digits(attacker: Attacker) -> None:
    """Prompts of 12 MB of digits."""
    text = "0123456789" * 1_200_000
    attacker.together(lambda: attacker.post("/v1/chat/completions", attacker.chat(text)), 12, 6)
    raw = json.dumps({"model": attacker.keys["model"], "prompt": text, "max_tokens": 1}).encode()
    attacker.together(lambda: attacker.post("/v1/completions", raw), 6, 6)


def template_bombs(attacker: Attacker) -> None:
    """A template that names a sample of 1 MB 2,500 times."""
    grader = {
        "type": "string_check", "name": "bomb", "operation": "eq", "reference": "a",
        "input": "{{sample.output_text}}" * 2500,
    }  # fmt: skip
    body = json.dumps({"grader": grader, "model_sample": "a" * 1_000_000}).encode()
    path = "/v1/fine_tuning/alpha/graders/run"
    attacker.together(lambda: attacker.post(path, body), 8, 4)


def slow_graders(attacker: Attacker) -> None:
    """Two texts of 1 MB compared, by clients that leave at once and by clients that stay."""
    path = "/v1/fine_tuning/alpha/graders/run"
    for metric in ("fuzzy_match", "bleu", "rouge_l", "cosine", "meteor"):
        grader = {
            "type": "text_similarity", "name": "slow", "evaluation_metric": metric,
            "input": "{{sample.output_text}}", "reference": "{{item.reference}}",
        }  # fmt: skip
        item = {"reference": "ba" * 500_000}
        body = {"grader": grader, "item": item, "model_sample": "ab" * 500_000}
        text = json.dumps(body).encode()
        attacker.together(lambda t=text: attacker.post(path, t, seconds=0.2), 4, 4)
        attacker.together(lambda t=text: attacker.post(path, t), 2, 2)


def schema_bombs(attacker: Attacker) -> None:
    """Schemas that name themselves, are nested, or hold patterns that backtrack."""
    nested: dict[str, Any] = {"type": "string"}
    for _ in range(400):
        nested = {"type": "object", "properties": {"a": nested}, "required": ["a"]}
    schemas: list[Any] = [
        {"$ref": "#"},
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
        nested,
        {"type": "string", "pattern": "(" * 100_000},
        {"type": "string", "pattern": "^(a+)+$"},
        {"type": "string", "pattern": "(a{1,1000}){1,1000}"},
        {"enum": [f"{number:06d}" for number in range(100_000)]},
        {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(20_000)}},
    ]
    for schema in schemas:
        wanted = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
        body = attacker.chat("Hello", response_format=wanted)
        attacker.together(lambda b=body: attacker.post("/v1/chat/completions", b), 2, 2)


def large_grammars(attacker: Attacker) -> None:
    """Schemas of 40 characters that take 20 to 45 MB to follow, or just less than is too much."""
    for divisor in (99_991, 100_003, 100_019, 50_021, 50_023, 13_001, 12_983, 10_007, 10_009):
        schema = {"type": "integer", "multipleOf": divisor}
        wanted = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
        body = attacker.chat("Hello", response_format=wanted)
        attacker.together(lambda b=body: attacker.post("/v1/chat/completions", b), 4, 4)


def abandoned_requests(attacker: Attacker) -> None:
    """20,000 requests whose clients leave at once."""
    key = attacker.keys["api_key"]
    one = f"GET /v1/models HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {key}\r\n\r\n".encode()
    attacker.together(lambda: attacker.send(one, seconds=0.001), 20_000, 16)


def large_listings(attacker: Attacker) -> None:
    """400 files, which 40 connections list all the time."""
    parts = (("purpose", "batch"), ('file"; filename="a.jsonl', "{}"))
    form = "".join(
        f'--x\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
        for name, value in parts
    )
    body, kind = f"{form}--x--\r\n".encode(), "multipart/form-data; boundary=x"
    head = (
        f"POST /v1/files HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Type: {kind}\r\n"
        f"Authorization: Bearer {attacker.keys['api_key']}\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode()
    attacker.together(lambda: attacker.send(head, lambda: [body]), 400, 4)
    one = (
        "GET /v1/files?limit=10000 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"
        f"Authorization: Bearer {attacker.keys['api_key']}\r\n\r\n"
    ).encode()
    attacker.together(lambda: attacker.send(one), 800, 40)


def long_chats(attacker: Attacker) -> None:
    """Chats whose prompts fill the context, and answers that fill it: as many as wait at all."""
    long = attacker.chat("word " * 150, max_tokens=1)
    many = attacker.chat("Hello", max_tokens=800, n=8, temperature=1, logit_bias={"1": -100})
    attacker.together(lambda: attacker.post("/v1/chat/completions", long), 200, 60)
    attacker.together(lambda: attacker.post("/v1/chat/completions", many), 30, 30)


def many_embeddings(attacker: Attacker) -> None:
    """Requests for the vectors of 500 texts each."""
    body = json.dumps({"model": attacker.keys["encoder"], "input": ["word " * 100] * 500}).encode()
    attacker.together(lambda: attacker.post("/v1/embeddings", body), 12, 12)


ATTACKS = {
    each.__name__: each
    for each in (
        endless_headers, half_heads, many_connections, unknown_signatures, wrong_signatures,
        large_bodies, sent_ahead, slow_bodies, digits, template_bombs, slow_graders, schema_bombs,
        large_grammars, long_chats, many_embeddings, abandoned_requests, large_listings,
    )
}  # fmt: skip


def main(name: str, port: str, keys: str) -> None:
    address = f"127.0.0.{2 + list(ATTACKS).index(name)}"
    attacker = Attacker(address, int(port), json.loads(keys))
    began = time.monotonic()
    while time.monotonic() - began < SECONDS:
        ATTACKS[name](attacker)
    result = {"answers": attacker.answers, "last": attacker.last}
    print(json.dumps({**result, "seconds": round(time.monotonic() - began, 1)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
