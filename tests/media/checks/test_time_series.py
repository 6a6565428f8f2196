"""Findings of the checks of time series, one rule at a time."""

from __future__ import annotations

from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path

import pytest

from luthier.data.rows import load_rows
from luthier.gate.rules import Finding
from luthier.gate.scan import inspect_rows
from luthier.media.checks.time_series import LEAST_VALUES, TimeSeries
from luthier.types import Row

START = datetime(2026, 1, 1)


def rows_of(folder: Path, times: list[str]) -> list[Row]:
    path = folder / "series.csv"
    lines = [f"{time},{number % 7}" for number, time in enumerate(times)]
    path.write_text("\n".join(["timestamp,value", *lines]) + "\n")
    return load_rows(path)


def hours(*numbers: float) -> list[str]:
    return [str(START + timedelta(hours=number)) for number in numbers]


def found(folder: Path, times: list[str], split: str = "train") -> dict[str, list[Finding]]:
    return dict(inspect_rows({split: rows_of(folder, times)}, [TimeSeries()]).findings.examples)


def places(findings: dict[str, list[Finding]]) -> dict[str, list[int]]:
    return {rule: [each.place.line for each in own] for rule, own in findings.items()}


def test_an_even_series_has_no_fault(tmp_path: Path) -> None:
    assert not found(tmp_path, hours(*range(LEAST_VALUES)))


def test_too_few_training_values_are_an_error(tmp_path: Path) -> None:
    few = hours(*range(LEAST_VALUES - 1))
    ((finding,),) = found(tmp_path, few).values()
    assert (finding.rule.id, finding.rule.severity) == ("window.few", "error")
    assert "99" in finding.message and "100" in finding.message
    assert not found(tmp_path, few, "validation")


def test_gaps_duplicates_and_disorder_name_their_lines(tmp_path: Path) -> None:
    numbers = [*range(50), 49, *range(60, 100), *range(99, 140)]
    numbers[20] = 18.5
    findings = found(tmp_path, hours(*numbers))
    assert places(findings) == {
        "window.order": [22],
        "window.duplicate": [52, 93],
        "window.gap": [53],
        "window.short_gaps": [0],
    }
    severities = {each.rule.severity for own in findings.values() for each in own}
    assert severities == {"warning", "note"}
    assert "30 minutes" in findings["window.order"][0].message
    last = findings["window.gap"][-1].message
    assert "11 hours" in last and "60 minutes" in last


def test_short_gaps_are_one_note(tmp_path: Path) -> None:
    numbers = [n for n in range(300) if n % 20 and n % 50 not in (11, 12)]
    ((finding,),) = found(tmp_path, hours(*numbers)).values()
    assert (finding.rule.id, finding.rule.severity) == ("window.short_gaps", "note")
    count = sum(late - early > 1 for early, late in pairwise(numbers))
    assert str(count) in finding.message


def test_reversed_series_is_an_error(tmp_path: Path) -> None:
    ((finding,),) = found(tmp_path, hours(*range(120, 0, -1))).values()
    assert (finding.rule.id, finding.rule.severity) == ("window.reversed", "error")
    assert "119 of 119" in finding.message


def test_working_days_and_months_are_even(tmp_path: Path) -> None:
    days = [day for day in range(200) if (START + timedelta(days=day)).weekday() < 5]
    assert not found(tmp_path, hours(*(24 * day for day in days)))
    dates = [f"{year}{month:02}01" for year in range(2000, 2010) for month in range(1, 13)]
    assert not found(tmp_path, dates)


@pytest.mark.parametrize(
    ("first", "step", "usual"),
    [(0, " 660 ", " 60 "), (1_711_112_200, " 11 minutes ", " 60 seconds ")],
)
def test_times_may_be_numbers(first: int, step: str, usual: str, tmp_path: Path) -> None:
    numbers = [first + 60 * n for n in [*range(100), *range(110, 120)]]
    ((finding,),) = found(tmp_path, [str(each) for each in numbers]).values()
    assert (finding.rule.id, finding.place.line) == ("window.gap", 102)
    assert step in finding.message and usual in finding.message


