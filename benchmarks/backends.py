"""Tokens a second of torch and llama.cpp under the decoder's seam, paired in one run.

    python benchmarks/backends.py [--model ID] [--streams 1 8 32] [--types f16 q8_0] [--rounds 5]

Prompts of 30 tokens, 64 further ones each, all streams stepping together, the likeliest token taken.
Each round runs torch and then every type of GGUF file; the table has medians, and medians of the
ratios within rounds. Behind it: how each type answers beside torch, and whether what a sequence gets
depends on seven others beside it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import numpy as np

from children import table
from luthier.engine.machine import open_network
from luthier.evaluation.parity import compare_backends
from luthier.models.backends import BACKENDS, Backend
from luthier.models.torch_backend import torch_backend
from luthier.serving import derived_gguf
from luthier.store.models import find, room_of

PROMPT, TOKENS = 30, 64


def begin(backend: Backend, prompts: list[Any]) -> tuple[list[Any], list[Any]]:
    states, logits = [], []
    for ids_T in prompts:
        state, logits_V = backend.open(ids_T), None
        while logits_V is None:
            (logits_V,) = backend.prefill([state])
        states += backend.fork(state, 1)
        logits.append(logits_V)
    return states, logits


def rate(backend: Backend, streams: int, vocabulary: int) -> tuple[float, float]:
    """Tokens a second while all write, and seconds until all prompts are read."""
    rng = np.random.default_rng(streams)
    prompts = [rng.integers(1000, vocabulary, PROMPT) for _ in range(streams)]
    began = time.perf_counter()
    states, logits = begin(backend, prompts)
    read = time.perf_counter()
    tokens = [int(each.argmax()) for each in logits]
    for _ in range(TOKENS):
        tokens = backend.step(states, tokens).argmax(-1).tolist()
    ended = time.perf_counter()
    for state in states:
        backend.free(state)
    return streams * TOKENS / (ended - read), read - began


def beside(backend: Backend, vocabulary: int) -> str:
    """The same sequence alone and beside seven others."""
    rng = np.random.default_rng(1)
    texts, rows = [], []
    for count in (1, 8):
        first = np.random.default_rng(0).integers(1000, vocabulary, PROMPT)
        prompts = [first, *(rng.integers(1000, vocabulary, 20 + 7 * i) for i in range(count - 1))]
        states, logits = begin(backend, prompts[1:] + prompts[:1])
        tokens, kept, text = [int(each.argmax()) for each in logits], [logits[-1]], []
        for _ in range(TOKENS):
            text.append(tokens[-1])
            logits_RV = backend.step(states, tokens)
            kept.append(logits_RV[-1].clone())
            tokens = logits_RV.argmax(-1).tolist()
        for state in states:
            backend.free(state)
        texts.append(text)
        rows.append(kept)
    same = next((i for i, (a, b) in enumerate(zip(*texts, strict=True)) if a != b), TOKENS)
    most = max(float((a - b).abs().max()) for a, b in zip(*(r[:same] for r in rows), strict=True))
    return f"{same} of {TOKENS} tokens equal, logits differ by up to {most:.2g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--types", nargs="+", default=["f16", "q8_0"])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    stored = find(options.model, print)
    network = open_network(stored)
    vocabulary, context = int(network.model.config.vocab_size), room_of(stored)
    open_file = BACKENDS["llama.cpp"].open_file
    assert open_file is not None
    backends: dict[str, Backend] = {"torch": torch_backend(network, context, True)}
    for kind in options.types:
        file = derived_gguf.gguf_of(stored, kind, open_file)
        backends[kind] = open_file(file, context, vocabulary)
    rows = []
    for streams in options.streams:
        for backend in backends.values():
            rate(backend, streams, vocabulary)
        timed = [
            {name: rate(backend, streams, vocabulary) for name, backend in backends.items()}
            for _ in range(options.rounds)
        ]
        for name in backends:
            speed = statistics.median(each[name][0] for each in timed)
            ratio = statistics.median(each[name][0] / each["torch"][0] for each in timed)
            reading = statistics.median(each[name][1] / each["torch"][1] for each in timed)
            rows.append([str(streams), name, f"{speed:.0f}", f"{ratio:.2f}", f"{1 / reading:.2f}"])
            print(rows[-1], flush=True)
    print(table(["streams", "backend", "tokens/s", "beside torch", "reading, too"], rows))
    for name, backend in backends.items():
        print(f"{name}: {beside(backend, vocabulary)}")
        if name != "torch":
            prompts = derived_gguf._prompts(stored, context // 2)
            print(compare_backends(backends["torch"], backend, prompts, derived_gguf.TOKENS))


if __name__ == "__main__":
    main()
