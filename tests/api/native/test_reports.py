"""What estimates are made of, and whether they tell where rows lie on the server."""

from __future__ import annotations

import json
import subprocess
import tomllib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from luthier.api.http.messages import Caller, Fault, Request, RequestHead
from luthier.api.native import reports
from luthier.api.native.operations import Context, NativeFace
from luthier.limits import AccountQuotas
from luthier.store.arns import Arns
from luthier.store.database import Database
from luthier.store.locations import Locations

ROW = json.dumps({"prompt": "a", "completion": "b"}) + "\n"


def test_an_estimate_reads_all_held_out_rows_and_tells_no_path(
    luthier_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    luthier_home.mkdir(exist_ok=True)
    names = ("rows", "held", "also")
    for name in names:
        (tmp_path / f"{name}.jsonl").write_text(ROW)
    training, *validation = [f"file://{tmp_path}/{name}.jsonl" for name in names]
    database = Database()
    context = Context(
        database,
        Arns("us-east-1"),
        Locations(database, file_roots=[tmp_path]),
        lambda *given: None,
        lambda account: AccountQuotas(),
        lambda: None,
        lambda model: None,
    )
    seen: list[str] = []

    def refuse(command: list[str], **options: Any) -> Any:
        recipe = Path(next(each for each in command if each.endswith("recipe.toml")))
        held = Path(tomllib.loads(recipe.read_text())["data"]["validation"])
        files = sorted(held.rglob("*.jsonl"))
        seen.extend(file.name for file in files)
        result = "\n".join(f"{each} is wrong" for each in (*files, held))
        answer = json.dumps({"error": {"message": result}})
        return subprocess.CompletedProcess(command, 2, answer, "what is on the terminal")

    monkeypatch.setattr(subprocess, "run", refuse)
    face = NativeFace(reports.operations(context))
    route = face.route(RequestHead("POST", "/api/v1/estimates", "", [], tls=False))
    body = json.dumps({"training": training, "validation": validation}).encode()
    caller = Caller("111111111111", "anna", ())
    path = "/api/v1/estimates"
    call = Request("r1", caller, "POST", path, {}, {}, body, datetime.now(UTC), route.params)
    with pytest.raises(Fault) as refused:
        route.operation.handler(call)
    database.close()
    assert sorted(seen) == ["also.jsonl", "held.jsonl"]
    held, also = validation
    assert refused.value.message.splitlines() == [
        f"{held} is wrong",
        f"{also} is wrong",
        f"{held}, {also} is wrong",
    ]
