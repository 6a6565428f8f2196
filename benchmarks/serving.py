"""Tokens per second of the server's engine, transformers' `generate` and llama.cpp, in turns.

    python benchmarks/serving.py [--streams 1 8 32 64] [--tokens 64] [--rounds 3] [--gguf q8_0]
    python benchmarks/serving.py --only-prefix

SmolLM2-135M in the machine's number type, greedy, prompts of about 30 tokens, replies of 64 tokens.
luthier is called through the pool of the server, one thread per stream. `generate` has the prompts
as one batch. llama.cpp's server runs in this process with one slot per stream and the given weight
type (bf16: as luthier). For luthier, the time to the first token and between tokens are also
printed. The median round counts.

The second part sends twenty questions with the same instruction of about 600 tokens, one after
another, and prints the seconds to the first token for the first and for the later questions.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import torch

from children import table
from luthier.cli.models.export import export
from luthier.engine.machine import choose_machine, limit_kernels, release_workers
from luthier.inference.inference import Chat, GenerationRequest, TokenChunk
from luthier.inference.memory import resident_bytes
from luthier.inference.pool import ModelPool
from luthier.library.models import StoredModel, find
from luthier.models.load import load_model
from luthier.types import Message

BASE = "smollm2-135m-instruct"
THINGS = ("sea", "mountains", "desert", "forest", "city", "moon", "river", "island")
TIMES = (
    "in spring",
    "at night",
    "long ago",
    "in a storm",
    "by day",
    "in winter",
    "at noon",
    "alone",
)
INSTRUCTIONS = " ".join(
    f"Rule {number}: answer in the way that the house prescribes for tickets of kind {number}."
    for number in range(1, 34)
)


def prompts(count: int) -> list[str]:
    """Return ``count`` different questions that need long replies."""
    return [
        f"Write a long story about the {THINGS[at % 8]} {TIMES[at // 8]}, with many details."
        for at in range(count)
    ]


Times = tuple[float, list[float]]
"""Seconds to the first token, and between later tokens."""


class Round:
    """Results of one round of one side."""

    def __init__(self, seconds: float, tokens: int, times: Sequence[Times] = ()) -> None:
        self.rate, self.times = tokens / seconds, times


def luthier_round(pool: ModelPool, model: StoredModel, asked: Sequence[str], tokens: int) -> Round:
    barrier = threading.Barrier(len(asked) + 1)

    def ask(text: str) -> tuple[int, Times]:
        request = GenerationRequest(
            Chat((Message("user", text),)), temperature=0, max_tokens=tokens
        )
        barrier.wait()
        began = time.perf_counter()
        stream = pool.submit(model.id, request)
        came = []
        for event in stream:
            if isinstance(event, TokenChunk):
                came.append(time.perf_counter())
        gaps = [after - before for before, after in pairwise(came)]
        return stream.written(), (came[0] - began, gaps)

    with ThreadPoolExecutor(len(asked)) as threads:
        running = [threads.submit(ask, text) for text in asked]
        barrier.wait()
        began = time.perf_counter()
        found = [each.result() for each in running]
        seconds = time.perf_counter() - began
    counts, times = zip(*found, strict=True)
    return Round(seconds, sum(counts), times)


def generate_round(theirs: torch.nn.Module, model: StoredModel) -> Callable[..., Round]:
    chat = model.chat

    def run(asked: Sequence[str], tokens: int) -> Round:
        rows = [chat.encode_prompt([Message("user", text)]) for text in asked]
        width = max(map(len, rows))
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for place, row in enumerate(rows):
            ids[place, width - len(row) :] = torch.from_numpy(row)
            mask[place, width - len(row) :] = 1
        began = time.perf_counter()
        theirs.generate(  # type: ignore[operator]
            ids, attention_mask=mask, do_sample=False, max_new_tokens=tokens,
            min_new_tokens=tokens, pad_token_id=0,
        )  # fmt: skip
        seconds = time.perf_counter() - began
        release_workers()  # else this thread's would put those of the others to sleep
        return Round(seconds, tokens * len(rows))

    return run


@contextmanager
def llama_cpp(file: Path, slots: int, tokens: int) -> Iterator[Callable[[Sequence[str]], Round]]:
    """Run llama.cpp's server with ``slots`` slots, queried over the loopback interface."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel, params.n_gpu_layers = 256 * slots, slots, 0
    params.cpuparams.n_threads = torch.get_num_threads()
    params.verbosity = -1
    server: Any = xllamacpp.Server(params)

    def ask(text: str) -> int:
        body = {
            "messages": [{"role": "user", "content": text}],
            "max_tokens": tokens, "temperature": 0, "cache_prompt": False,
        }  # fmt: skip
        request = Request(
            f"{server.listening_address}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urlopen(request, timeout=600) as response:
            return int(json.load(response)["usage"]["completion_tokens"])

    def run(asked: Sequence[str]) -> Round:
        with ThreadPoolExecutor(len(asked)) as threads:
            began = time.perf_counter()
            written = sum(threads.map(ask, asked))
            return Round(time.perf_counter() - began, written)

    try:
        yield run
    finally:
        server = None


def percentiles(values: Sequence[float]) -> str:
    ordered = sorted(values)
    places = [
        ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in (0.5, 0.95, 0.99)
    ]
    return " / ".join(f"{1000 * value:,.0f}" for value in places)


def streams(
    pool: ModelPool, model: StoredModel, counts: Sequence[int], tokens: int, rounds: int, gguf: str
) -> None:
    machine = choose_machine()
    theirs = load_model(model.folder, machine.dtype, machine.device).eval()
    theirs.set_attn_implementation("sdpa")  # type: ignore[operator]
    generate = generate_round(theirs, model)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for kind in (gguf,) if gguf else ():
            target = Path(folder, kind)
            export(model, target, format="gguf", quantization=kind)
            files += sorted(target.glob("*.gguf"))
        for count in counts:
            asked = prompts(count)
            sides: dict[str, list[Round]] = {"luthier": [], "generate": [], "llama.cpp": []}
            for number in range(rounds + 1):  # the first one warms up
                now = {
                    "luthier": luthier_round(pool, model, asked, tokens),
                    "generate": generate(asked, tokens),
                }
                for file in files:
                    with llama_cpp(file, count, tokens) as ask:
                        ask(asked[:1])
                        now["llama.cpp"] = ask(asked)
                for side, each in now.items():
                    if number:
                        sides[side].append(each)
            rate = {
                side: statistics.median(each.rate for each in found)
                for side, found in sides.items()
                if found
            }
            times = [one for each in sides["luthier"] for one in each.times]
            rows.append([
                str(count),
                f"{rate['luthier']:,.0f}",
                *(
                    f"{rate[side]:,.0f} ({rate['luthier'] / rate[side]:.2f}x)" if side in rate else ""
                    for side in ("generate", "llama.cpp")
                ),
                percentiles([first for first, _ in times]),
                percentiles([gap for _, gaps in times for gap in gaps]),
            ])  # fmt: skip
            print(rows[-1], flush=True)
    names = [
        "streams", "luthier, tokens/s", "generate", f"llama.cpp, {gguf}",
        "first text, ms, p50 / p95 / p99", "between texts, ms",
    ]  # fmt: skip
    print(table(names, rows))
    print(
        f"{machine.dtype}, {machine.reason}; this process, all sides: {resident_bytes() >> 20} MiB"
    )


def repeated_instructions(pool: ModelPool, model: StoredModel) -> None:
    firsts = []
    for number in range(20):
        turns = (
            Message("system", INSTRUCTIONS),
            Message("user", f"Ticket {number}: it is broken."),
        )
        stream = pool.submit(model.id, GenerationRequest(Chat(turns), temperature=0, max_tokens=2))
        began = time.perf_counter()
        next(stream)
        firsts.append(time.perf_counter() - began)
        stream.results()
    print(
        f"{stream.prompt_tokens} tokens of prompt, {stream.cached()} of them known: first text after "
        f"{1000 * firsts[0]:,.0f} ms, then {percentiles(firsts[1:])} (p50 / p95 / p99)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--streams", type=int, nargs="+")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gguf", default="q8_0", help="type of llama.cpp's weights; '' without it")
    parser.add_argument("--only-prefix", action="store_true")
    options = parser.parse_args()
    limit_kernels()
    model = find(BASE, print)
    pool = ModelPool()
    pool.submit(model.id, GenerationRequest([5, 6, 7], temperature=0, max_tokens=2)).results()
    repeated_instructions(pool, model)
    if not options.only_prefix:
        counts = options.streams or [1, 8, 32, 64]
        streams(pool, model, counts, options.tokens, options.rounds, options.gguf)
    pool.close()


if __name__ == "__main__":
    main()
