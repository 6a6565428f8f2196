"""Who pauses: nobody has more of a network than others that want it, and nobody loses by sharing."""

from __future__ import annotations

import threading
import time

import pytest

from luthier.serving.scheduler import HEAD_START_SECONDS, LEAD_SECONDS, FairScheduler, StepCosts

CHUNK, STEP = 0.15, 0.01


def test_a_client_alone_never_pauses() -> None:
    scheduler = FairScheduler()
    assert scheduler.turn([]) == set()
    scheduler.begin("one")
    for _ in range(100):
        assert scheduler.turn(["one"]) == {"one"}
        scheduler.charge("one", CHUNK)
    assert not scheduler.shared


def test_who_comes_goes_first_and_then_has_half() -> None:
    scheduler = FairScheduler()
    scheduler.begin("long")
    scheduler.charge("long", 100)
    scheduler.begin("short")
    assert scheduler.shared
    at_first = 0.0
    while "long" not in scheduler.turn(["long", "short"]):
        scheduler.charge("short", STEP)
        at_first += STEP
    assert at_first == pytest.approx(HEAD_START_SECONDS - LEAD_SECONDS, abs=STEP)
    had = dict.fromkeys(("long", "short"), 0.0)
    while sum(had.values()) < 20:
        for client in sorted(scheduler.turn(["long", "short"])):
            cost = {"long": CHUNK, "short": STEP}[client]
            scheduler.charge(client, cost)
            had[client] += cost
    assert had["short"] == pytest.approx(10, abs=CHUNK + LEAD_SECONDS)


def test_steps_together_are_paid_as_if_alone() -> None:
    """One row beside three takes as long as one alone: neither waits for the other."""
    costs = StepCosts()
    for client, count in (("three", 3), ("one", 1)):
        assert costs.of({client: [50] * count}, STEP) == {client: STEP}
    assert costs.of({"three": [50] * 3, "one": [50]}, STEP) == {"three": STEP, "one": STEP}


def test_rows_that_make_a_step_slow_are_paid_by_their_client() -> None:
    """Also before anything is known of what a step of its own takes: it is seen soon."""
    scheduler, costs = FairScheduler(), StepCosts()
    scheduler.begin("heavy")
    scheduler.begin("light")
    rows = {"heavy": [4000] * 20, "light": [50]}
    seconds, tokens = 0.0, 0
    while seconds < 20:
        turn = scheduler.turn(["heavy", "light"])
        assert "light" in turn or turn == {"heavy"}
        cost = 20 * STEP if "heavy" in turn else STEP
        for client, part in costs.of({each: rows[each] for each in turn}, cost).items():
            scheduler.charge(client, part)
        seconds += cost
        tokens += "light" in turn
    assert tokens > 0.45 * 20 / STEP


def test_idle_time_is_no_credit_beyond_the_head_start() -> None:
    scheduler = FairScheduler()
    scheduler.begin("long")
    for _ in range(50):
        scheduler.begin("comes and goes")
        scheduler.charge("comes and goes", STEP)
        scheduler.end("comes and goes")
        scheduler.charge("long", STEP)
    assert scheduler.seconds("long") - scheduler.seconds("comes and goes") == pytest.approx(0)
    scheduler.charge("long", 50)
    assert scheduler.seconds("long") - scheduler.seconds("comes and goes") == HEAD_START_SECONDS


def test_clients_that_left_are_forgotten() -> None:
    scheduler = FairScheduler()
    scheduler.begin("stays")
    for number in range(1000):
        scheduler.begin(str(number))
        scheduler.charge(str(number), 0.01)
        scheduler.charge("stays", 0.02)
        scheduler.end(str(number))
    assert len(scheduler._seconds) < 60
    scheduler.end("stays")
    scheduler.begin("new")
    assert list(scheduler._seconds) == ["new"]


def test_work_at_another_model_waits_for_its_turn_too() -> None:
    scheduler = FairScheduler()
    scheduler.begin("chat")
    with scheduler.work("embeds"):
        pass
    for _ in range(10):
        scheduler.charge("embeds", CHUNK)
    done: list[float] = []

    def embed() -> None:
        with scheduler.work("embeds"):
            done.append(scheduler.seconds("chat"))

    thread = threading.Thread(target=embed)
    thread.start()
    for _ in range(20):
        assert scheduler.turn(["chat"]) == {"chat"}
        time.sleep(0.002)
        scheduler.charge("chat", CHUNK)
    thread.join(5)
    assert done
    assert done[0] >= 10 * CHUNK - LEAD_SECONDS - HEAD_START_SECONDS
