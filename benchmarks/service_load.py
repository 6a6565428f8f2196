"""The service under load: reads of the control plane, a long list, many streams, and memory.

    python benchmarks/service_load.py [--rate 500] [--seconds 20] [--jobs 1000] [--streams 64]
    python benchmarks/service_load.py --only-streams [--rounds 3] [--clients] [--generate]

A server is started on an empty store. Reads are sent at a fixed rate, independent of replies:
latency counts from the scheduled time. The clients run on the same machine in a separate process.
``--clients`` uses boto3 and openai, one thread per stream, in four processes; otherwise streams are
read from plain sockets, which costs almost no time.
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
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil

KEY = "sk-benchmark-0123456789abcdef0123456789abcdef"
NEIGHBOUR_KEY = "sk-neighbour-0123456789abcdef0123456789abcdef"
ACCOUNT, NEIGHBOUR = "000000000000", "111111111111"
BASE = "smollm2-135m-instruct"
MODEL = f"huggingfacetb.{BASE}"
PROMPT, TOKENS = "Write about the sea.", 64
SECRET = "benchmark-secret-0123456789"
CROWDS = 4
"""Processes of clients."""
Heard = tuple[bool, float, int]
"""Result of a stream: complete or not, seconds until the first text, and the number of tokens."""


class Connection:
    """A persistent HTTP/1.1 connection."""

    def __init__(self, port: int, key: str = KEY) -> None:
        self.port, self.key = port, key
        self.reader: asyncio.StreamReader | None = None
        self.writer: asyncio.StreamWriter | None = None

    async def ask(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        if self.writer is None:
            self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        assert self.reader is not None
        head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {self.key}\r\n"
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
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {self.key}\r\n"
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
    parser.add_argument("--rounds", type=int, default=3, help="of streams, on each API")
    parser.add_argument("--only-streams", action="store_true")
    parser.add_argument("--clients", action="store_true", help="stream by boto3 and openai")
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


def start(home: Path, workers: bool = False) -> tuple[subprocess.Popen[str], int]:
    """Start a server with two accounts; without workers the queue keeps its length."""
    principals = [
        {
            "account": account, "user": "root", "access_key_id": access_key,
            "secret_access_key": SECRET, "api_key": key, "role": "administrator",
        }
        for account, access_key, key in (
            (ACCOUNT, "AKIABENCHMARK0000000", KEY),
            (NEIGHBOUR, "AKIANEIGHBOUR0000000", NEIGHBOUR_KEY),
        )
    ]  # fmt: skip
    file = home / "bootstrap.json"
    file.write_text(json.dumps({"principals": principals}))
    environment = {**os.environ, "LUTHIER_HOME": str(home), "LUTHIER_BOOTSTRAP": str(file)}
    command = [sys.executable, "-m", "luthier", "serve", "--port", "0"]
    process = subprocess.Popen(
        [*command, *([] if workers else ["--no-workers"])], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=(home / "server.log").open("w"),
    )  # fmt: skip
    assert process.stdout is not None
    line = process.stdout.readline()
    if "http://" not in line:
        sys.exit((home / "server.log").read_text())
    return process, int(line.rpartition(":")[2])


async def measure(asked: argparse.Namespace, port: int, server: psutil.Process) -> None:
    if asked.only_streams:
        await streams(port, asked, server)
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
        await streams(port, asked, server)


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
    client = aws("s3", one.port)
    await asyncio.to_thread(client.create_bucket, Bucket="rows")
    line = json.dumps({"prompt": "Say hello.", "completion": "Hello."}) + "\n"
    await asyncio.to_thread(
        client.put_object, Bucket="rows", Key="train.jsonl", Body=line.encode() * 100
    )


def aws(service: str, port: int) -> Any:
    """Return a boto3 client without retries, with one connection per thread."""
    import boto3
    from botocore.config import Config

    return boto3.client(
        service, endpoint_url=f"http://127.0.0.1:{port}", region_name="us-east-1",
        aws_access_key_id="AKIABENCHMARK0000000", aws_secret_access_key=SECRET,
        config=Config(max_pool_connections=256, read_timeout=600, retries={"total_max_attempts": 1}),
    )  # fmt: skip


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


CHAT: dict[str, Any] = {
    "model": MODEL, "messages": [{"role": "user", "content": PROMPT}], "max_tokens": TOKENS,
    "stream": True, "temperature": 1, "stream_options": {"include_usage": True},
}  # fmt: skip
CONVERSE: dict[str, Any] = {
    "messages": [{"role": "user", "content": [{"text": PROMPT}]}],
    "inferenceConfig": {"maxTokens": TOKENS, "temperature": 1},
}
APIS = {
    "openai": ("/v1/chat/completions", CHAT, b"[DONE]", rb'"content":\s?"[^"]',
               rb'"completion_tokens":\s?(\d+)'),
    "converse": (f"/model/{MODEL}/converse-stream", CONVERSE, b"messageStop", rb"contentBlockDelta",
                 rb'"outputTokens":\s?(\d+)'),
}  # fmt: skip


async def streams(port: int, asked: argparse.Namespace, server: psutil.Process) -> None:
    """Run the given number of concurrent clients with replies of 64 tokens, several times per API."""
    warm = time.perf_counter()
    await raw(port, "openai", 1)
    print(f"first stream, the model loaded for it: {time.perf_counter() - warm:.1f} s", flush=True)
    if not asked.clients:
        for round_ in range(asked.rounds):
            for api in APIS:
                began = time.perf_counter()
                heard = await raw(port, api, asked.streams)
                print_round(f"{api}, round {round_ + 1}", heard, began, server)
        return
    with ProcessPoolExecutor(CROWDS, get_context("spawn"), prepare, (port,)) as pool:
        for round_ in range(-1, asked.rounds):  # one before, in which they import what they need
            for name in ("openai client", "boto3"):
                each = asked.streams // CROWDS if round_ >= 0 else 1
                began = time.perf_counter()
                crowds = [pool.submit(crowd, name, each) for _ in range(CROWDS)]
                found = [crowd.result() for crowd in crowds]
                heard = [one for crowd, _ in found for one in crowd]
                seconds = sum(seconds for _, seconds in found)
                if round_ >= 0:
                    print_round(f"{name}, round {round_ + 1}", heard, began, server, seconds)


def print_round(
    name: str, heard: list[Heard], began: float, server: psutil.Process, clients: float = 0
) -> None:
    took = time.perf_counter() - began
    first = sorted(latency for _, latency, _ in heard)
    print(
        f"{name}: {len(heard)} streams, {sum(n for *_, n in heard) / took:.0f} tokens/s, "
        f"first token p50 {first[len(first) // 2]:.2f} s, last {first[-1]:.2f} s, "
        f"{sum(not whole for whole, *_ in heard)} failed; "
        + (f"clients took {clients / took:.2f} cores; " if clients else "")
        + f"memory {server.memory_info().rss / 1e6:.0f} MB",
        flush=True,
    )


async def raw(port: int, api: str, count: int) -> list[Heard]:
    """Read streams of an API from sockets."""
    path, body, end, token, counted = APIS[api]
    text = json.dumps(body).encode()
    found = await asyncio.gather(
        *(Connection(port).stream(path, text, token) for _ in range(count))
    )
    numbers = [re.findall(counted, answer) for _, _, answer in found]
    return [
        (status == 200 and end in answer, latency, int(each[-1]) if each else 0)
        for (status, latency, answer), each in zip(found, numbers, strict=True)
    ]


ASK: dict[str, Callable[[], Iterator[tuple[str, int, bool]]]] = {}
"""Streams of a client process: text, number of tokens if known, and whether the stream ended."""


def prepare(port: int) -> None:
    import openai

    runtime = aws("bedrock-runtime", port)
    client = openai.OpenAI(
        base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, max_retries=0, timeout=600
    )

    def by_openai() -> Iterator[tuple[str, int, bool]]:
        for chunk in client.chat.completions.create(**CHAT):
            choice = chunk.choices[0] if chunk.choices else None
            tokens = chunk.usage.completion_tokens if chunk.usage else 0
            yield (choice and choice.delta.content) or "", tokens, bool(tokens)

    def by_boto3() -> Iterator[tuple[str, int, bool]]:
        for event in runtime.converse_stream(modelId=MODEL, **CONVERSE)["stream"]:
            text = event.get("contentBlockDelta", {}).get("delta", {}).get("text", "")
            tokens = event.get("metadata", {}).get("usage", {}).get("outputTokens", 0)
            yield text, tokens, bool(tokens)

    ASK.update({"openai client": by_openai, "boto3": by_boto3})


def crowd(name: str, count: int) -> tuple[list[Heard], float]:
    """Return the streams of one client process, and their processor time."""

    def one(_: int) -> Heard:
        began, first, tokens, whole = time.perf_counter(), 0.0, 0, False
        try:
            for text, number, ended in ASK[name]():
                first = first or (time.perf_counter() - began if text else 0.0)
                tokens, whole = max(tokens, number), whole or ended
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
        return whole, first, tokens

    before = time.process_time()
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count))), time.process_time() - before


def generate(home: Path, count: int) -> None:
    """Generate the same prompts as one batch of transformers' ``generate``."""
    os.environ["LUTHIER_HOME"] = str(home)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from luthier.library.models import find

    folder = find(BASE).network_folder
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
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
