"""Usage is stored per day, regardless of when and how often the meter writes."""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from datetime import UTC, date, datetime
from itertools import pairwise
from pathlib import Path

import pytest
from principals_of import FIRST
from prometheus_client.parser import text_string_to_metric_families
from served import served
from sqlalchemy import select

from luthier.library.models import StoredModel
from luthier.models.manifest import Manifest
from luthier.server.http import metrics
from luthier.server.http.metrics import Meter
from luthier.server.service import Service
from luthier.server.settings import Settings
from luthier.server.tables.database import Database
from luthier.server.tables.usage import DailyUsage, Usage


@pytest.mark.parametrize(
    ("model_id", "label"),
    [
        ("smollm2-135m-instruct", "smollm2-135m-instruct"),
        ("smollm2-135m-instruct:job-abcdef012345", "smollm2-135m-instruct:job-abcdef012345"),
        ("imported:model-abcdef012345", "imported:model-abcdef012345"),
        ("smollm2-135m-instruct:secret-merger", "other"),
        ("smollm2-135m-instruct:job-secretmergers", "other"),
        ("acme:job-abcdef012345", "other"),
        ("acme", "other"),
    ],
)
def test_metric_label_of_model_has_no_private_name(model_id: str, label: str) -> None:
    assert metrics.model_label(model_id) == label


def test_metrics_of_requests_by_model_and_status() -> None:
    made = metrics.Metrics(dict)
    model = "smollm2-135m-instruct:job-abcdef012345"
    for status, waited in ((200, 0.02), (503, 3.0), (404, None)):
        record = metrics.RequestRecord("r", "POST", "", "openai", status=status)
        record.queue_seconds = waited
        if status != 404:
            record.add_model(model)
        made.count_request(record, 0.2)
    text = made.exposition()[0].decode()
    families = text_string_to_metric_families(text)
    found = {(each.name, *each.labels.values()): each.value
             for family in families for each in family.samples}  # fmt: skip
    assert found["luthier_model_requests_total", model, "200"] == 1
    assert found["luthier_model_requests_total", model, "503"] == 1
    assert found["luthier_model_request_seconds_count", model] == 1
    assert found["luthier_queue_seconds_count", "openai"] == 2
    assert found["luthier_queue_seconds_sum", "openai"] == 3.02
    assert not [name for name in text.split() if "_created" in name]


BEFORE, AFTER = datetime(2026, 1, 1, 23, 59, tzinfo=UTC), datetime(2026, 1, 2, tzinfo=UTC)


@pytest.fixture
def meter(database: Database) -> Iterator[Meter]:
    made = Meter(database, write_seconds=3600)
    yield made
    made.close()


def requests(database: Database) -> dict[date, int]:
    with database.read() as session:
        return {row.day: row.requests for row in session.scalars(select(DailyUsage))}


def test_usage_is_counted_per_day_without_immediate_write(
    database: Database, meter: Meter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "now", lambda: BEFORE)
    meter.count(FIRST, "root", "", Usage(requests=3))
    monkeypatch.setattr(metrics, "now", lambda: AFTER)
    # A database that waits for another writer would hold up the event loop.
    with monkeypatch.context() as away:
        away.setattr(database, "write", lambda: pytest.fail("it wrote"))
        meter.count(FIRST, "root", "", Usage(requests=5))
    assert requests(database) == {}
    meter.write()
    assert requests(database) == {BEFORE.date(): 3, AFTER.date(): 5}


def test_unwritten_usage_is_counted_on_original_day(
    database: Database, meter: Meter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "now", lambda: BEFORE)
    meter.count(FIRST, "root", "", Usage(requests=3))
    monkeypatch.setattr(metrics, "now", lambda: AFTER)
    with monkeypatch.context() as away:
        away.setattr(metrics, "add_usage", lambda *arguments: 1 / 0)
        meter.write()
    meter.count(FIRST, "root", "", Usage(requests=5))
    meter.write()
    assert requests(database) == {BEFORE.date(): 3, AFTER.date(): 5}


def usage_of(service: Service) -> Usage:
    """Return the sum of the counts so far."""
    service.meter.write()
    total = Usage()
    with service.database.read() as session:
        for row in session.scalars(select(DailyUsage)):
            assert row.user == "root"
            total.add(Usage(requests=row.requests, bytes_out=row.bytes_out))
    return total


def test_console_reads_are_not_counted_as_requests(luthier_home: Path) -> None:
    service = Service(Settings(run_jobs=False))
    assert service.issued is not None
    own = {"Authorization": f"Bearer {service.issued.api_key}"}
    console = {**own, "X-Luthier-Console": "1"}
    calls = [
        ("GET", "/api/v1/jobs", own, 1),
        ("GET", "/api/v1/jobs", console, 0),
        ("GET", "/v1/files", console, 1),
        ("POST", "/api/v1/jobs/none/stop", console, 1),
    ]
    counts, sent = [0], [0]
    with served(service.application) as url:
        for method, path, headers, _ in calls:
            request = urllib.request.Request(f"{url}{path}", None, headers, method=method)
            try:
                urllib.request.urlopen(request, timeout=30).close()
            except urllib.error.HTTPError as refused:
                refused.close()
            # The server counts a request after the last byte of the answer.
            until = time.monotonic() + 20
            while (used := usage_of(service)).bytes_out == sent[-1]:
                assert time.monotonic() < until
                time.sleep(0.01)
            counts.append(used.requests)
            sent.append(used.bytes_out)  # bytes count for reads of the console, too
    service.close()
    expected = [each[-1] for each in calls]
    assert [after - before for before, after in pairwise(counts)] == expected


def test_metrics_do_not_name_models_of_accounts(luthier_home: Path) -> None:
    base = "all-minilm-l6-v2"
    roots = {base: None, f"{base}:jobs": base, "made-here": None, "imported:theirs": None}
    service = Service(Settings())
    table = service.pool._latencies
    assert table is not None
    for name, root in roots.items():
        table.of(StoredModel(name, Path(), Manifest(id=name, root=root)))
    labels = {each.labels["model"] for family in table.collect() for each in family.samples}
    assert labels == {base, "other"}
    service.close()
