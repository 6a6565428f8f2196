"""Tables of times and values become windows; other tables stay unchanged."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from luthier.data.in_memory import store_rows
from luthier.data.inputs import LONGEST_WINDOW, MOST_COLUMNS, Media, read_processor, save_processor
from luthier.data.prompts import load_inputs
from luthier.data.rows import RowReader, load_rows
from luthier.data.shapes.base import Shape
from luthier.data.shapes.media import BareWindow
from luthier.data.shapes.texts import RawText
from luthier.errors import DataError
from luthier.gate.row_keys import STRETCH, group_related
from luthier.media.processors import LARGEST_DEVIATION, WindowProcessor


def write(folder: Path, lines: list[str], header: str = "timestamp,value") -> Path:
    path = folder / "series.csv"
    path.write_text("\n".join([header, *lines]) + "\n")
    return path


def times(values: list[float]) -> list[str]:
    return [f"2026-11-23 {n // 60:02}:{n % 60:02},{value}" for n, value in enumerate(values)]


@pytest.mark.parametrize("header", ["timestamp,value", "Date,temperature", "ds,y"])
def test_row_is_a_value_with_history(tmp_path: Path, header: str) -> None:
    rows = load_rows(write(tmp_path, times([1.5, -2, 3e2]), header))
    assert [type(row) for row in rows] == [BareWindow] * 3
    windows = [row.media.values().tolist() for row in rows if isinstance(row, BareWindow)]
    assert windows == [[1.5], [1.5, -2.0], [1.5, -2.0, 300.0]]
    assert [row.line for row in rows] == [2, 3, 4]


def test_both_columns_are_read(tmp_path: Path) -> None:
    reader = RowReader(write(tmp_path, times([1.5, -2])))
    assert len(list(reader)) == 2 and reader.recognition.unread == ()


def test_a_history_has_an_end(tmp_path: Path) -> None:
    count = LONGEST_WINDOW + 3
    rows = load_rows(write(tmp_path, [f"{n},{n}" for n in range(count)]))
    last = rows[-1]
    assert isinstance(last, BareWindow) and len(rows) == count
    assert last.media.values().tolist() == list(range(3, count))


def test_large_counter_keeps_last_digits(tmp_path: Path) -> None:
    counts = [1_700_000_000.0 + n for n in range(4)]  # float32 knows every 128th of these
    for row in (load_rows(write(tmp_path, times(counts)))[-1], rows_of(tmp_path, counts)):
        assert isinstance(row, BareWindow)
        assert row.media.values().tolist() == counts
        small = WindowProcessor(4).array(window([0.0, 1.0, 2.0, 3.0]))
        np.testing.assert_allclose(WindowProcessor(4).array(row.media), small)


@pytest.mark.parametrize("start", ["", "nan", "N/A", "inf"])
def test_leading_missing_values_are_reported(tmp_path: Path, start: str) -> None:
    with pytest.raises(DataError) as caught:
        load_rows(write(tmp_path, [f"1,{start}", f"2,{start}", "3,3", "4,4"]))
    found = [(each.rule, each.line) for each in caught.value.problems]
    assert found == [("window.value", 2), ("window.value", 3)]


@pytest.mark.parametrize("bad", ["", "x", "nan", "inf", "1e308", "1_000", "١٢"])
def test_missing_value_is_reported(tmp_path: Path, bad: str) -> None:
    with pytest.raises(DataError) as caught:
        load_rows(write(tmp_path, ["1,1", f"noon,{bad}", "3,3"]))
    (problem,) = caught.value.problems
    assert (problem.rule, problem.line) == ("window.value", 3)


@pytest.mark.parametrize("time", ["nan", "", "NA"])
def test_a_missing_time_is_named(tmp_path: Path, time: str) -> None:
    with pytest.raises(DataError) as caught:
        load_rows(write(tmp_path, ["2020-02-03,1", f"{time},2", "2020-02-05,3"]))
    (problem,) = caught.value.problems
    assert (problem.rule, problem.line) == ("window.time", 3)


@pytest.mark.parametrize(
    "time", ["2020-02-29", "20200229", "2020-02-03T04:05:06.789+01:00", "2020-02-03 04:05 UTC",
             "03.02.2020", "noon", "17", "-1.5e3", "1580688000000"],
)  # fmt: skip
def test_unparsed_time_formats_are_accepted(tmp_path: Path, time: str) -> None:
    assert len(load_rows(write(tmp_path, ["2020-02-03,1", f"{time},2"]))) == 2


@pytest.mark.parametrize(
    ("header", "line"),
    [
        ("timestamp,inside,outside", "2026-11-23,20.5,3"),
        ("Date;kWh;EUR;anomaly", "23.11.2026;20.5;3;1.0"),
    ],
)
def test_several_number_columns_are_a_series_with_a_label(
    tmp_path: Path, header: str, line: str
) -> None:
    rows = load_rows(write(tmp_path, [line, line], header))
    windows = [row.media.values().tolist() for row in rows if isinstance(row, BareWindow)]
    assert windows == [[[20.5, 3.0]], [[20.5, 3.0]] * 2]
    assert [row.target() for row in rows] == (["fault"] * 2 if "anomaly" in header else [None] * 2)


def test_too_many_columns_give_a_single_problem(tmp_path: Path) -> None:
    names = [f"c{n}" for n in range(MOST_COLUMNS + 1)]
    line = ",".join(["2026-11-23", *"1" * len(names)])
    with pytest.raises(DataError) as caught:
        load_rows(write(tmp_path, [line, line], ",".join(["time", *names])))
    assert [(each.rule, each.line) for each in caught.value.problems] == [("window.columns", 0)]


@pytest.mark.parametrize(
    ("header", "columns"),
    [
        ("datum;temp;ort", {"ort": ""}),
        ("ort;wann;temp", {"timestamp": "wann", "value": "temp"}),
        ("ort;timestamp;temp", {"timestamp": "timestamp", "value": "temp"}),
        ("time;temp;nass", {"value": "temp"}),
    ],
)
def test_columns_select_a_series(tmp_path: Path, header: str, columns: dict[str, str]) -> None:
    cells = {"ort": "Gent", "nass": "7", "temp": "21.5"}
    line = ";".join(cells.get(name, "23.11.2026 08:00") for name in header.split(";"))
    rows = load_rows(write(tmp_path, [line, line], header), columns)
    windows = [row.media.values().tolist() for row in rows if isinstance(row, BareWindow)]
    assert windows == [[21.5], [21.5, 21.5]]


def test_date_column_with_foreign_name(tmp_path: Path) -> None:
    rows = load_rows(write(tmp_path, ["23.11.2026;1.5", "24.11.2026;1.7"], "datum;temp"))
    assert [type(row) for row in rows] == [BareWindow] * 2


@pytest.mark.parametrize("key", ["time", "timestamp", "date"])
def test_the_time_may_be_mapped(tmp_path: Path, key: str) -> None:
    path = write(tmp_path, ["7,23.11.2026,5", "8,24.11.2026,6"], "flow,Zeit,level")
    rows = load_rows(path, {key: "Zeit"})
    assert [row.media.values().tolist() for row in rows if isinstance(row, BareWindow)] == [
        [[7, 5]],
        [[7, 5], [8, 6]],
    ]


def test_text_next_to_numbers_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, ["23.11.2026,5,on,0"], "Zeit,flow,status,label")
    with pytest.raises(DataError) as caught:
        load_rows(path)
    (problem,) = caught.value.problems
    assert "data.columns.status=" in problem.advice and "label" not in problem.advice


def test_rows_in_memory_and_parquet_are_series(luthier_home: Path, tmp_path: Path) -> None:
    records = [{"time": f"2026-11-23 0{n}:00", "flow": n, "level": 2.5} for n in range(3)]
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow").Table.from_pylist(records)
    parquet.write_table(table, tmp_path / "rows.parquet")
    for path in (store_rows(records), tmp_path / "rows.parquet"):
        (*_, last) = load_rows(path)
        assert isinstance(last, BareWindow)
        assert last.media.values().tolist() == [[0, 2.5], [1, 2.5], [2, 2.5]]
    with pytest.raises(DataError) as caught:
        load_rows(store_rows([*records, {"time": "2026-11-23 03:00", "flow": 3}]))
    assert {each.rule for each in caught.value.problems} == {"window.value"}


def test_a_column_may_begin_late_in_memory(luthier_home: Path) -> None:
    records = [{"time": f"2026-11-23 0{n}:00", "flow": n, "level": None} for n in range(3)]
    with pytest.raises(DataError) as caught:
        load_rows(store_rows([*records, {"time": "2026-11-23 03:00", "flow": 3, "level": 1}]))
    assert {each.rule for each in caught.value.problems} == {"window.value"}


@pytest.mark.parametrize("line", ["23.11.2026,5,on", '23.11.2026,"5,2",on', "23.11.2026,,on"])
def test_text_is_named_next_to_commas_and_empty_cells(tmp_path: Path, line: str) -> None:
    for columns in ({}, {"time": "Zeit"}):
        with pytest.raises(DataError) as caught:
            load_rows(write(tmp_path, [line], "Zeit,flow,status"), columns)
        advice = caught.value.problems[0].advice
        assert "data.columns.status=" in advice and "flow" not in advice


def test_a_review_is_no_time_series(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_rows(write(tmp_path, ["2026-11-23,a good bell,5"], "date,review,stars"))
    assert "data.columns.text=review" in caught.value.problems[0].advice


def test_mapped_table_with_times_is_no_series(tmp_path: Path) -> None:
    path = write(tmp_path, ["2026-11-23,good,5,7"], "date,comment,likes,shares")
    (row,) = load_rows(path, {"text": "comment"})
    assert isinstance(row, RawText)


def test_decimal_commas_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_rows(write(tmp_path, ["23.11.2026;1,5", "24.11.2026;1,7"], "date;value"))
    assert [each.rule for each in caught.value.problems] == ["window.value"] * 2
    assert "1.5" in caught.value.problems[0].advice


@pytest.mark.parametrize(
    ("header", "line", "kind"),
    [("date,text", "1,2", RawText), ("date,comment", "1,good", None), ("id,value", "1,2", None)],
)
def test_similar_tables_are_not_time_series(
    tmp_path: Path, header: str, line: str, kind: type[Shape] | None
) -> None:
    path = write(tmp_path, [line], header)
    if kind is None:
        with pytest.raises(DataError) as caught:
            load_rows(path)
        assert {each.rule for each in caught.value.problems} == {"row.unknown_shape"}
    else:
        assert [type(row) for row in load_rows(path)] == [kind]


def test_jsonl_rows_contain_windows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"window": [1, 2.5, 3], "id": 4}) + "\n")
    ((record, row),) = load_inputs(path)
    assert record["id"] == 4 and isinstance(row, BareWindow)
    assert row.media.values().tolist() == [1.0, 2.5, 3.0]
    for bad in ([], [1, "2"], [True], "1,2", [float("nan")], None, [10**400], [1e308]):
        path.write_text(json.dumps({"window": bad}) + "\n")
        with pytest.raises(DataError) as caught:
            load_rows(path)
        assert {each.rule for each in caught.value.problems} <= {"media.type", "json.not_finite"}


def rows_of(folder: Path, values: list[float]) -> BareWindow:
    path = folder / "rows.jsonl"
    path.write_text(json.dumps({"window": values}) + "\n")
    (row,) = load_rows(path)
    assert isinstance(row, BareWindow)
    return row


def window(values: list[float]) -> Media:
    return Media("window", "w", array=np.array(values))


def test_window_is_scaled_by_history() -> None:
    history = np.random.default_rng(0).normal(5, 2, 40)
    (((read,),),) = [WindowProcessor(8).array(window(history.tolist()))]
    before = history[-8:-1].astype(np.float32)
    wanted = (history[-8:] - before.mean()) / (before.std() + 0.1 * history.std())
    np.testing.assert_allclose(read, wanted, rtol=1e-4, atol=1e-5)
    # The same anywhere, and at any scale.
    moved = WindowProcessor(8).array(window((history * 3 + 100).tolist()))
    np.testing.assert_allclose(moved[0, 0], read, rtol=1e-3, atol=1e-4)


def test_constant_and_short_windows_are_finite() -> None:
    processor = WindowProcessor(4)
    assert processor.array(window([7.0] * 9)).tolist() == [[[0.0] * 4]]
    assert processor.array(window([7.0])).tolist() == [[[0.0] * 4]]
    assert processor.array(window([1.0, 2.0, 3.0])).shape == (1, 1, 4)
    jump = processor.array(window([0.0] * 200 + [5.0]))
    assert jump[0, 0, -1] == LARGEST_DEVIATION


def test_a_processor_is_stored(tmp_path: Path) -> None:
    save_processor(WindowProcessor(12), tmp_path)
    assert read_processor(tmp_path) == WindowProcessor(12)


def test_neighbouring_windows_stay_in_same_split(tmp_path: Path) -> None:
    rows = load_rows(write(tmp_path, [f"{n},{n % 7}" for n in range(5 * STRETCH)]))
    groups = group_related(rows)
    assert len(set(groups.tolist())) == 6  # lines are counted from the header
    for part in ([0, 9, STRETCH - 3], [STRETCH - 2, STRETCH, 2 * STRETCH - 3]):
        assert len({groups[n] for n in part}) == 1


def test_missing_label_column_is_reported_with_the_nearest_name(tmp_path: Path) -> None:
    path = tmp_path / "pump.csv"
    lines = [f"2026-01-01 00:00:{second:02},{second},0" for second in range(30)]
    path.write_text("\n".join(["time,flow,anomaly", *lines]))
    with pytest.raises(DataError) as refused:
        load_rows(str(path), columns={"label": "anomalie"})
    (problem,) = refused.value.problems
    assert problem.rule == "column.missing" and "anomaly" in (problem.advice or "")