@pytest.mark.parametrize("form", ["%d/%m/%Y %H:%M", "%m/%d/%Y %I:%M %p", "%d.%m.%y %H:%M:%S"])
def test_times_of_exports(tmp_path: Path, form: str) -> None:
    moments = [START + timedelta(hours=number) for number in (*range(150), 149, 165)]
    texts = [moment.strftime(form) for moment in moments]
    expected = {"window.duplicate": [152], "window.gap": [153]}
    assert places(found(tmp_path, texts)) == expected
    assert set(found(tmp_path, texts[::-1])) == {"window.reversed"}


def test_serial_dates_of_excel(tmp_path: Path) -> None:
    serial = [f"{45_292 + number / 24:.10f}" for number in (*range(150), 165)]
    assert places(found(tmp_path, serial)) == {"window.gap": [152]}


def test_unreadable_times_are_reported(tmp_path: Path) -> None:
    ((finding,),) = found(tmp_path, ["noon"] * LEAST_VALUES).values()
    assert (finding.rule.id, finding.place.line) == ("window.unread", 0)
    assert "100 of 100" in finding.message


def test_windows_without_times(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"window": [1, 2, 3]}\n' * LEAST_VALUES)
    findings = inspect_rows({"train": load_rows(path)}, [TimeSeries()]).findings
    assert not findings.examples


def test_summary_lists_columns_faults_and_events(tmp_path: Path) -> None:
    faults = {20, 21, 22, 60, 119}
    lines = [f"{n},{n % 7},{n % 5},{int(n in faults)}" for n in range(120)]
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text("\n".join(["time,level,flow,anomaly", *lines]))
    report = inspect_rows({"train": load_rows(tmp_path)}, [TimeSeries()])
    assert report.summaries["time_series"] == {
        "splits": {"train": {"columns": ["level", "flow"], "fault_rows": 10, "events": 6}}
    }
    plain = inspect_rows({"train": rows_of(tmp_path, hours(*range(120)))}, [TimeSeries()])
    assert not plain.summaries.get("time_series")


def findings_of(folder: Path, **files: list[str]) -> dict[str, list[Finding]]:
    """Inspect training files of the columns flow, valve and label."""
    folder.mkdir(exist_ok=True)
    for name, lines in files.items():
        rows = [f"{n},{n % 7},{line}" for n, line in enumerate(lines)]
        (folder / f"{name}.csv").write_text("\n".join(["time,flow,valve,label", *rows]))
    return dict(inspect_rows({"train": load_rows(folder)}, [TimeSeries()]).findings.examples)


def test_columns_that_are_constant_without_faults_are_named(tmp_path: Path) -> None:
    still, moved, fault = ["3,0"] * LEAST_VALUES, ["4,0"] * LEAST_VALUES, ["9,leak"] * 5
    ((finding,),) = findings_of(tmp_path / "a", train=still + fault).values()
    assert finding.rule.id == "window.constant" and "valve" in finding.message
    assert not findings_of(tmp_path / "b", one=still, other=moved)


def test_training_rows_of_faults_alone_are_an_error(tmp_path: Path) -> None:
    found = findings_of(tmp_path, train=["3,running"] * LEAST_VALUES)
    assert "window.faults" in found
    mixed = findings_of(tmp_path, other=["3,normal"] * (LEAST_VALUES - 10))
    assert "window.mostly_faults" in mixed and "window.faults" not in mixed


def test_windows_of_unequal_width_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"window": [1, 2]}\n{"window": [[1, 2], [3, 4]]}\n')
    inspect_rows({"train": load_rows(path)}, [TimeSeries()])


def test_every_rule_is_met_here() -> None:
    source = Path(__file__).read_text()
    for rule in TimeSeries.rules:
        assert f'"{rule.id}"' in source, rule.id
