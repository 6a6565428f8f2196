"""Rate limits of accounts."""

from __future__ import annotations

import threading

import pytest
from principals_of import FIRST, OTHER

from luthier.server.http.limits import BURST_SECONDS, RateLimits
from luthier.server.http.messages import Caller, Fault
from luthier.server.tables import accounts
from luthier.server.tables.database import Database


class Clock:
    def __init__(self) -> None:
        self.moment = 0.0

    def __call__(self) -> float:
        return self.moment


def sent(limits: RateLimits, account: str, number: int) -> int:
    """Return the number of admitted requests out of ``number``."""
    admitted = 0
    for _ in range(number):
        try:
            limits.admit(Caller(account, "u", ("administrator",)))
            admitted += 1
        except Fault as fault:
            assert fault.code == "Throttling"
            assert fault.details["retry_after"] >= 1
    return admitted


def test_rate_limit_allows_burst_then_rate(database: Database) -> None:
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


def test_account_rate_quota_applies_immediately(database: Database) -> None:
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


def test_slow_rate_limit_reports_retry_after(database: Database) -> None:
    clock = Clock()
    limits = RateLimits(database, 0.1, clock)
    assert sent(limits, FIRST, 3) == 1
    with pytest.raises(Fault) as caught:
        limits.admit(Caller(FIRST, "u", ("administrator",)))
    wait = caught.value.details["retry_after"]
    assert 10 <= wait <= 11
    clock.moment += wait
    assert sent(limits, FIRST, 3) == 1


def test_rate_limit_is_exact_across_threads(database: Database) -> None:
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
