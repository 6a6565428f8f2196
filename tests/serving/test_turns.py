"""Turns at something scarce: an account with many requests does not keep another one waiting."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from luthier.serving.turns import FairTurns, NoTurn, working_for


class Taken:
    """Clients in the order of their turns, each of which lasts until it is let go."""

    def __init__(self, turns: FairTurns) -> None:
        self.turns = turns
        self.clients: list[str] = []
        self.end: list[threading.Event] = []

    def take(self, client: str) -> None:
        with working_for(client), self.turns.turn():
            end = threading.Event()
            self.end.append(end)
            self.clients.append(client)
            assert end.wait(20)

    def wait(self, clients: list[str]) -> None:
        deadline = time.monotonic() + 10
        while self.clients != clients and time.monotonic() < deadline:
            time.sleep(0.01)
        assert self.clients == clients


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


def waiting(turns: FairTurns, count: int) -> None:
    deadline = time.monotonic() + 10
    while sum(map(len, turns._waiting.values())) != count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_one_client_never_has_all_turns(threads: ThreadPoolExecutor) -> None:
    turns = FairTurns(2, 20)
    taken = Taken(turns)
    work = [threads.submit(taken.take, "greedy") for _ in range(3)]
    taken.wait(["greedy"])
    waiting(turns, 2)
    work.append(threads.submit(taken.take, "other"))
    taken.wait(["greedy", "other"])
    work.append(threads.submit(taken.take, "third"))
    waiting(turns, 3)
    taken.end[0].set()
    taken.wait(["greedy", "other", "third"])  # before the two that wait longer
    taken.end[1].set()
    taken.wait(["greedy", "other", "third", "greedy"])
    taken.end[2].set()
    taken.end[3].set()
    taken.wait(["greedy", "other", "third", "greedy", "greedy"])
    taken.end[4].set()
    for each in work:
        each.result(10)
    assert not turns._waiting and not turns._active


def test_whoever_waits_too_long_keeps_nobody_waiting() -> None:
    turns = FairTurns(1, 0.05)
    with turns.turn(), pytest.raises(NoTurn), turns.turn():
        pass
    with turns.turn():
        pass
    assert not turns._waiting and not turns._active
