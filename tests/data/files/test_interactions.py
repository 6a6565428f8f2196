"""Logs of users and items: items in the order of the times, and which tables are logs."""

from __future__ import annotations

from pathlib import Path

import pytest

from luthier.data.files.read import read_records
from luthier.data.in_memory import store_rows
from luthier.data.prompts import load_inputs
from luthier.data.rows import RowReader, load_rows
from luthier.data.shapes.texts import History
from luthier.errors import DataError, Problem

LOG = """userId,movieId,rating,timestamp
7,a,5,1112486027
8,b,4,1112484676
7,c,3,1112484819
7,d,1,1112484999
8,e,2,1112484000
9,a,2,1112484000
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "log.csv"
    path.write_text(text)
    return path


def histories(path: Path, columns: dict[str, str] | None = None) -> list[tuple[list[str], str]]:
    rows = load_rows(str(path), columns)
    assert all(isinstance(row, History) for row in rows)
    return [(row.items[::-1], row.positive) for row in rows if isinstance(row, History)]


def test_a_log_is_a_history_for_each_user_in_the_order_of_the_times(tmp_path: Path) -> None:
    path = write(tmp_path, LOG)
    assert histories(path) == [(["c", "d"], "a"), (["e"], "b")]
    reader = RowReader(str(path))
    assert [row.line for row in reader] == [2, 3]  # the lines of the latest items
    (single,) = [each for each in reader.warnings if each.rule == "history.single"]
    assert single.message.startswith("1 ")


def test_inputs_have_all_items_and_the_user(tmp_path: Path) -> None:
    inputs = load_inputs(str(write(tmp_path, LOG)))
    assert [row.plain_text() for _, row in inputs] == ["a\nd\nc", "b\ne", "a"]
    assert [record["userId"] for record, _ in inputs] == ["7", "8", "9"]


def test_items_chosen_again_count_once_and_names_end_with_time(tmp_path: Path) -> None:
    text = "customer,sku,order_time\n1,x,300\n1,y,100\n1,z,200\n1,y,400\n2,x,7\n2,y,5\n"
    assert histories(write(tmp_path, text)) == [(["y", "z"], "x"), (["y"], "x")]


def test_key_of_one_item_is_refused_for_a_log(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_rows(str(write(tmp_path, LOG)), {"user": "userId", "item": "movieId"})
    assert "data.columns.items=movieId" in caught.value.problems[0].advice


def test_without_times_the_lines_are_the_order(tmp_path: Path) -> None:
    text = "customer,sku\n1,x\n2,y\n1,z\n2,x\n"
    assert histories(write(tmp_path, text)) == [(["x"], "z"), (["y"], "x")]
    path = write(tmp_path, LOG)
    assert histories(path, {"timestamp": ""})[0] == (["a", "c"], "d")


def test_named_columns_are_a_log_next_to_texts(tmp_path: Path) -> None:
    text = "Kunde,Artikel,Name,Datum\n1,x,Rad,1.12.2026\n1,y,Schloss,30.11.2026\n"
    path = write(tmp_path, text)
    columns = {"user": "Kunde", "items": "Artikel"}
    assert histories(path, columns) == [(["y"], "x")]
    assert histories(path, {**columns, "timestamp": "Datum"}) == [(["y"], "x")]
    assert histories(path, {**columns, "Datum": ""}) == [(["x"], "y")]


@pytest.mark.parametrize(
    "header", ["user_id,product_id,review", "user_id,text", "item,price", "text,item,user"]
)
def test_tables_with_texts_or_without_users_are_no_logs(tmp_path: Path, header: str) -> None:
    path = write(tmp_path, f"{header}\n" + ",".join(["some words"] * len(header.split(","))))
    problems: list[Problem] = []
    ((_, record),) = read_records(path, problems)
    assert (list(record), problems) == (header.split(","), [])


def test_empty_cells_and_unknown_times_are_named(tmp_path: Path) -> None:
    text = LOG + "7,,5,1112486027\n,a,5,1112486027\n7,a,5,soon\n"
    with pytest.raises(DataError) as caught:
        load_rows(str(write(tmp_path, text)))
    assert [(each.rule, each.line) for each in caught.value.problems] == [
        ("column.missing", 8),
        ("column.missing", 9),
        ("history.time", 10),
    ]


def test_the_advice_names_the_columns_of_a_log_with_texts(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_rows(str(write(tmp_path, "CustomerID,StockCode,Description\n1,x,A red bag\n")))
    advice = caught.value.problems[0].advice
    assert "data.columns.user=CustomerID" in advice
    assert "data.columns.items=StockCode" in advice
    with pytest.raises(DataError) as caught:
        load_rows(str(write(tmp_path, "sentence_id,word,tag\n1,Rita,B-person\n1,sings,O\n")))
    assert "CoNLL" in caught.value.problems[0].advice


def test_a_log_in_memory_may_lack_values(luthier_home: Path) -> None:
    rows = [
        *({"user": "a", "item": f"x{n}", "time": n} for n in range(3)),
        {"user": "b", "time": 2},
    ]
    with pytest.raises(DataError) as caught:
        load_rows(store_rows(rows))
    assert [each.rule for each in caught.value.problems] == ["column.missing"]
    (row,) = load_rows(store_rows(rows[:3]))
    assert row.record() == {"history": ["x0", "x1"], "item": "x2"}
