"""Processes that fail, are killed or hang: the others say which, and do not wait for long."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from torch.distributed import HashStore

from luthier.errors import ProcessLost
from luthier.models.process_group import ProcessGroup, Rendezvous, _enter_round, _explain

SCRIPT = Path(__file__).parents[1] / "plugins" / "group_member.py"


def reports_of(fault: str, size: int, folder: Path, seconds: int) -> list[Any]:
    """What all processes but the last one hear of its ``fault``: class, words and ranks of an error."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment |= {"WORLD_SIZE": str(size), "LUTHIER_COLLECTIVE_TIMEOUT": str(seconds)}
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), fault, str(folder)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
        )
        for rank in range(size)
    ]
    try:
        for process in processes[:-1]:
            _, words = process.communicate(timeout=120)
            assert process.returncode == 1, words.decode()
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    return [json.loads((folder / str(rank)).read_text()) for rank in range(size - 1)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "size", "seconds", "kind", "words"),
    [
        ("SIGKILL", 3, 100, "ProcessLost", "ended by surprise.*goes on from its last checkpoint"),
        ("SIGSTOP", 3, 3, "ProcessLost", "gave no answer for 3 seconds.*hangs.*last checkpoint"),
        ("bug", 2, 100, "ProcessLost", "failed: KeyError: 'nothing of that name'"),
        ("refusal", 2, 100, "DiskFull", "the disk of /scratch is full"),
        ("plugin", 2, 100, "RefusedInput", "nothing fits"),
        ("no space", 2, 100, "DiskFull", "No space left on device: '/scratch/rows'"),
    ],
)
def test_all_others_name_the_process_that_fails(
    tmp_path: Path, fault: str, size: int, seconds: int, kind: str, words: str
) -> None:
    for name, said, ranks, _ in reports_of(fault, size, tmp_path, seconds):
        last = size - 1
        pid = (tmp_path / f"pid-{last}").read_text()
        assert name == kind
        assert re.search(rf"process {last} of {size} \(pid {pid} on {socket.gethostname()}\)", said)
        assert re.search(words, said)
        assert ranks == ([last] if kind == "ProcessLost" else [])


@pytest.mark.slow
def test_a_refusal_before_they_meet_is_the_same_error_in_all(tmp_path: Path) -> None:
    for name, said, *_ in reports_of("early refusal", 3, tmp_path, 100):
        assert (name, said) == ("DiskFull", "process 2: the disk of /scratch is full")


@pytest.mark.parametrize(
    ("size", "error", "words"),
    [
        (2, "Connection closed by peer", r"process 1 of 2 .* ended by surprise"),
        (3, "Connection closed by peer", r"no word from process 1 of 3 .*, process 2 of 3"),
        (2, "gloo: something else", r"no word from process 1 of 2"),
    ],
)
def test_silence_alone_is_no_surprising_end(size: int, error: str, words: str) -> None:
    """Who computes still has no report, either."""
    members = [{"host": "here", "pid": rank} for rank in range(size)]
    rendezvous = Rendezvous(HashStore(), members, 1.0)
    lost = _explain(ProcessGroup(0, size), rendezvous, RuntimeError(error), {})
    assert isinstance(lost, ProcessLost) and lost.ranks == {*range(1, size)}
    assert re.search(words, str(lost))


def test_a_process_of_this_machine_that_ended_is_seen_whatever_the_exchange_says() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:  # a zombie, until it is waited for
        found = psutil.Process(ended.pid)
        while found.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        members = [{"host": socket.gethostname(), "pid": pid} for pid in (os.getpid(), ended.pid)]
        rendezvous = Rendezvous(HashStore(), members, 1.0)
        for _ in range(2):
            lost = _explain(ProcessGroup(0, 2), rendezvous, RuntimeError("gloo: odd words"), {})
            assert "process 1 of 2" in str(lost) and "ended by surprise" in str(lost)
            ended.wait()
    living = _explain(ProcessGroup(1, 2), rendezvous, RuntimeError("gloo: odd words"), {})
    assert "no word from process 0 of 2" in str(living)


def enter_round(store: HashStore, rank: int, found: dict[int, Any]) -> threading.Thread:
    """Enter beside; the name and the processes of the round are in ``found`` afterwards."""

    def enter() -> None:
        found[rank] = _enter_round(store, rank, 2, 20.0)

    thread = threading.Thread(target=enter)
    thread.start()
    return thread


def test_a_store_that_is_kept_leads_nobody_into_a_round_that_is_over() -> None:
    store, names = HashStore(), []
    for _ in range(3):
        found: dict[int, Any] = {}
        second = enter_round(store, 1, found)
        second.join(0.1)  # it sees the round before, in which there was a process 1, too
        assert not found
        first = enter_round(store, 0, found)
        first.join()
        second.join()
        assert found[0] == found[1]
        names.append(found[0][0])
    assert len({*names}) == 3


def test_a_process_that_does_not_begin_is_named() -> None:
    with pytest.raises(ProcessLost, match="in vain for process 1, process 2 to begin") as lost:
        _enter_round(HashStore(), 0, 3, 0.1)
    assert lost.value.ranks == {1, 2}
    with pytest.raises(ProcessLost, match=r"process 1 of 3 waited.*in vain for process 0"):
        _enter_round(HashStore(), 1, 3, 0.1)


def test_all_name_the_same_process_that_does_not_begin() -> None:
    store = HashStore()
    found: dict[int, Any] = {}

    def enter(rank: int) -> None:
        with pytest.raises(ProcessLost, match="in vain for process 1 to begin") as lost:
            _enter_round(store, rank, 3, 1.0)
        found[rank] = lost.value.ranks

    threads = [threading.Thread(target=enter, args=(rank,)) for rank in (0, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {0: {1}, 2: {1}}
