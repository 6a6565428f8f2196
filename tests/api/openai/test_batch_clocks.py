"""Two servers at one batch, and the clock of one of them jumps by an hour."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from shifted_clock import shifted

from luthier.store import batches as store
from luthier.store.accounts import Account
from luthier.store.database import Database, now
from luthier.store.objects import Objects
from luthier.store.principals import User
from luthier.store.schema import METADATA
from luthier.store.uploaded_files import UploadedFiles

ACCOUNT, CHAT, LINES = "000000000000", "/v1/chat/completions", 160
SERVER = """
import json, sys, threading, time
from datetime import timedelta
from luthier.api import background
from luthier.api.openai.batches import BatchRunner
from luthier.store import batches
from luthier.store.database import Database
from luthier.store.objects import Objects
from luthier.store.uploaded_files import UploadedFiles
url, told = json.loads(sys.argv[1])
batches.Batch.lease_time = timedelta(seconds=2)
background.IDLE = 0.1
database = Database(url)
files = UploadedFiles(database, Objects(database))
lock = threading.Lock()

def answer(caller, body):
    with lock, open(told, "a") as file:
        file.write(f"{body['n']} {time.time()}\\n")
    # libfaketime breaks time.sleep
    threading.Event().wait(0.5)
    return {}

runner = BatchRunner(database, files, {"/v1/chat/completions": answer})
runner.renewal = 0.3
runner.start()
threading.Event().wait(1000)
"""


def until(wanted: Callable[[], Any], seconds: float = 40) -> None:
    deadline = time.monotonic() + seconds
    while not wanted():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("who", ["working", "watching"])
@pytest.mark.parametrize("hours", ["+1h", "-1h"])
def test_a_clock_that_jumps_costs_no_batch(
    database_url: str, tmp_path: Path, who: str, hours: str
) -> None:
    faked = shifted(tmp_path / "shift")
    database = Database(database_url)
    METADATA.create_all(database.engine)
    files = UploadedFiles(database, Objects(database))
    asked = [{"custom_id": f"r{n}", "method": "POST", "url": CHAT, "body": {"n": n}}
             for n in range(LINES)]  # fmt: skip
    text = "".join(json.dumps(each) + "\n" for each in asked).encode()
    with database.write() as session:
        session.add(Account(id=ACCOUNT, name="", disabled=False, created=now()))
        session.flush()
        session.add(User(account=ACCOUNT, name="u", role="developer", created=now()))
    held = files.add(ACCOUNT, [text], "in.jsonl", "batch")
    caller = {"account": ACCOUNT, "user": "u"}
    with database.write() as session:
        batch_id = store.create(session, ACCOUNT, caller, CHAT, "24h", held.id, {}).id

    def start(name: str) -> subprocess.Popen[bytes]:
        argument = json.dumps([database_url, str(tmp_path / name)])
        environment = {**os.environ, **(faked if name == who else {})}
        return subprocess.Popen([sys.executable, "-c", SERVER, argument], env=environment)

    def answered(name: str) -> list[list[str]]:
        path = tmp_path / name
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []

    def ended() -> Any:
        with database.read() as session:
            found = store.get(session, ACCOUNT, batch_id)
            assert found is not None
            return found if found.status in store.ENDED else None

    working = start("working")
    processes = [working]
    try:
        until(lambda: answered("working"))
        processes.append(start("watching"))
        time.sleep(1.5)
        (tmp_path / "shift").write_text(hours)
        time.sleep(4)
        assert answered("watching") == [], "a batch was taken from a server that works on it"
        working.kill()
        until(ended)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    batch = ended()
    assert (batch.status, batch.succeeded, batch.failed) == ("completed", LINES, 0)
    row = files.get(ACCOUNT, batch.output_file)
    assert row is not None
    found = [json.loads(line)["custom_id"] for line in b"".join(files.read(row)).splitlines()]
    assert found == [f"r{n}" for n in range(LINES)]
    times = [float(moment) for _, moment in answered(who)]
    if who == "working":
        assert max(times) - min(times) > 3000, "the clock did not jump"
    else:
        assert abs(min(times) - time.time()) > 3000, "the clock did not jump"
    database.close()
