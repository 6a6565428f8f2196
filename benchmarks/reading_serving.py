"""Classification and embeddings for many clients: the server against a transformers pipeline.

    python benchmarks/reading_serving.py ROWS.jsonl [--clients 1 8 32] [--requests 320] [--rounds 3]

A classifier is trained from all-MiniLM-L6-v2 on the first 1,000 of ROWS (``text`` and ``label``, as
Banking77). Clients send one text per request, and the next after each reply. Sides, in turns, each
in a separate process:

- ``server``: ``luthier serve`` over HTTP, with the clients in another process on the same cores;
- ``pool``: the same engine called in its process, one thread per client;
- ``pipeline``: ``transformers.pipeline`` on the same network, called by as many threads;
- ``locked``: the same behind a lock.

Prints replies per second, and p50 / p95 latency in milliseconds; ratios compare rates of one round.
The server's own time per request is one client's latency over HTTP minus its latency with ``pool``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from children import table
from service_load import Connection, aws, start

BASE, TRAINED, NAME = "all-minilm-l6-v2", 1_000, "intents"
SIDES = ("server", "pool", "pipeline", "locked")
Times = tuple[float, list[float]]
"""Total seconds, and the latency of each request."""


# A side is a process that reads lines `{"clients": …, "requests": …}` and answers with times. ---------


def threads_of(ask: Callable[[str], object], texts: Sequence[str], clients: int) -> Times:
    waited: list[float] = []

    def client(number: int) -> None:
        for text in texts[number::clients]:
            began = time.perf_counter()
            ask(text)
            waited.append(time.perf_counter() - began)

    with ThreadPoolExecutor(clients) as threads:
        began = time.perf_counter()
        list(threads.map(client, range(clients)))
        return time.perf_counter() - began, waited


async def sockets_of(port: int, path: str, bodies: Sequence[bytes], clients: int) -> Times:
    waited: list[float] = []

    async def client(number: int) -> None:
        connection = Connection(port)
        for body in bodies[number::clients]:
            began = time.perf_counter()
            status, text = await connection.ask("POST", path, body)
            if status != 200:
                sys.exit(f"{status}: {text.decode()}")
            waited.append(time.perf_counter() - began)

    began = time.perf_counter()
    await asyncio.gather(*map(client, range(clients)))
    return time.perf_counter() - began, waited


def side(name: str, model: str, embeds: bool, place: str) -> None:
    """``place`` is the folder of the network for transformers, or the server's port."""
    if name == "server":
        path = "/v1/embeddings" if embeds else f"/api/v1/models/{model}/predictions"

        def body(text: str) -> bytes:
            inputs = {"model": model, "input": text} if embeds else {"inputs": [{"text": text}]}
            return json.dumps(inputs).encode()

        def run(texts: Sequence[str], clients: int) -> Times:
            return asyncio.run(sockets_of(int(place), path, [*map(body, texts)], clients))

    else:
        ask = pool_side(model, embeds) if name == "pool" else pipeline_side(place, embeds, name)

        def run(texts: Sequence[str], clients: int) -> Times:
            return threads_of(ask, texts, clients)

    run(["Where is my card?"] * 4, 2)
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(run(asked["texts"], asked["clients"])), flush=True)


def pool_side(model: str, embeds: bool) -> Callable[[str], object]:
    from luthier.engine.machine import limit_kernels
    from luthier.inference.pool import ModelPool
    from luthier.inference.prompt_limits import tokenize_in_own_thread

    limit_kernels()
    tokenize_in_own_thread()
    pool = ModelPool()
    if embeds:
        return lambda text: pool.embed(model, [text])
    return lambda text: pool.predict(model, [text])


def pipeline_side(folder: str, embeds: bool, name: str) -> Callable[[str], object]:
    from transformers import pipeline

    from luthier.models.networks.classic import register

    register()
    task: Any = "feature-extraction" if embeds else "text-classification"
    plain: Any = pipeline(task, model=folder, device="cpu")
    lock = threading.Lock()

    def locked(text: str) -> object:
        with lock:
            return plain(text)

    return locked if name == "locked" else plain


# The run ----------------------------------------------------------------------------------------------


