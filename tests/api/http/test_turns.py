"""Turns between accounts: whoever holds the fewest is next, and nobody holds all."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from served import served
from trails import Remembered

from luthier.api.http.application import Application
from luthier.api.http.limits import REST_FACTOR, SHORT_REQUESTS_PER_CLIENT, FairSlots
from luthier.api.http.messages import Caller, Fault, Request, RequestHead, Response, Signed
from luthier.api.http.metrics import Metrics
from luthier.api.http.routing import Operation, Route
from luthier.limits import ServerLimits
from luthier.serving.prompts import prompt_tokenized

BUSY, QUIET = "111111111111", "222222222222"
LIMITS = ServerLimits()
WAITING = LIMITS.waiting_requests
COMPUTED = 0.02
"""Seconds of a processor for one short request."""
OF_ONE_ACCOUNT = LIMITS.share_of(LIMITS.model_requests)


def test_the_account_that_holds_the_fewest_is_next() -> None:
    order: list[str] = []

    async def work(slots: FairSlots, account: str, seconds: float) -> None:
        async with slots.turn(account):
            order.append(account)
            await asyncio.sleep(seconds)

    async def main() -> None:
        slots = FairSlots(2, 2, WAITING)
        tasks = [asyncio.create_task(work(slots, "a", 0.05)) for _ in range(6)]
        await asyncio.sleep(0.01)
        tasks += [asyncio.create_task(work(slots, "b", 0.05)) for _ in range(2)]
        await asyncio.gather(*tasks)

    asyncio.run(main())
    assert order[:2] == ["a", "a"] and order[2] == "b"
    assert sorted(order) == ["a"] * 6 + ["b"] * 2


def test_a_heavy_turn_waits_for_room_and_nobody_passes_it() -> None:
    order: list[str] = []

    async def work(slots: FairSlots, account: str, weight: int) -> None:
        async with slots.turn(account, weight):
            order.append(f"{account}{weight}")
            await asyncio.sleep(0.02)

    async def main() -> None:
        slots = FairSlots(10, 8, WAITING)
        tasks = []
        for account, weight in (("a", 6), ("b", 6), ("c", 1), ("a", 99), ("c", 1)):
            tasks.append(asyncio.create_task(work(slots, account, weight)))
            await asyncio.sleep(0)
        await asyncio.gather(*tasks)
        assert slots._held.total() == 0 and not slots._waiting

    asyncio.run(main())
    # a and b do not fit beside each other, c comes behind b; a's 99 are its share of 8.
    assert order[:2] == ["a6", "b6"] and sorted(order) == ["a6", "a99", "b6", "c1", "c1"]


def test_a_turn_that_does_not_come_in_time_is_told_so() -> None:
    async def main() -> None:
        slots = FairSlots(10, 10, WAITING)
        async with slots.turn("a", 10):
            began = time.monotonic()
            with pytest.raises(Fault) as refused:
                async with slots.turn("b", 5, seconds=0.05):
                    pass
            assert refused.value.code == "Throttling" and time.monotonic() - began < 5
        async with slots.turn("c", 10, seconds=0.05):
            assert not slots._waiting

    asyncio.run(main())


def test_a_turn_that_is_given_up_goes_to_the_next() -> None:
    async def main() -> None:
        slots = FairSlots(1, 1, WAITING)
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
        with slots.try_turn("c"), pytest.raises(Fault, match="wait"), slots.try_turn("d"):
            pass
        with slots.try_turn("d"):
            pass

    asyncio.run(main())


def test_a_turn_that_is_given_up_as_it_comes_is_not_lost() -> None:
    async def main() -> None:
        slots = FairSlots(1, 1, WAITING)
        release = await slots.acquire("a")
        # Given up, and in the same moment its turn has come: its entry is skipped.
        late = asyncio.ensure_future(_hold(slots, "b"))
        await asyncio.sleep(0)
        late.cancel()
        release()
        with pytest.raises(asyncio.CancelledError):
            await late
        assert await asyncio.wait_for(_hold(slots, "c"), 1) == "c"
        assert not slots._waiting and slots._held.total() == 0

    asyncio.run(main())


async def _hold(slots: FairSlots, account: str) -> str:
    async with slots.turn(account):
        return account


class Door:
    def authenticate(self, head: RequestHead, body: bytes | None) -> Signed:
        account = dict(head.headers)["authorization"].removeprefix("Bearer ")
        return Signed(Caller(account, "u", ("administrator",)))

    def recognize(self, head: RequestHead) -> Signed | None:
        return self.authenticate(head, b"")


class Slow:
    """A face that answers long requests when it is told to."""

    def __init__(self) -> None:
        self.go, self.begun = threading.Event(), 0
        self.read, self.reading = threading.Event(), list[str]()

    name, request_id_header = "slow", "x-request-id"

    def serves(self, head: RequestHead, service: str) -> bool:
        return True

    def route(self, head: RequestHead) -> Route:
        path = head.path
        works = {
            "/long": self.long, "/stream": self.stream, "/short": lambda call: Response.json(1),
            "/long-short": lambda call: Response.json(1), "/read": self.read_prompt,
            "/computed": self.compute,
        }  # fmt: skip
        long = path not in ("/short", "/computed")
        action = "luthier:WhoAmI"
        return Route(Operation(path[1:], head.method, path, works[path], long=long, action=action))

    def compute(self, request: Request) -> Response:
        began = time.thread_time()
        while time.thread_time() - began < COMPUTED:
            pass
        return Response.json(1)

    def read_prompt(self, request: Request) -> Response:
        self.reading.append(request.caller.account)
        self.read.wait(30)
        prompt_tokenized()
        prompt_tokenized()  # of a second prompt of the same request
        self.go.wait(30)
        return Response.json(1)

    def long(self, request: Request) -> Response:
        self.begun += 1
        if request.caller.account == BUSY:
            self.go.wait(30)
        return Response.json(request.caller.account)

    def stream(self, request: Request) -> Response:
        return Response(200, self.pieces(request.caller.account))

    def pieces(self, account: str) -> Iterator[bytes]:
        yield b"first"
        if account == BUSY:
            self.go.wait(30)
        yield b"last"

    def refusal(self, fault: Fault, request_id: str) -> Response:
        return Response.json({"code": fault.code, **fault.details}, 429)


@pytest.fixture
def face() -> Iterator[Slow]:
    made = Slow()
    yield made
    made.go.set()


@pytest.fixture
def place(face: Slow) -> Iterator[str]:
    application = Application(
        (face,), Door(), lambda caller: None, Metrics(dict), Remembered(), lambda: None
    )
    with served(application) as url:
        yield url.removeprefix("http://")
        face.go.set()


def ask(place: str, account: str, path: str, body: bytes = b"{}") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(place, timeout=30)
    connection.request("POST", path, body, {"Authorization": f"Bearer {account}"})
    answer = connection.getresponse()
    found = answer.status, answer.read()
    connection.close()
    return found


def test_long_requests_of_one_account_hold_no_other_up(face: Slow, place: str) -> None:
    count = LIMITS.model_requests + 40
    with ThreadPoolExecutor(count) as pool:
        busy = [pool.submit(ask, place, BUSY, "/long") for _ in range(count)]
        deadline = time.monotonic() + 20
        while face.begun < OF_ONE_ACCOUNT and time.monotonic() < deadline:
            time.sleep(0.01)
        began = time.monotonic()
        assert ask(place, QUIET, "/long") == (200, json.dumps(QUIET).encode())
        assert ask(place, BUSY, "/short")[0] == 200
        assert ask(place, QUIET, "/stream") == (200, b"firstlast")
        assert time.monotonic() - began < 5 and not any(each.done() for each in busy)
        assert face.begun == OF_ONE_ACCOUNT + 1
        face.go.set()
        assert {each.result()[0] for each in busy} == {200}


def test_short_requests_leave_time_to_those_beside_them(face: Slow, place: str) -> None:
    with ThreadPoolExecutor(1) as pool:
        busy = pool.submit(ask, place, BUSY, "/long")
        while not face.begun:
            time.sleep(0.01)
        began = time.monotonic()
        with ThreadPoolExecutor(4) as others:
            asked = [others.submit(ask, place, QUIET, "/computed") for _ in range(8)]
        seconds = time.monotonic() - began
        face.go.set()
        assert {each.result()[0] for each in (busy, *asked)} == {200}
    # All slots rest after each but the last ones.
    assert seconds > (8 // SHORT_REQUESTS_PER_CLIENT - 1) * (1 + REST_FACTOR) * COMPUTED


def test_slots_that_rest_are_free_for_others() -> None:
    async def main() -> None:
        slots = FairSlots(2, 1, WAITING)
        release = await slots.acquire("a")
        assert slots.used_by_others("b") and not slots.used_by_others("a")
        release(rest=0.2)
        assert not slots.used_by_others("b")
        began = time.monotonic()
        async with slots.turn("b", seconds=0.1), slots.turn("c", seconds=0.1):
            pass  # all of them
        assert await _hold(slots, "a") == "a" and time.monotonic() - began > 0.1
        release(rest=60)  # it was released before
        assert await asyncio.wait_for(_hold(slots, "a"), 1) == "a"

    asyncio.run(main())


def test_what_waits_beyond_its_share_is_told_to_come_again(face: Slow, place: str) -> None:
    async def filled() -> FairSlots:
        slots = FairSlots(1, 1, WAITING)
        async with slots.turn("a"):
            tasks = [asyncio.ensure_future(_hold(slots, "a")) for _ in range(WAITING)]
            await asyncio.sleep(0)
            with pytest.raises(Fault) as refused:
                await _hold(slots, "a")
            assert refused.value.code == "Throttling" and refused.value.details["retry_after"]
        await asyncio.gather(*tasks)
        return slots

    asyncio.run(filled())
    most = LIMITS.share_of(LIMITS.streams)
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


def test_large_bodies_are_read_in_turns_and_written_for_side_by_side(
    face: Slow, place: str
) -> None:
    large = b'"' + b"a" * 200_000 + b'"'
    with ThreadPoolExecutor(8) as pool:
        busy = [pool.submit(ask, place, BUSY, "/read", large) for _ in range(3)]
        deadline = time.monotonic() + 20
        while not face.reading and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)
        assert face.reading == [BUSY]  # the others wait for it
        assert ask(place, BUSY, "/long-short")[0] == 200  # a small one does not
        other = pool.submit(ask, place, QUIET, "/read", large)
        while len(face.reading) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert face.reading == [BUSY, QUIET]
        # Once its prompt is read, the next of the account is, while the first is written for.
        face.read.set()
        while len(face.reading) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert face.reading == [BUSY, QUIET, BUSY, BUSY] and not any(
            each.done() for each in (*busy, other)
        )
        face.go.set()
        assert {each.result()[0] for each in (*busy, other)} == {200}
