"""Slots for requests: no account can occupy all slots."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from handler_api import Endpoint, handler_api
from served import served
from trails import Remembered

from luthier.limits import ServerLimits
from luthier.server.http.application import Application
from luthier.server.http.limits import Slots
from luthier.server.http.messages import Caller, Fault, Request, RequestHead, Response, Signed
from luthier.server.http.metrics import Metrics
from luthier.server.http.routes import handler_endpoint

BUSY, QUIET = "111111111111", "222222222222"
LIMITS = ServerLimits()
OF_ONE_ACCOUNT = LIMITS.share_of(LIMITS.model_requests)


def test_slots_are_shared_between_accounts() -> None:
    order: list[str] = []

    async def work(slots: Slots, account: str) -> None:
        async with slots.turn(account):
            order.append(account)
            await asyncio.sleep(0.05)

    async def main() -> None:
        slots = Slots(3, 2, 10)
        tasks = [asyncio.create_task(work(slots, "a")) for _ in range(6)]
        await asyncio.sleep(0.01)
        tasks.append(asyncio.create_task(work(slots, "b")))
        await asyncio.gather(*tasks)

    asyncio.run(main())
    assert order == ["a", "a", "b", "a", "a", "a", "a"]


def test_slot_timeout_is_throttled_and_loses_no_slot() -> None:
    async def main() -> None:
        slots = Slots(1, 1, 1)
        async with slots.turn("a"):
            for account in ("a", "b"):
                with pytest.raises(Fault) as refused:
                    async with slots.turn(account, 0.01):
                        pass
                assert refused.value.code == "Throttling" and refused.value.details["retry_after"]
            waiting = asyncio.create_task(_hold(slots, "a"))
            await asyncio.sleep(0)
            with pytest.raises(Fault):  # one waits already
                await _hold(slots, "a")
            given_up = asyncio.create_task(_hold(slots, "b"))
            await asyncio.sleep(0)
            given_up.cancel()
        await waiting
        async with slots.turn("b", 0):
            pass

    asyncio.run(main())


async def _hold(slots: Slots, account: str) -> None:
    async with slots.turn(account):
        await asyncio.sleep(0)


class Door:
    def authenticate(self, head: RequestHead, body: bytes | None) -> Signed:
        account = dict(head.headers)["authorization"].removeprefix("Bearer ")
        return Signed(Caller(account, "u", ("administrator",)))

    def recognize(self, head: RequestHead) -> Signed | None:
        return self.authenticate(head, b"")


class Slow:
    """An API that answers long requests when ``go`` is set."""

    def __init__(self) -> None:
        self.go, self.begun = threading.Event(), 0

    def choose(self, head: RequestHead) -> Endpoint:
        works = {
            "/long": self.long,
            "/stream": self.stream,
            "/short": lambda call: Response.json(1),
        }
        path = head.path
        return handler_endpoint(
            works[path], path[1:], "luthier:WhoAmI", 1000, uses_model=path != "/short"
        )

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
def api() -> Iterator[Slow]:
    made = Slow()
    yield made
    made.go.set()


@pytest.fixture
def place(api: Slow) -> Iterator[str]:
    application = Application(
        (handler_api("slow", api.choose, api.refusal),),
        Door(),
        lambda caller: None,
        Metrics(dict),
        Remembered(),
        lambda: None,
    )  # fmt: skip
    with served(application) as url:
        yield url.removeprefix("http://")
        api.go.set()


def ask(place: str, account: str, path: str, body: bytes = b"{}") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(place, timeout=30)
    connection.request("POST", path, body, {"Authorization": f"Bearer {account}"})
    answer = connection.getresponse()
    found = answer.status, answer.read()
    connection.close()
    return found


def test_long_requests_do_not_block_second_account(api: Slow, place: str) -> None:
    count = LIMITS.model_requests + 40
    with ThreadPoolExecutor(count) as pool:
        busy = [pool.submit(ask, place, BUSY, "/long") for _ in range(count)]
        deadline = time.monotonic() + 20
        while api.begun < OF_ONE_ACCOUNT and time.monotonic() < deadline:
            time.sleep(0.01)
        began = time.monotonic()
        assert ask(place, QUIET, "/long") == (200, json.dumps(QUIET).encode())
        assert ask(place, BUSY, "/short")[0] == 200
        assert ask(place, QUIET, "/stream") == (200, b"firstlast")
        assert time.monotonic() - began < 5 and not any(each.done() for each in busy)
        assert api.begun == OF_ONE_ACCOUNT + 1
        api.go.set()
        assert {each.result()[0] for each in busy} == {200}


def test_streams_beyond_account_share_are_throttled(api: Slow, place: str) -> None:
    most = LIMITS.share_of(LIMITS.streams)
    with ThreadPoolExecutor(most + 1) as pool:
        busy = [pool.submit(ask, place, BUSY, "/stream") for _ in range(most + 1)]
        deadline = time.monotonic() + 20
        while not any(each.done() for each in busy) and time.monotonic() < deadline:
            time.sleep(0.01)
        refused = next(each for each in busy if each.done()).result()
        assert refused[0] == 429 and json.loads(refused[1])["code"] == "Throttling"
        assert ask(place, QUIET, "/stream") == (200, b"firstlast")
        api.go.set()
        assert sorted(each.result()[0] for each in busy) == [200] * most + [429]
