"""Turns between accounts: whoever holds the fewest is next, and nobody holds all."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from served import served
from trails import Remembered

from luthier.api.app import LONG, SHARE, STREAMS, Application, Faces
from luthier.api.observability import Observer
from luthier.api.threads import WAITING, FairSlots, LargeBodies
from luthier.api.wire import Answer, Call, Caller, Fault, Head, Route, Signed
from luthier.serving.prompts import prompt_is_read

BUSY, QUIET = "111111111111", "222222222222"


def test_the_account_that_holds_the_fewest_is_next() -> None:
    order: list[str] = []

    async def work(slots: FairSlots, account: str, seconds: float) -> None:
        async with slots.turn(account):
            order.append(account)
            await asyncio.sleep(seconds)

    async def main() -> None:
        slots = FairSlots(2, 2)
        tasks = [asyncio.create_task(work(slots, "a", 0.05)) for _ in range(6)]
        await asyncio.sleep(0.01)
        tasks += [asyncio.create_task(work(slots, "b", 0.05)) for _ in range(2)]
        await asyncio.gather(*tasks)

    asyncio.run(main())
    assert order[:2] == ["a", "a"] and order[2] == "b"
    assert sorted(order) == ["a"] * 6 + ["b"] * 2


def test_a_turn_that_is_given_up_goes_to_the_next() -> None:
    async def main() -> None:
        slots = FairSlots(1, 1)
        async with slots.turn("a"):
            waiting = [asyncio.ensure_future(_hold(slots, name)) for name in ("b", "c", "b")]
            await asyncio.sleep(0)
            waiting[0].cancel()
            await asyncio.sleep(0)
        assert await asyncio.wait_for(waiting[1], 1) == "c"
        assert await asyncio.wait_for(waiting[2], 1) == "b"
        # Given and given up in the same moment.
        async with slots.turn("a"):
            late = asyncio.ensure_future(_hold(slots, "b"))
            await asyncio.sleep(0)
        late.cancel()
        await asyncio.sleep(0)
        with slots.now("c"), pytest.raises(Fault, match="wait"), slots.now("d"):
            pass
        with slots.now("d"):
            pass

    asyncio.run(main())


async def _hold(slots: FairSlots, account: str) -> str:
    async with slots.turn(account):
        return account


class Door:
    def authenticate(self, head: Head, body: bytes | None) -> Signed:
        return Signed(Caller(dict(head.headers)["authorization"].removeprefix("Bearer "), "u", ()))


class Slow:
    """A face that answers long requests when it is told to."""

    def __init__(self) -> None:
        self.go, self.begun = threading.Event(), 0

    def route(self, method: str, path: str) -> Route:
        works = {"/long": self.long, "/stream": self.stream, "/short": lambda call: Answer.of(1)}
        return Route(path[1:], works[path], long=path != "/short")

    def long(self, call: Call) -> Answer:
        self.begun += 1
        if call.caller.account == BUSY:
            self.go.wait(30)
        return Answer.of(call.caller.account)

    def stream(self, call: Call) -> Answer:
        return Answer(200, self.pieces(call.caller.account))

    def pieces(self, account: str) -> Iterator[bytes]:
        yield b"first"
        if account == BUSY:
            self.go.wait(30)
        yield b"last"

    def refusal(self, fault: Fault, request_id: str) -> Answer:
        return Answer.of({"code": fault.code, **fault.details}, 429)


@pytest.fixture
def face() -> Iterator[Slow]:
    made = Slow()
    yield made
    made.go.set()


@pytest.fixture
def place(face: Slow) -> Iterator[str]:
    unused: Any = face
    application = Application(
        Faces(face, face, face, unused), Door(), lambda caller: None, Observer(dict), Remembered(),
        lambda: None,
    )  # fmt: skip
    with served(application) as url:
        yield url.removeprefix("http://")
        face.go.set()


def ask(place: str, account: str, path: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(place, timeout=30)
    connection.request("POST", path, b"{}", {"Authorization": f"Bearer {account}"})
    answer = connection.getresponse()
    found = answer.status, answer.read()
    connection.close()
    return found


def test_long_requests_of_one_account_hold_no_other_up(face: Slow, place: str) -> None:
    count = LONG + 40
    with ThreadPoolExecutor(count) as pool:
        busy = [pool.submit(ask, place, BUSY, "/long") for _ in range(count)]
        deadline = time.monotonic() + 20
        while face.begun < int(LONG * SHARE) and time.monotonic() < deadline:
            time.sleep(0.01)
        began = time.monotonic()
        assert ask(place, QUIET, "/long") == (200, json.dumps(QUIET).encode())
        assert ask(place, BUSY, "/short")[0] == 200
        assert ask(place, QUIET, "/stream") == (200, b"firstlast")
        assert time.monotonic() - began < 5 and not any(each.done() for each in busy)
        assert face.begun == int(LONG * SHARE) + 1
        face.go.set()
        assert {each.result()[0] for each in busy} == {200}


def test_what_waits_beyond_its_share_is_told_to_come_again(face: Slow, place: str) -> None:
    async def filled() -> FairSlots:
        slots = FairSlots(1, 1)
        async with slots.turn("a"):
            tasks = [asyncio.ensure_future(_hold(slots, "a")) for _ in range(WAITING)]
            await asyncio.sleep(0)
            with pytest.raises(Fault) as refused:
                await _hold(slots, "a")
            assert refused.value.code == "Throttling" and refused.value.details["retry_after"]
        await asyncio.gather(*tasks)
        return slots

    asyncio.run(filled())
    most = int(STREAMS * SHARE)
    with ThreadPoolExecutor(most + 1) as pool:
        busy = [pool.submit(ask, place, BUSY, "/stream") for _ in range(most + 1)]
        deadline = time.monotonic() + 20
        while not any(each.done() for each in busy) and time.monotonic() < deadline:
            time.sleep(0.01)
        refused = next(each for each in busy if each.done()).result()
        assert refused[0] == 429 and json.loads(refused[1])["code"] == "Throttling"
        assert ask(place, QUIET, "/stream") == (200, b"firstlast")
        face.go.set()
        assert sorted(each.result()[0] for each in busy) == [200] * most + [429]


class TestLargeBodies:
    def test_one_account_has_no_more_than_its_share_and_the_other_is_next(self) -> None:
        large, order = LargeBodies(2, 1, 10), list[str]()
        going, most = Counter[str](), Counter[str]()
        lock = threading.Lock()

        def work(account: str) -> None:
            with large.turn(account, 11):
                with lock:
                    order.append(account)
                    going[account] += 1
                    most[account] = max(most[account], going[account])
                    most["all"] = max(most["all"], going.total())
                time.sleep(0.02)
                with lock:
                    going[account] -= 1

        with ThreadPoolExecutor(16) as threads:
            list(threads.map(work, ["a"] * 12 + ["b"] * 2 + ["c"] * 2))
        assert sorted(order) == ["a"] * 12 + ["b"] * 2 + ["c"] * 2
        assert most == {"a": 1, "b": 1, "c": 1, "all": 2}
        # As soon as they wait; "a" had begun with twelve.
        assert order.index("b") < 8 and order.index("c") < 8

    def test_small_ones_wait_for_nobody(self) -> None:
        large = LargeBodies(1, 1, 10)
        with large.turn("a", 11), large.turn("a", 10), large.turn("b", 10):
            pass

    def test_a_turn_ends_when_the_prompt_is_read(self) -> None:
        large, begun = LargeBodies(1, 1, 10), threading.Event()

        def next_one() -> None:
            with large.turn("b", 11):
                begun.set()

        with large.turn("a", 11):
            thread = threading.Thread(target=next_one)
            thread.start()
            assert not begun.wait(0.1)
            prompt_is_read()
            assert begun.wait(5)
            prompt_is_read()  # of a second prompt of the same request
        thread.join()
        for _ in range(3):  # none was given back twice, and none was kept
            with large.turn("a", 11):
                assert large._held.total() == 1
