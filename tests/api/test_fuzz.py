"""Whatever is sent to any route is answered: by no failure, in time, and in the words of its face.

``LUTHIER_TEST_EXAMPLES`` sets how many requests each face is sent in the slow form; a failure names the
seeds, and ``LUTHIER_TEST_SEED`` begins at another one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from broken_requests import ACCOUNT, ROWS
from luthier_server import add_base
from served import served
from wire_fuzz import Answered, Case, Keys, cases_of, drawn, send, wrong

from luthier.api.service import Service
from luthier.api.settings import Settings
from luthier.limits import ServerLimits

FACES = ("bedrock", "openai", "native", "s3")
SHORT, LONG = 120, int(os.environ.get("LUTHIER_TEST_EXAMPLES", "4000"))
FIRST = int(os.environ.get("LUTHIER_TEST_SEED", "0"))


class Running:
    def __init__(self, url: str, service: Service) -> None:
        assert service.issued is not None
        self.place = (str(urlsplit(url).hostname), int(urlsplit(url).port or 0))
        issued = service.issued
        faces: dict[str, Any] = {face.name: face for face in service.application.faces}
        self.keys = Keys(issued.access_key, issued.secret, issued.api_key)
        openai = [(each.method, f"/v1/{each.path}") for each in faces["openai"].router.operations]
        native = [(each.method, each.path) for each in faces["native"].router.operations]
        self.cases = {
            "openai": cases_of("openai", openai),
            "native": cases_of("native", native),
            "bedrock": cases_of("bedrock", ()),
            "s3": [],
        }

    def sent(self, face: str, seed: int) -> str:
        """What is wrong with the answer to a seed's request; empty where nothing is."""
        case = drawn(seed, face, self.cases[face], self.keys)
        try:
            fault = wrong(case, answer := send(self.place, case))
        except (OSError, ValueError) as error:
            return _told(seed, case, repr(error))
        return _told(seed, case, fault, answer) if fault else ""


def _told(seed: int, case: Case, fault: str, answer: Answered | None = None) -> str:
    body = answer.body[:300] if answer else b""
    sent = f"{case.method} {case.target[:300]} {case.body[:500]!r}"
    return f"seed {seed} of {case.face}: {fault}\n  {sent}\n  {case.headers}\n  {body!r}"


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def started(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model_folder: Path,
    family_folder: Callable[[str], Path],
) -> Iterator[tuple[Running, Path]]:
    home = tmp_path_factory.mktemp("fuzz")
    address = None
    if request.param == "postgresql":
        address = request.getfixturevalue("postgres").new_database()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LUTHIER_HOME", str(home))
        patch.delenv("LUTHIER_DATABASE", raising=False)
        add_base(home, "tiny", "causal_lm", tiny_model_folder)
        add_base(home, "encoder", "encoder", family_folder("bert"))
        # Refused requests of one address are slowed down, and here are hundreds of them.
        limits = ServerLimits(requests_per_second_per_address=100_000)
        service = Service(Settings(database=address, file_roots=(home / "files",), limits=limits))
        with served(service.application) as url:
            service.start(work=False)
            service.objects.create_bucket(ACCOUNT, "rows")
            service.locations.write(ACCOUNT, "s3://rows/", "train.jsonl", ROWS)
            yield Running(url, service), home
        service.close()


@pytest.fixture
def running(
    started: tuple[Running, Path], luthier_home: Path, monkeypatch: pytest.MonkeyPatch
) -> Running:
    """The server, on the store that it began with: each test has another one."""
    running, home = started
    monkeypatch.setenv("LUTHIER_HOME", str(home))
    return running


def check(running: Running, face: str, count: int) -> None:
    with ThreadPoolExecutor(4) as pool:
        answer = pool.map(lambda seed: running.sent(face, seed), range(FIRST, FIRST + count))
        found = [text for text in answer if text]
    assert not found, f"{len(found)} of {count}\n" + "\n".join(found[:20])


@pytest.mark.parametrize("face", FACES)
def test_every_answer_is_one(running: Running, face: str) -> None:
    check(running, face, SHORT)


@pytest.mark.slow
@pytest.mark.parametrize("face", FACES)
def test_every_answer_of_many_is_one(running: Running, face: str) -> None:
    check(running, face, LONG)
