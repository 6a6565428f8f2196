"""Rows of files to browse, and cleanings that write files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from native_client import ACCOUNT, native_client, native_context
from starlette.testclient import TestClient
from stored_objects import put_objects

from luthier.server.tables.database import Base, Database

ROWS = [
    {
        "text": f"The fox {n} runs home",
        "label": ("cat", "dog")[n % 2],
        "site": ("a", "b")[n % 3 > 0],
    }
    for n in range(12)
]
ADDRESS, PICTURE = "s3://rows/rows.jsonl", "s3://rows/picture.csv"


@pytest.fixture
def client(luthier_home: Path) -> Iterator[TestClient]:
    luthier_home.mkdir(exist_ok=True)
    database = Database()
    Base.metadata.create_all(database.engine)
    rows = "".join(json.dumps(row) + "\n" for row in [*ROWS, ROWS[3]])
    picture = b"\x89PNG\r\n\x1a\n" + bytes(range(256))
    put_objects(database, ACCOUNT, {"rows.jsonl": rows.encode(), "picture.csv": picture})
    yield native_client(native_context(database))
    database.close()


@pytest.mark.parametrize(
    ("filters", "lines"),
    [
        ({"limit": 2}, [1, 2]),
        ({"limit": 2, "position": 12}, [13]),
        ({"search": "FOX 1"}, [2, 11, 12]),
        ({"label": "dog", "search": "fox 3"}, [4, 13]),
        ({"lines": "2,5,99"}, [2, 5]),
        ({"slice": "site=a"}, [1, 4, 7, 10, 13]),
    ],
)
def test_rows_match_filter(
    client: TestClient, filters: dict[str, str | int], lines: list[int]
) -> None:
    found = client.get("/api/v1/rows", params={"address": ADDRESS, **filters}).json()
    assert [each["line"] for each in found["rows"]] == lines
    assert found["total"] == 13 and found["is_complete"]
    assert found["slices"] == ["site=a", "site=b"]
    assert found["labels"] == [{"label": "dog", "rows": 7}, {"label": "cat", "rows": 6}]


def test_unreadable_file_has_the_reason_of_the_inspection(client: TestClient) -> None:
    refused = client.get("/api/v1/rows", params={"address": PICTURE})
    report = client.post("/api/v1/inspections", json={"training": PICTURE, "base": "none"}).json()
    places = [place for rule in report["report"]["rules"] for place in rule["places"]]
    assert refused.status_code == 400
    assert refused.json()["error"]["message"].startswith(places[0]["message"])


def test_single_row_is_shown_with_tokens(client: TestClient) -> None:
    body = {"training": ADDRESS, "line": 4, "base": "none"}
    report = client.post("/api/v1/inspections", json=body).json()["report"]
    assert report["rows"]["train"] == 1
    missing = client.post("/api/v1/inspections", json={**body, "line": 99}).json()["error"]
    assert missing["parameter"] == "line"


def test_cleaning_writes_file_with_fixes_and_corrected_labels(client: TestClient) -> None:
    body = {"training": ADDRESS, "rules": ["duplicate.exact"], "labels": {"1": "wolf"}}
    made = client.post("/api/v1/cleanings", json=body).json()
    assert (made["rows_in"], made["rows_out"], made["name"]) == (13, 12, "rows-clean.jsonl")
    assert made["changed"] == {"relabel": 1} and made["dropped"] == {"duplicate.exact": 1}
    found = client.get("/api/v1/rows", params={"address": made["address"]}).json()
    assert [each["labels"] for each in found["rows"][:2]] == [["wolf"], ["dog"]]
    for address, name in ((ADDRESS, "rows-clean-2"), (made["address"], "rows-clean-3")):
        again = client.post("/api/v1/cleanings", json={**body, "training": address}).json()
        assert again["name"] == f"{name}.jsonl"
    unknown = client.post("/api/v1/cleanings", json={"training": ADDRESS, "rules": ["amount.few"]})
    assert unknown.json()["error"]["parameter"] == "rules"
