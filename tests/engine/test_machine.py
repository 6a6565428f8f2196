"""Memory of machines and of control groups."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from luthier.engine import machine
from luthier.engine.machine import available_memory, peak_memory, total_memory

GIB = 1 << 30


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(machine, "GROUP", tmp_path)
    return tmp_path


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_reason_of_a_precision_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, threads: int, native: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(machine, "_cpu_has_bfloat16", lambda: native)
    reason = machine.choose_machine("auto", threads).reason
    name, support = reason.split(", ")
    assert name == f"{threads} CPU thread{'s' * (threads > 1)}"
    assert ("no " in support) != native


def test_memory_without_limit_is_machine_memory(group: Path) -> None:
    assert total_memory() == psutil.virtual_memory().total
    (group / "memory.max").write_text("max\n")
    assert total_memory() == psutil.virtual_memory().total
    assert 0 < available_memory() <= total_memory()


def test_memory_limit_of_container_without_page_cache(group: Path) -> None:
    (group / "memory.max").write_text(f"{GIB // 4}\n")
    (group / "memory.current").write_text(f"{GIB // 4 - 4096}\n")
    (group / "memory.stat").write_text(f"anon 1\nfile 2\ninactive_file {GIB // 8}\nactive_file 3\n")
    assert total_memory() == GIB // 4
    assert available_memory() == GIB // 8 + 4096
    (group / "memory.stat").write_text("inactive_file 0\n")
    (group / "memory.current").write_text(f"{GIB // 4 + 4096}\n")
    assert available_memory() == 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted where Linux lists them")
def test_thread_keeps_no_workers_after_computing() -> None:
    # In a separate process, without unrelated threads.
    code = """
import os, torch
from luthier.engine.machine import release_workers
threads = lambda: len(os.listdir("/proc/self/task"))
torch.set_num_threads(3)
numbers = torch.randn(600, 600)
before = threads()
first = numbers @ numbers + torch.randn(600, 600).exp_().mul_(0)
working = threads()
release_workers()
after = threads()
assert torch.equal(numbers @ numbers, first)
print(before, working, after)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, working, after = map(int, done.stdout.split())
    assert working >= before
    assert after <= before
    if not list((Path(torch.__file__).parent / "lib").glob("libgomp*")):
        pytest.skip("torch computes with another OpenMP library than GNU's here")
    assert working > before


def test_memory_of_a_gpu_is_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * GIB, 8 * GIB))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: GIB)
    device = torch.device("cuda")
    assert available_memory(device) == 3 * GIB
    assert peak_memory(device) == GIB


def test_peak_memory_without_the_memory_of_the_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    # After a start, Linux counts the parent in `ru_maxrss`.
    usage = SimpleNamespace(ru_maxrss=1 << 40)
    monkeypatch.setattr("resource.getrusage", lambda who: usage)
    assert 0 < peak_memory() < 1 << 40
