"""Feedback: values that count, repeated statements, redaction and errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import captured_service
import pytest
from captured_service import ITEMS, Running
from luthier_server import ONE, OTHER
from typer.testing import CliRunner

from luthier.cli.service.live import live_app
from luthier.server.live import settings
from luthier.server.tables import principals
from luthier.server.tables.live.alerts import add_alert

running = captured_service.running


@pytest.fixture
def request_id(running: Running) -> str:
    """Id of a captured request of the first account."""
    with running.service.database.write() as session:
        settings.enable(session, ONE)
    running.service.capture.reload()
    return str(running.chat().headers["x-request-id"])


def rate(running: Running, request: str, account: str = ONE, **members: Any) -> Any:
    return running.ask("/api/v1/feedback", {"request": request, **members}, account)


def stored(running: Running, request: str) -> Any:
    key = {"Authorization": f"Bearer {running.key()}"}
    return running.http.get(f"/api/v1/feedback/{request}", headers=key)


def values(answer: Any) -> dict[tuple[str, str], Any]:
    assert answer.status_code == 200, answer.text
    return {(each["rater"], each["name"]): each["value"] for each in answer.json()["feedback"]}


def test_latest_value_of_rater_and_name_counts(running: Running, request_id: str) -> None:
    first = rate(running, request_id, rating=2, rater="ann")
    assert values(first) == {("ann", "rating"): 2} and first.json()["added"] == 1
    rate(running, request_id, rating=4, rater="ann", label="spam")
    outcomes = {"sale": {"value": 12.5}, "reopened": {"value": False, "higher_is_better": False}}
    assert len(values(rate(running, request_id, thumb="up", outcomes=outcomes))) == 3
    assert values(stored(running, request_id)) == {
        ("ann", "rating"): 4, ("ann", "label"): "spam", ("user-0", "thumb"): "up",
        ("user-0", "outcome.sale"): 12.5, ("user-0", "outcome.reopened"): False,
    }  # fmt: skip


def test_repeated_statement_adds_no_row(running: Running, request_id: str) -> None:
    assert rate(running, request_id, rating=3, comment="ok").json()["added"] == 2
    assert rate(running, request_id, rating=3, comment="ok").json()["added"] == 0
    assert rate(running, request_id, rating=1, comment="ok").json()["added"] == 1


def test_response_id_names_the_request(running: Running, request_id: str) -> None:
    answer = running.chat()
    found = rate(running, answer.json()["id"], thumb="down").json()
    assert found["request"] == answer.headers["x-request-id"]


def test_text_of_feedback_is_redacted(
    running: Running, request_id: str, luthier_home: Path
) -> None:
    text = f"Ask {ITEMS[0]} or {ITEMS[2]}"
    answer = rate(running, request_id, comment=text, preferred=text, corrected=text, label=text)
    assert "[EMAIL_1]" in answer.text and ITEMS[0] not in answer.text
    files = list(luthier_home.glob("luthier.db*"))
    assert files and not [file for file in files if ITEMS[0].encode() in file.read_bytes()]


@pytest.mark.parametrize(
    ("members", "status", "word"),
    [
        ({"rating": 6}, 400, "rating"),
        ({"rating": 2.5}, 400, "rating"),
        ({"thumb": "sideways"}, 400, "thumb"),
        ({"outcomes": {"a b": {"value": 1}}}, 400, "outcomes"),
        ({"outcomes": {"sale": {"value": "yes"}}}, 400, "outcomes.sale.value"),
        ({}, 400, "at least one of"),
        ({"ratng": 3}, 400, "ratng"),
    ],
)
def test_invalid_values(
    running: Running, request_id: str, members: dict[str, Any], status: int, word: str
) -> None:
    answer = rate(running, request_id, **members)
    assert answer.status_code == status and word in answer.json()["error"]["message"]


def test_position_counts_the_answers(running: Running, request_id: str) -> None:
    request = str(running.chat(n=2).headers["x-request-id"])
    assert rate(running, request, rating=3, position=1).status_code == 200
    refused = rate(running, request, rating=3, position=2)
    assert refused.status_code == 400 and refused.json()["error"]["parameter"] == "position"

    def waiting() -> list[int]:
        key = {"Authorization": f"Bearer {running.key()}"}
        answers = running.http.get("/api/v1/review", headers=key).json()["answers"]
        return [each["position"] for each in answers if each["request"] == request]

    assert waiting() == [0]
    rate(running, request, rating=3)
    assert waiting() == []


def test_share_of_answers_goes_to_two_raters(running: Running, request_id: str) -> None:
    requests = [request_id, *(running.chat().headers["x-request-id"] for _ in range(9))]

    def waiting() -> int:
        key = {"Authorization": f"Bearer {running.key()}"}
        return int(running.http.get("/api/v1/review", headers=key).json()["waiting"])

    for number, request in enumerate(requests):
        rate(running, request, rating=1 + number % 5, rater="ann")
    assert waiting() == 10
    for share, count in ((0, 0), (0.5, 5), (1, 10)):
        with running.service.database.write() as session:
            settings.enable(session, ONE, second_rater=share)
        assert waiting() == count
    for number, request in enumerate(requests):
        rate(running, request, rating=1 + number % 5 if number else 5)
    key = {"Authorization": f"Bearer {running.key()}"}
    (found,) = running.http.get("/api/v1/models/tiny/agreement", headers=key).json()["agreement"]
    assert (found["name"], found["answers"]) == ("rating", 10) and 0.5 < found["alpha"] < 1
    shown = CliRunner().invoke(live_app, ["feedback", "agreement", "tiny"]).stdout
    assert "10 answers" in shown


def test_answer_in_the_queue_of_a_rater_is_leased(running: Running, request_id: str) -> None:
    with running.service.database.write() as session:
        settings.enable(session, ONE, second_rater=0.5)
        annie = principals.create_user(session, ONE, "annie", "reviewer")
        _, key_of_annie = principals.create_api_key(session, annie)
    requests = [request_id, *(running.chat().headers["x-request-id"] for _ in range(9))]

    def queue(key: str) -> set[str]:
        found = running.http.get("/api/v1/review", headers={"Authorization": f"Bearer {key}"})
        return {each["request"] for each in found.json()["answers"]}

    assert queue(running.key()) == {*requests}
    assert len(queue(key_of_annie)) == 5
    assert queue(running.key()) == {*requests}
    everybody = {"enabled": True, "second_rater": None}
    key = {"Authorization": f"Bearer {running.key()}"}
    assert (
        "second_rater"
        not in running.http.put("/api/v1/capture", json=everybody, headers=key).json()
    )
    assert queue(key_of_annie) == {*requests}


def test_alerts_are_listed_newest_first(running: Running) -> None:
    with running.service.database.write() as session:
        for number, (account, subject) in enumerate([(ONE, "a"), (ONE, "b"), (OTHER, "a")]):
            add_alert(session, account, "drift", subject, f"text {number}", str(number))
    key = {"Authorization": f"Bearer {running.key()}"}
    for filters, texts in (({}, ["text 1", "text 0"]), ({"subject": "a"}, ["text 0"])):
        found = running.http.get("/api/v1/alerts", params=filters, headers=key).json()
        assert [each["text"] for each in found["alerts"]] == texts


def test_unknown_request_and_request_of_other_account(running: Running, request_id: str) -> None:
    unknown = rate(running, "nothing", rating=3)
    foreign = rate(running, request_id, OTHER, rating=3)
    assert unknown.status_code == foreign.status_code == 404
    text = foreign.json()["error"]["message"].replace(request_id, "nothing")
    assert text == unknown.json()["error"]["message"]


def command(*words: str) -> Any:
    done = CliRunner().invoke(live_app, [*words, "--json"])
    found = json.loads(done.stdout)
    return done.exit_code, found


def test_import_of_files(running: Running, request_id: str, tmp_path: Path) -> None:
    running.service.capture.flush()
    table = tmp_path / "ratings.csv"
    table.write_text(
        "request,rater,rating,comment,outcome.sale,outcome.reopened.lower\n"
        f"{request_id},ann,4,good,12.5,true\n{request_id},bob,,bad,,\n"
    )
    assert command("feedback", "import", str(table))[1]["added"] == 5
    code, again = command("feedback", "import", str(table))
    assert (code, again["added"], again["rows"]) == (0, 0, 2)
    lines = tmp_path / "ratings.jsonl"
    lines.write_text(
        f'{{"request": "{request_id}", "rating": 1}}\n{{"request": "x", "rating": 1}}\n'
    )
    code, refused = command("feedback", "import", str(lines))
    assert code == 2 and "ratings.jsonl:2" in json.dumps(refused) and "x" in json.dumps(refused)
    assert values(stored(running, request_id)) == {
        ("ann", "rating"): 4, ("ann", "comment"): "good", ("ann", "outcome.sale"): 12.5,
        ("ann", "outcome.reopened"): True, ("bob", "comment"): "bad",
    }  # fmt: skip


def test_feedback_command(running: Running, request_id: str) -> None:
    running.service.capture.flush()
    words = [
        "feedback",
        "add",
        request_id,
        "--rating",
        "5",
        "--outcome",
        "reopened=true",
        "--lower",
    ]
    assert command(*words) == (0, {"request": request_id, "added": 2})
    code, refused = command("feedback", "add", request_id, "--rating", "9")
    assert code == 2 and "rating must be 5 or less" in json.dumps(refused)
    assert command("feedback", "add", "nothing", "--thumb", "up")[0] == 2


def test_role_invoker_rates_under_its_own_name(running: Running, request_id: str) -> None:
    rate(running, request_id, comment="secret", rater="ann")
    with running.service.database.write() as session:
        principals.set_role(session, principals.user_of(session, ONE, "user-0"), "invoker")
    answer = rate(running, request_id, rating=1, rater="ann")
    assert values(answer) == {("user-0", "rating"): 1}
    assert stored(running, request_id).status_code == 403


@pytest.mark.parametrize(
    "row",
    [
        {"outcomes": "text"}, {"outcomes": [1]}, {"outcomes": {"sale": 1}},
        {"outcome.sale": "many"}, {"outcome.sale": None, "thumb": "no"},
    ],
)  # fmt: skip
def test_import_of_invalid_outcomes(
    running: Running, request_id: str, tmp_path: Path, row: dict[str, Any]
) -> None:
    file = tmp_path / "ratings.jsonl"
    file.write_text(json.dumps({"request": request_id, **row}))
    code, refused = command("feedback", "import", str(file))
    assert code == 2 and "ratings.jsonl:1" in json.dumps(refused)
