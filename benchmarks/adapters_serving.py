"""Many adapters on one base in one batch, against one adapter, the bare base and a merged network.

    python benchmarks/adapters_serving.py [--adapters 32] [--rank 16] [--tokens 64] [--rounds 3]

SmolLM2-135M-Instruct in the machine's type, answered by the server's own pool: LoRA on all linear
layers, prompts of about 30 tokens, greedy, no stop token. All cases run in turns; the best round of
each counts.
Prints tokens/s, what an adapter takes of memory beside its file, and how long a cold one takes to load.
A new store is made for it: base models are linked from the one that is set.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import copytree

import torch
from safetensors.torch import save_file

from children import table
from luthier.engine.machine import release_workers
from luthier.engine.train import train
from luthier.files import hashes_of, luthier_home
from luthier.inference.inference import GenerationRequest
from luthier.inference.memory import resident_bytes
from luthier.inference.pool import ModelPool
from luthier.library.models import find
from luthier.models.manifest import MANIFEST, Manifest
from luthier.models.save import ADAPTER, read_adapter
from luthier.recipe import Recipe

BASE = "smollm2-135m-instruct"
PROMPT = "Customer {}: My card has not arrived yet, and I have waited for two weeks. What do I do? "


def make_adapters(folder: Path, count: int, rank: int) -> list[str]:
    """So many LoRA models: one of two training steps, and copies with other numbers."""
    rows = "\n".join(f'{{"prompt": "say {i}", "completion": "{i}{i}"}}' for i in range(16))
    (folder / "rows.jsonl").write_text(rows)
    fields = {
        "base": BASE,
        "name": "a0",
        "data": {"train": str(folder / "rows.jsonl"), "validation_share": 0},
        "adaptation": {"method": "lora", "rank": rank, "alpha": 2 * rank, "targets": "all-linear"},
        "training": {"max_steps": 2},
    }
    first = find(train(Recipe.parse(fields)).model_id)
    ids = [first.id]
    for index in range(1, count):
        copy = first.folder.with_name(f"a{index}")
        copytree(first.folder, copy)
        generator = torch.Generator().manual_seed(index)
        tensors = {
            name: tensor + 0.01 * torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
            for name, tensor in read_adapter(first.folder).items()
        }
        save_file(tensors, copy / ADAPTER, metadata={"format": "pt"})
        hashes = {n: h for n, h in hashes_of(copy).items() if n in first.manifest.files}
        model_id = f"{BASE}:a{index}"
        record = first.manifest.plain() | {"id": model_id, "files": hashes}
        (copy / MANIFEST).unlink()
        Manifest.model_validate(record).write(copy)
        ids.append(model_id)
    release_workers()  # of the thread that trained: else the decoder's would sleep between products
    return ids


def tokens_per_second(pool: ModelPool, models: list[str], tokens: int) -> float:
    def ask(index: int) -> int:
        request = GenerationRequest(
            PROMPT.format(index), max_tokens=tokens, temperature=0, logit_bias={2: -100.0}
        )
        return pool.submit(models[index], request).whole()[0].tokens

    began = time.perf_counter()
    with ThreadPoolExecutor(len(models)) as clients:
        written = sum(clients.map(ask, range(len(models))))
    return written / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--adapters", type=int, default=32)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    find(BASE, print)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "models").mkdir()
        (folder / "models" / "base").symlink_to(luthier_home() / "models" / "base")
        os.environ["LUTHIER_HOME"] = name
        ids = make_adapters(folder, options.adapters, options.rank)
        file_bytes = (find(ids[0]).folder / ADAPTER).stat().st_size
        pool = ModelPool()
        count = len(ids)
        pool.count(BASE, "warm")
        began = time.perf_counter()
        pool.count(ids[0], "first of its shapes")
        first = time.perf_counter() - began
        before, cold = resident_bytes(), []
        for each in ids[1:]:
            began = time.perf_counter()
            pool.count(each, "warm")
            cold.append(time.perf_counter() - began)
        loaded = resident_bytes()
        cases = {
            "bare base": [BASE] * count,
            "one adapter": ids[:1] * count,
            f"{count} adapters": ids,
            "half base, half adapters": [BASE] * (count // 2) + ids[count // 2 :],
        }
        found: dict[str, list[float]] = {name: [] for name in cases}
        for models in cases.values():
            tokens_per_second(pool, models, 4)
        for _ in range(options.rounds):
            for case, models in cases.items():
                found[case].append(tokens_per_second(pool, models, options.tokens))
                print(case, f"{found[case][-1]:.0f}", flush=True)
        best = {case: max(each) for case, each in found.items()}
        rows = [
            [case, f"{each:.0f}", f"{each / best['one adapter']:.2f}x"]
            for case, each in best.items()
        ]
        print(table([f"{count} rows", "tokens/s", "of one adapter"], rows))
        each = (loaded - before) / (count - 1)
        print(
            f"a file of {file_bytes / 2**20:.1f} MiB takes {each / 2**20:.1f} MiB of memory loaded "
            f"({each / file_bytes:.2f}x); cold on a warm base: median "
            f"{1000 * statistics.median(cold):.0f} ms, the first of its shapes {1000 * first:.0f} ms"
        )
        pool.close()


if __name__ == "__main__":
    main()
