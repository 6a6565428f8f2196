"""How many requests an account may send."""

from __future__ import annotations

import threading

import pytest
from principals_of import FIRST, OTHER

from luthier.api.http.limits import (
    ADDRESS_BURST_SECONDS,
    BURST_SECONDS,
    SPENT_SECONDS,
    WAIT_SECONDS,
    WINDOW_SECONDS,
    RateLimits,
    RequestPace,
    UselessBodies,
)
from luthier.api.http.messages import Caller, Fault
from luthier.store import accounts
from luthier.store.database import Database


class Clock:
    def __init__(self) -> None:
        self.moment = 0.0

    def __call__(self) -> float:
        return self.moment


def sent(limits: RateLimits, account: str, number: int) -> int:
    """How many of ``number`` requests are admitted."""
    admitted = 0
    for _ in range(number):
        try:
            limits.admit(Caller(account, "u", ("administrator",)))
            admitted += 1
        except Fault as fault:
            assert fault.code == "Throttling"
            assert fault.details["retry_after"] >= 1
    return admitted


def test_a_burst_and_then_the_rate(database: Database) -> None:
    clock = Clock()
    limits = RateLimits(database, 10, clock)
    assert sent(limits, FIRST, 50) == 10 * BURST_SECONDS
    for _ in range(3):
        clock.moment += 0.5
        assert sent(limits, FIRST, 50) == 5
    clock.moment += 3600
    assert sent(limits, FIRST, 50) == 10 * BURST_SECONDS


def test_accounts_do_not_share_a_bucket(database: Database) -> None:
    limits = RateLimits(database, 1, Clock())
    assert sent(limits, FIRST, 10) == 2
    assert sent(limits, OTHER, 10) == 2


def test_the_quota_of_an_account_counts_at_once(database: Database) -> None:
    clock = Clock()
    limits = RateLimits(database, None, clock)
    with database.write() as session:
        accounts.create_account(session, FIRST)
    assert sent(limits, FIRST, 1000) == 1000
    with database.write() as session:
        accounts.set_quota(session, FIRST, requests_per_second=3)
    assert sent(limits, FIRST, 1000) == 6
    with database.write() as session:
        accounts.set_quota(session, FIRST, requests_per_second=0)
    clock.moment += 10
    assert sent(limits, FIRST, 10) == 0
    with database.write() as session:
        accounts.set_quota(session, FIRST, requests_per_second=None)
    assert sent(limits, FIRST, 1000) == 1000


def test_a_slow_rate_admits_one_and_says_when(database: Database) -> None:
    clock = Clock()
    limits = RateLimits(database, 0.1, clock)
    assert sent(limits, FIRST, 3) == 1
    with pytest.raises(Fault) as caught:
        limits.admit(Caller(FIRST, "u", ("administrator",)))
    wait = caught.value.details["retry_after"]
    assert 10 <= wait <= 11
    clock.moment += wait
    assert sent(limits, FIRST, 3) == 1


def test_threads_take_no_token_twice(database: Database) -> None:
    limits = RateLimits(database, 100, Clock())
    found: list[int] = []
    threads = [
        threading.Thread(target=lambda: found.append(sent(limits, FIRST, 100))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(found) == 200


def test_bodies_that_are_read_for_nothing_are_read_a_few_times_a_minute() -> None:
    clock = Clock()
    wrong = UselessBodies(3, clock)
    for _ in range(3):
        wrong.check("192.0.2.1", "AKIA1")
        wrong.count("192.0.2.1", "AKIA1")
    clock.moment = 20
    with pytest.raises(Fault, match="signature was wrong") as refused:
        wrong.check("192.0.2.1", "AKIA1")
    assert (refused.value.code, refused.value.details["retry_after"]) == ("Throttling", 40)
    # The owner of the key elsewhere, and others at the same address, are not concerned.
    wrong.check("192.0.2.2", "AKIA1")
    wrong.check("192.0.2.1", "AKIA2")
    clock.moment = WINDOW_SECONDS
    wrong.check("192.0.2.1", "AKIA1")


def test_requests_of_one_address_begin_at_its_pace() -> None:
    clock = Clock()
    pace = RequestPace(10, clock)
    burst = int(10 * ADDRESS_BURST_SECONDS)
    delays = [pace.delay("192.0.2.1") for _ in range(burst + 4)]
    assert delays[:burst] == [0.0] * burst
    assert delays[burst + 1 :] == pytest.approx([0.1, 0.2, 0.3])
    assert pace.delay("192.0.2.2") == 0.0  # others are not concerned
    clock.moment += 60
    assert pace.delay("192.0.2.1") == 0.0


def test_refused_requests_count_more() -> None:
    pace = RequestPace(10, Clock())
    assert pace.delay("one") == pace.delay("two") == 0
    pace.charge_refusal("one")
    assert pace.delay("one") == pace.delay("one") == 0  # the last of six that may come at once
    assert pace.delay("one") == pytest.approx(0.1)
    assert pace.delay("two") == 0


def test_no_request_waits_long_and_no_address_is_locked_out() -> None:
    clock = Clock()
    pace = RequestPace(10, clock)
    waits = [pace.delay("one") for _ in range(int(10 * (ADDRESS_BURST_SECONDS + WAIT_SECONDS)))]
    assert WAIT_SECONDS / 2 < max(waits) <= WAIT_SECONDS
    pace.charge_refusal("one")
    with pytest.raises(Fault) as refused:
        pace.delay("one")
    assert refused.value.code == "Throttling" and pace.is_spent("one")
    clock.moment += SPENT_SECONDS / 2
    assert pace.is_spent("one")  # though there is time for a request by now
    clock.moment += SPENT_SECONDS / 2
    assert not pace.is_spent("one")
    assert not pace.is_spent("two")
    for _ in range(1000):  # however many were refused
        pace.charge_refusal("one")
    clock.moment += 2 * WAIT_SECONDS
    assert pace.delay("one") <= WAIT_SECONDS