def begin(name: str, model: str, embeds: bool, place: str) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--side", name, model, str(int(embeds)), place]
    process = subprocess.Popen(
        command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None
    if process.stdout.readline() != "ready\n":
        sys.exit(f"{' '.join(command)} failed")
    return process


def ask(process: subprocess.Popen[str], texts: Sequence[str], clients: int) -> Times:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(json.dumps({"texts": texts, "clients": clients}) + "\n")
    process.stdin.flush()
    seconds, waited = json.loads(process.stdout.readline())
    return seconds, waited


def measure(
    what: str, sides: dict[str, subprocess.Popen[str]], texts: Sequence[str], options: Any
) -> list[list[str]]:
    lines = []
    for clients in options.clients:
        rates: dict[str, list[float]] = {name: [] for name in sides}
        waited: dict[str, list[float]] = {name: [] for name in sides}
        count = max(4 * clients, options.requests * min(clients, 8) // 8)
        for _ in range(options.rounds):
            for name, process in sides.items():
                seconds, times = ask(process, texts[:count], clients)
                rates[name].append(len(times) / seconds)
                waited[name] += times
        line = [what, str(clients)]
        for name in sides:
            ordered = sorted(waited[name])
            p50, p95 = (1000 * ordered[int(share * len(ordered))] for share in (0.5, 0.95))
            line.append(f"{statistics.median(rates[name]):,.0f}, {p50:,.0f} / {p95:,.0f}")
        for other in ("pipeline", "locked"):
            ratios = [
                " and ".join(
                    f"{statistics.median(mine / theirs for mine, theirs in pairs):.1f}x"
                    for pairs in (
                        [*zip(rates[name], rates[other], strict=True)]
                        for name in ("server", "pool")
                    )
                )
            ]
            line += ratios
        lines.append(line)
        print(line, flush=True)
    return lines


def classifier(port: int, rows: Path) -> None:
    """Train the classifier with a job of the server."""
    s3 = aws("s3", port)
    s3.create_bucket(Bucket="intents")
    lines = rows.read_text(encoding="utf-8").split("\n")
    s3.put_object(Bucket="intents", Key="train.jsonl", Body="\n".join(lines[:TRAINED]).encode())
    job = {"name": NAME, "model_name": NAME, "base": BASE, "training": ["s3://intents/train.jsonl"]}
    job["settings"] = {"training": {"max_steps": 5}}  # type: ignore[assignment]

    async def wait() -> None:
        one = Connection(port)
        status, text = await one.ask("POST", "/api/v1/jobs", json.dumps(job).encode())
        if status != 201:
            sys.exit(f"{status}: {text.decode()}")
        while True:
            _, text = await one.ask("GET", f"/api/v1/jobs/{NAME}")
            found = json.loads(text)
            if found["state"] in ("Completed", "Failed", "Stopped"):
                break
            await asyncio.sleep(1)
        if found["state"] != "Completed":
            sys.exit(text.decode())

    asyncio.run(wait())


def overhead(sides: dict[str, subprocess.Popen[str]], texts: Sequence[str], rounds: int) -> None:
    found = []
    for _ in range(rounds):
        medians = {
            name: statistics.median(ask(sides[name], texts[:100], 1)[1])
            for name in ("server", "pool")
        }
        found.append(1000 * (medians["server"] - medians["pool"]))
    print(
        f"the server's own time for a request: {statistics.median(found):.1f} ms "
        f"({', '.join(f'{each:.1f}' for each in found)})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("rows", type=Path)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=320)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    from luthier.cli.models.export import export
    from luthier.library.folders import base_folder
    from luthier.library.models import find

    find(BASE, print)
    lines = options.rows.read_text(encoding="utf-8").split("\n")[TRAINED:]
    texts = [json.loads(line)["text"] for line in lines if line][: options.requests]
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        shutil.copytree(base_folder(BASE), home / "models" / "base" / BASE)
        os.environ["LUTHIER_HOME"] = temporary
        server, port = start(home, workers=True)
        try:
            classifier(port, options.rows)
            (stored,) = [
                each for each in (home / "models").rglob("luthier.json") if "base" not in each.parts
            ]
            model = find(json.loads(stored.read_text())["id"])
            export(model, home / "plain", merged=True)
            table_lines = []
            for what, name, stored_id, folder, embeds in (
                ("classification", NAME, model.id, str(home / "plain"), False),
                ("embeddings", BASE, BASE, str(home / "models/base" / BASE), True),
            ):
                sides = {
                    each: begin(
                        each, name if each == "server" else stored_id, embeds,
                        str(port) if each == "server" else folder,
                    )
                    for each in SIDES
                }  # fmt: skip
                if not embeds:
                    overhead(sides, texts, options.rounds)
                table_lines += measure(what, sides, texts, options)
                for process in sides.values():
                    process.terminate()
                    process.wait()
        finally:
            server.terminate()
            server.wait()
    heads = ["", "clients", *(f"{name}, answers/s, ms" for name in SIDES)]
    heads += ["server and pool beside pipeline", "beside locked"]
    print(table(heads, table_lines))


if __name__ == "__main__":
    if "--side" in sys.argv:
        side(sys.argv[2], sys.argv[3], bool(int(sys.argv[4])), sys.argv[5])
    else:
        main()
