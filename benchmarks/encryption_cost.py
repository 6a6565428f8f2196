"""What an encrypted store costs: objects, ranges, checkpoints, and opening a whole network.

    python benchmarks/encryption_cost.py MODEL_FOLDER [--megabytes 512] [--turns 3]

Each figure is the best of several turns, plain and encrypted in turns, each in a process of its own;
MODEL_FOLDER is a Hugging Face directory with ``model.safetensors``. Peaks are of the whole process.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PIECE = os.urandom(1 << 20)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    found = work()
    return time.perf_counter() - started, found


def objects(home: Path, megabytes: int) -> dict[str, float]:
    from luthier.store.object_files import ObjectFiles

    files = ObjectFiles()

    def write() -> Any:
        with files.begin("000000000000") as writing:
            for _ in range(megabytes):
                writing.write(PIECE)
            return writing.finish()

    def read(start: int, length: int) -> int:
        named = [(written.id, written.size)]
        return sum(map(len, files.read("000000000000", named, start, length)))

    took, written = timed(write)
    whole, _ = timed(lambda: read(0, written.size))
    part = min(timed(lambda: read((written.size // 2) + 7, 4096))[0] for _ in range(20))
    return {"put_MB_s": megabytes / took, "get_MB_s": megabytes / whole, "range_4k_us": part * 1e6}


def checkpoint(home: Path, model: Path) -> dict[str, float]:
    from luthier.encryption.tensors import load_tensors, save_tensors

    tensors = {n: t.float().clone() for n, t in load_tensors(model / "model.safetensors").items()}
    path = home / "runs" / "tensors.safetensors"
    path.parent.mkdir()
    size = sum(t.nbytes for t in tensors.values()) / 1e6
    before = peak()
    written, _ = timed(lambda: save_tensors(tensors, path))
    more = peak() - before
    read, _ = timed(lambda: load_tensors(path))
    return {"MB": size, "write_s": written, "read_s": read, "peak_more_MB": more}


def network(home: Path, model: Path) -> dict[str, float]:
    import torch

    from luthier.encryption.files import seal
    from luthier.models.load import load_model

    folder = home / "models" / "custom"
    shutil.copytree(model, folder)
    (folder / "model.safetensors").unlink()
    seal(model / "model.safetensors", folder / "model.safetensors")
    took, found = timed(lambda: load_model(folder, torch.bfloat16, torch.device("cpu")))
    assert sum(weight.numel() for weight in found.parameters()) > 0
    return {"load_s": took, "peak_MB": peak()}


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def one(case: str, encrypted: bool, model: Path, megabytes: int) -> None:
    from luthier.encryption import keys, memory

    with tempfile.TemporaryDirectory(dir=model.parent) as folder:
        os.environ["LUTHIER_HOME"] = folder
        if encrypted:
            keys.begin(secrets.token_bytes(32))
        found = objects(Path(folder), megabytes) if case == "objects" else (
            {"checkpoint": checkpoint, "network": network}[case](Path(folder), model)
        )  # fmt: skip
        if encrypted:
            shutil.rmtree(memory.memory())
    print(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--megabytes", type=int, default=512)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        one(given.one[0], given.one[1] == "encrypted", given.model, given.megabytes)
        return
    best: dict[str, dict[str, float]] = {}
    for _ in range(given.turns):
        for case in ("objects", "checkpoint", "network"):
            for kind in ("plain", "encrypted"):
                command = [*sys.argv, "--one", case, kind]
                done = subprocess.run(
                    [sys.executable, *command], check=True, capture_output=True, text=True
                )
                figures = best.setdefault(f"{case:<11}{kind}", {})
                for name, value in json.loads(done.stdout.splitlines()[-1]).items():
                    better = max if name.endswith("MB_s") else min
                    figures[name] = better(figures.get(name, value), value)
    for name, figures in best.items():
        print(f"{name:<22}", "  ".join(f"{key} {value:,.3g}" for key, value in figures.items()))


if __name__ == "__main__":
    main()
