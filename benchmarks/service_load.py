"""The service under load: reads of the control plane, a long list, many streams; and its memory.

    python benchmarks/service_load.py [--rate 500] [--seconds 20] [--jobs 1000] [--streams 64]
    python benchmarks/service_load.py --only-streams [--streams 64] [--rounds 3] [--generate]

A server of its own is started on an empty store. Reads are sent at a fixed rate, whether or not earlier
ones were answered: what a request waits counts from the moment it should have been sent. The clients
run on the same machine, in a process of their own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

KEY = "sk-benchmark-0123456789abcdef0123456789abcdef"
ACCOUNT = "000000000000"
BASE = "smollm2-135m-instruct"
MODEL = f"huggingfacetb.{BASE}"
PROMPT, TOKENS = "Write about the sea.", 64


class Connection:
    """One HTTP/1.1 connection that is kept open."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.reader: asyncio.StreamReader | None = None
        self.writer: asyncio.StreamWriter | None = None

    async def ask(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        if self.writer is None:
            self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        assert self.reader is not None
        head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        self.writer.write(head.encode() + body)
        status, length, chunked = 0, 0, False
        while (line := await self.reader.readline()) != b"\r\n":
            name, _, value = line.decode("latin-1").partition(":")
            if not status:
                status = int(line.split()[1])
            elif name.lower() == "content-length":
                length = int(value)
            elif name.lower() == "transfer-encoding":
                chunked = True
        if not chunked:
            return status, await self.reader.readexactly(length)
        parts = b""
        while size := int(await self.reader.readline(), 16):
            parts += await self.reader.readexactly(size)
            await self.reader.readline()
        await self.reader.readline()
        return status, parts

    async def stream(self, path: str, body: bytes, token: bytes) -> tuple[int, float, bytes]:
        """Status, seconds until ``token`` (a pattern) is in the body, and the whole body."""
        began = time.perf_counter()
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        head += f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        self.writer.write(head.encode() + body)
        status = int((await self.reader.readuntil(b"\r\n\r\n")).split()[1])
        first = b""
        while not re.search(token, first) and (piece := await self.reader.read(1 << 16)):
            first += piece
        latency = time.perf_counter() - began
        rest = await self.reader.read(-1)
        self.writer.close()
        return status, latency, first + rest


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rate", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3, help="of streams, on each face")
    parser.add_argument("--only-streams", action="store_true")
    parser.add_argument("--generate", action="store_true", help="transformers' generate beside it")
    parser.add_argument("--models", type=Path, help="LUTHIER_HOME that has the base model")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        if asked.models:
            shutil.copytree(asked.models / "models/base" / BASE, Path(home, "models/base", BASE))
        began = time.monotonic()
        process, port = start(Path(home))
        print(f"ready after {time.monotonic() - began:.2f} s")
        try:
            asyncio.run(measure(asked, port, psutil.Process(process.pid)))
        finally:
            process.terminate()
            process.wait()
        if asked.generate:
            generate(Path(home), asked.streams)


def start(home: Path) -> tuple[subprocess.Popen[str], int]:
    """A server with one user, whose worker never starts: the queue stays as long as it is."""
    policy = {
        "Version": "2012-10-17",
        "Statement": [{"Effect": "Allow", "Action": "*", "Resource": "*"}],
    }
    principal = {
        "account": ACCOUNT, "user": "root", "access_key_id": "AKIABENCHMARK0000000",
        "secret_access_key": "benchmark-secret-0123456789", "api_key": KEY, "policies": [policy],
    }  # fmt: skip
    file = home / "bootstrap.json"
    file.write_text(json.dumps({"principals": [principal]}))
    environment = {**os.environ, "LUTHIER_HOME": str(home), "LUTHIER_BOOTSTRAP": str(file)}
    command = [sys.executable, "-m", "luthier", "serve", "--port", "0"]
    process = subprocess.Popen(
        [*command, "--no-work"], env=environment, text=True, stdout=subprocess.PIPE,
        stderr=(home / "server.log").open("w"),
    )  # fmt: skip
    assert process.stdout is not None
    line = process.stdout.readline()
    if "http://" not in line:
        sys.exit((home / "server.log").read_text())
    return process, int(line.rpartition(":")[2])


async def measure(asked: argparse.Namespace, port: int, server: psutil.Process) -> None:
    if asked.only_streams:
        await streams(port, asked.streams, asked.rounds, server)
        return
    one = Connection(port)
    names = await submit(one, asked.jobs)
    print(f"{len(names)} jobs submitted; memory {server.memory_info().rss / 1e6:.0f} MB")
    await listed(one, len(names))
    paths = [f"/model-customization-jobs/{name}" for name in names[:50]]
    paths += ["/foundation-models", "/model-customization-jobs?maxResults=10", "/custom-models"]
    for round_ in range(2):
        await reads(port, asked.rate, asked.seconds, paths, server, f"round {round_ + 1}")
    if asked.streams:
        await streams(port, asked.streams, asked.rounds, server)


async def submit(one: Connection, count: int) -> list[str]:
    status, _ = await one.ask("POST", "/v1/files", b"")  # the key is known from here on
    bucket = {"training": ["s3://rows/train.jsonl"], "base": MODEL}
    await rows(one)
    names = []
    for number in range(count):
        name = f"job-{number:04d}"
        body = json.dumps({**bucket, "name": name, "model_name": f"model-{number:04d}"}).encode()
        status, text = await one.ask("POST", "/api/v1/jobs", body)
        if status != 201:
            sys.exit(f"{status}: {text.decode()}")
        names.append(name)
    return names


async def rows(one: Connection) -> None:
    """A bucket with rows, put there by boto3 as a user would."""
    import boto3

    client = boto3.client(
        "s3", endpoint_url=f"http://127.0.0.1:{one.port}", region_name="us-east-1",
        aws_access_key_id="AKIABENCHMARK0000000",
        aws_secret_access_key="benchmark-secret-0123456789",
    )  # fmt: skip
    await asyncio.to_thread(client.create_bucket, Bucket="rows")
    line = json.dumps({"prompt": "Say hello.", "completion": "Hello."}) + "\n"
    await asyncio.to_thread(
        client.put_object, Bucket="rows", Key="train.jsonl", Body=line.encode() * 100
    )


async def listed(one: Connection, count: int) -> None:
    """Page through all jobs, as boto3's paginator does."""
    began, token, seen = time.perf_counter(), "", 0
    while True:
        path = "/model-customization-jobs?maxResults=100" + (f"&nextToken={token}" if token else "")
        _, text = await one.ask("GET", path)
        page: Mapping[str, Any] = json.loads(text)
        seen += len(page["modelCustomizationJobSummaries"])
        token = page.get("nextToken", "")
        if not token:
            break
    seconds = time.perf_counter() - began
    print(f"{seen} of {count} jobs listed in pages of 100: {seconds * 1000:.0f} ms")


async def reads(
    port: int, rate: int, seconds: float, paths: list[str], server: psutil.Process, name: str
) -> None:
    free: asyncio.Queue[Connection] = asyncio.Queue()
    for _ in range(64):
        free.put_nowait(Connection(port))
    times: list[float] = []
    bad = 0

    async def read(due: float, path: str) -> None:
        nonlocal bad
        connection = await free.get()
        status, text = await connection.ask("GET", path)
        times.append(time.perf_counter() - due)
        if status != 200:
            bad += 1
            print(f"{status} {path}: {text.decode()[:200]}")
        free.put_nowait(connection)

    cpu, began, tasks = server.cpu_times(), time.perf_counter(), []
    for number in range(int(rate * seconds)):
        due = began + number / rate
        if (wait := due - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        tasks.append(asyncio.ensure_future(read(due, random.choice(paths))))
    await asyncio.gather(*tasks)
    took = time.perf_counter() - began
    used = server.cpu_times()
    times.sort()
    p50, p99 = (times[int(len(times) * share)] * 1000 for share in (0.5, 0.99))
    print(
        f"{name}: {len(times) / took:.0f} requests/s, p50 {p50:.1f} ms, p99 {p99:.1f} ms, "
        f"max {times[-1] * 1000:.0f} ms, {bad} not 200; "
        f"{(used.user + used.system - cpu.user - cpu.system) / took:.2f} cores; "
        f"memory {server.memory_info().rss / 1e6:.0f} MB"
    )


async def streams(port: int, count: int, rounds: int, server: psutil.Process) -> None:
    """So many clients at once that read answers of 64 tokens, several times on each face."""
    chat = {
        "model": MODEL, "messages": [{"role": "user", "content": PROMPT}], "max_tokens": TOKENS,
        "stream": True, "temperature": 1, "stream_options": {"include_usage": True},
    }  # fmt: skip
    converse = {
        "messages": [{"role": "user", "content": [{"text": PROMPT}]}],
        "inferenceConfig": {"maxTokens": TOKENS, "temperature": 1},
    }
    faces = {
        "openai": ("/v1/chat/completions", chat, b"[DONE]", rb'"content":\s?"[^"]',
                   rb'"completion_tokens":\s?(\d+)'),
        "converse": (f"/model/{MODEL}/converse-stream", converse, b"messageStop", rb"contentBlockDelta",
                     rb'"outputTokens":\s?(\d+)'),
    }  # fmt: skip
    warm = time.perf_counter()
    path, body, _, token, _ = faces["openai"]
    await Connection(port).stream(path, json.dumps(body).encode(), token)
    print(f"first stream, the model loaded for it: {time.perf_counter() - warm:.1f} s", flush=True)
    for round_ in range(rounds):
        for face, (path, body, end, token, counted) in faces.items():
            text = json.dumps(body).encode()
            began = time.perf_counter()
            found = await asyncio.gather(
                *(Connection(port).stream(path, text, token) for _ in range(count))
            )
            took = time.perf_counter() - began
            bad = sum(status != 200 or end not in answer for status, _, answer in found)
            numbers = [re.findall(counted, answer) for _, _, answer in found]
            tokens = sum(int(each[-1]) for each in numbers if each)
            first = sorted(latency for _, latency, _ in found)
            print(
                f"{face}, round {round_ + 1}: {count} streams, {tokens / took:.0f} tokens/s, "
                f"first token p50 {first[count // 2]:.2f} s, last {first[-1]:.2f} s, {bad} failed; "
                f"memory {server.memory_info().rss / 1e6:.0f} MB", flush=True,
            )  # fmt: skip


def generate(home: Path, count: int) -> None:
    """The same prompts as one batch of transformers' ``generate``."""
    os.environ["LUTHIER_HOME"] = str(home)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from luthier.store.models import find

    folder = find(BASE).network_folder
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": PROMPT}]
    read = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids, mask = (read[name].repeat(count, 1) for name in ("input_ids", "attention_mask"))
    sampling = {"max_new_tokens": TOKENS, "do_sample": True, "temperature": 1.0}
    for round_ in range(3):
        began = time.perf_counter()
        with torch.no_grad():
            out = model.generate(ids, attention_mask=mask, **sampling)
        written = (out[:, ids.shape[1] :] != tokenizer.pad_token_id).sum().item()
        took = time.perf_counter() - began
        print(
            f"generate, round {round_ + 1}: batch of {count}, {written / took:.0f} tokens/s",
            flush=True,
        )


if __name__ == "__main__":
    main()
