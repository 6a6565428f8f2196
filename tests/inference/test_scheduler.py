"""Fair scheduling: equal shares for clients, and no loss by sharing."""

from __future__ import annotations

import threading
import time

import pytest

from luthier.inference.scheduler import (
    HEAD_START_SECONDS,
    LEAD_SECONDS,
    Cancelled,
    FairScheduler,
)

CHUNK, STEP = 0.15, 0.01


def test_a_client_alone_never_pauses() -> None:
    scheduler = FairScheduler()
    assert scheduler.runnable([]) == set()
    scheduler.enter("one")
    for _ in range(100):
        assert scheduler.runnable(["one"]) == {"one"}
        scheduler.charge("one", CHUNK)
    assert not scheduler.has_several_clients


def test_new_client_has_head_start_then_half() -> None:
    scheduler = FairScheduler()
    scheduler.enter("long")
    scheduler.charge("long", 100)
    scheduler.enter("short")
    assert scheduler.has_several_clients
    at_first = 0.0
    while "long" not in scheduler.runnable(["long", "short"]):
        scheduler.charge("short", STEP)
        at_first += STEP
    assert at_first == pytest.approx(HEAD_START_SECONDS - LEAD_SECONDS, abs=STEP)
    had = dict.fromkeys(("long", "short"), 0.0)
    while sum(had.values()) < 20:
        for client in sorted(scheduler.runnable(["long", "short"])):
            cost = {"long": CHUNK, "short": STEP}[client]
            scheduler.charge(client, cost)
            had[client] += cost
    assert had["short"] == pytest.approx(10, abs=CHUNK + LEAD_SECONDS)


def test_idle_time_is_no_credit_beyond_the_head_start() -> None:
    scheduler = FairScheduler()
    scheduler.enter("long")
    for _ in range(50):
        scheduler.enter("comes and goes")
        scheduler.charge("comes and goes", STEP)
        scheduler.leave("comes and goes")
        scheduler.charge("long", STEP)
    assert scheduler.seconds("long") - scheduler.seconds("comes and goes") == pytest.approx(0)
    scheduler.charge("long", 50)
    assert scheduler.seconds("long") - scheduler.seconds("comes and goes") == HEAD_START_SECONDS


def test_departed_clients_are_forgotten() -> None:
    scheduler = FairScheduler()
    scheduler.enter("stays")
    for number in range(1000):
        scheduler.enter(str(number))
        scheduler.charge(str(number), 0.01)
        scheduler.charge("stays", 0.02)
        scheduler.leave(str(number))
    assert len(scheduler._seconds) < 60
    scheduler.leave("stays")
    scheduler.enter("new")
    assert list(scheduler._seconds) == ["new"]


def test_work_at_different_model_waits_for_fair_turn() -> None:
    scheduler = FairScheduler()
    scheduler.enter("chat")
    with scheduler.work("embeds", "model"):
        pass
    scheduler.enter("embeds")
    scheduler.charge("embeds", 10 * CHUNK)
    scheduler.leave("embeds")
    at: list[float] = []

    def embed() -> None:
        with scheduler.work("embeds", "model"):
            at.append(scheduler.seconds("chat"))

    thread = threading.Thread(target=embed)
    thread.start()
    while not at:
        assert scheduler.runnable(["chat"]) == {"chat"}
        time.sleep(0.002)
        scheduler.charge("chat", STEP)
    thread.join()
    assert at[0] >= 10 * CHUNK - LEAD_SECONDS - HEAD_START_SECONDS - STEP


def test_exclusive_model_alternates_between_clients() -> None:
    scheduler = FairScheduler()
    order: list[str] = []

    def work(client: str, count: int) -> None:
        for _ in range(count):
            with scheduler.work(client, "model"):
                order.append(client)
                time.sleep(0.01)

    threads = [threading.Thread(target=work, args=("many", 20)) for _ in range(6)]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    work("few", 10)
    assert order.count("many") <= 30
    # The scheduler charges working time, not waiting time.
    assert scheduler.seconds("few") < 0.5
    for thread in threads:
        thread.join()


def test_cancelled_waiter_blocks_no_client() -> None:
    scheduler = FairScheduler()
    gone, begun = threading.Event(), threading.Event()
    raised: list[Exception] = []

    def wait() -> None:
        try:
            begun.set()
            with scheduler.work("waits", "model", gone.is_set):
                raise AssertionError("its turn has not come")
        except Cancelled as error:
            raised.append(error)

    with scheduler.work("holds", "model"):
        thread = threading.Thread(target=wait)
        thread.start()
        assert begun.wait(5)
        scheduler.enter("chat")
        for _ in range(50):
            scheduler.charge("chat", STEP)
            scheduler.charge("holds", STEP)
        assert scheduler.runnable(["chat", "holds"]) == {"chat", "holds"}
        gone.set()
        thread.join(5)
    assert raised
    assert not scheduler._waiting
