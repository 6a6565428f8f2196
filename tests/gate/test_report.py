"""Reports for people: nothing from the data acts, everything is there, any summary can be drawn."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shlex
from collections.abc import Callable
from html.parser import HTMLParser
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

import luthier
from luthier.cli.app import app
from luthier.errors import RowNumber
from luthier.gate.checks import all_rules
from luthier.gate.clean_plan import CleaningPlan
from luthier.gate.histogram import Histogram
from luthier.gate.report import (
    FIXES,
    Report,
    cleaning_command,
    list_places,
    next_steps,
    target_of,
    token_runs,
    warnings,
)
from luthier.gate.report_page import draw_histogram
from luthier.gate.report_text import print_report, sparkline
from luthier.gate.rules import Finding, Findings, Place, Rule

EVIL = '<script>alert("x")</script>'
NEAR = Rule("duplicate.near", "warning", "A row is nearly another.", "It counts twice.", "Drop it.")
VOID = {"meta", "input", "br", "hr"}


class Tags(HTMLParser):
    """Tags with attributes. Fails if tags do not close in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def a_report(folder: Path, base: str | None) -> Report:
    data = folder / "a.jsonl"
    row = '{"prompt": "q%d \\u001b[31m <script>alert(\\"x\\")</script>", "completion": "%s"}\n'
    data.write_text("".join(row % (n, EVIL.replace('"', "'")) for n in range(8)) + "{\n")
    report = luthier.inspect(data, base=base)
    places = [Place(str(data), n) for n in range(1, 5)]
    text = f"{EVIL} \x1b[2J \u202e"
    report.findings.add(Finding(NEAR, places[0], text, excerpt=text, others=tuple(places[1:])))
    lengths = Histogram()
    lengths.add(np.arange(200))
    report.summaries["anything"] = {
        "label": EVIL,
        "some_share": 0.25,
        "nothing": None,
        "splits": {"train": {"counts": {EVIL: 3, **{f"c{n}": 1 for n in range(40)}}}},
        "lengths": lengths.plain(),
        "empty": Histogram().plain(),
        "deep": {"er": {"still": {"counts": {}}}},
        "names": [EVIL, *map(str, range(40))],
    }
    return report


@pytest.fixture
def report(tmp_path: Path, tiny_model_folder: Path) -> Report:
    return a_report(tmp_path, str(tiny_model_folder))


def test_page_escapes_markup_in_data(report: Report) -> None:
    page = report.html()
    tags = Tags(page).found
    assert not {"script", "img", "iframe", "object", "form", "link"} & {tag for tag, _ in tags}
    for tag, attributes in tags:
        assert not any(name.startswith("on") or name == "style" for name in attributes), tag
        assert not {"href", "src", "action"} & attributes.keys()
    assert page.count("&lt;script&gt;") > 10
    assert "\x1b" not in page and "\u202e" not in page


def test_page_policy_allows_only_inline_style_sheet(report: Report) -> None:
    page = report.html()
    style = re.search("<style>(.*)</style>", page, re.DOTALL)
    assert style is not None
    hashed = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    (policy,) = (a["content"] for t, a in Tags(page).found if "http-equiv" in a)
    assert policy == (
        f"default-src 'none'; style-src 'sha256-{hashed}'; base-uri 'none'; form-action 'none'"
    )
    assert "url(" not in page and "@import" not in page


def test_the_page_is_accessible(report: Report) -> None:
    tags = Tags(report.html()).found
    assert ("html", {"lang": "en"}) in tags
    names = [attributes for tag, attributes in tags if tag == "svg"]
    assert all(each.get("aria-label") or each.get("aria-hidden") for each in names) and names
    assert all(attributes.get("scope") for tag, attributes in tags if tag == "th")
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    levels = [int(tag[1]) for tag, _ in tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and all(b - a <= 1 for a, b in pairwise(levels))


def test_page_contains_findings(report: Report) -> None:
    page = report.html()
    for text in ("Refused", "json.invalid", "duplicate.near", "It counts twice.", "Drop it.",
                 "a.jsonl:2, 3, 4", "What the model learns", "<mark>", "25.0%", "of 1,024 tokens",
                 "29 more", " and 16 more"):  # fmt: skip
        assert text in page, text


def test_terminal_report_escapes_control_characters(report: Report) -> None:
    out = Console(file=StringIO(), width=100, highlight=False, force_terminal=False)
    print_report(report, out, rows=1)
    text = out.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b" not in text and "\u202e" not in text
    for part in ("✗ refused", "1 error, ", "json.invalid",
                 "duplicate.near", "Drop it.", "8 rows", "learned", EVIL, "train, line 1"):  # fmt: skip
        assert part in text, part
    assert "train, line 2" not in text


def test_learned_text_has_brackets_without_colours(
    report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shown(**options: Any) -> str:
        out = Console(file=StringIO(), width=100, highlight=False, **options)
        print_report(report, out, rows=1)
        return str(out.file.getvalue())  # type: ignore[attr-defined]

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    plain = shown(force_terminal=False)
    assert "⟦ ⟧" in plain
    learned = plain[plain.index("train, line 1") :]
    assert "⟦" in learned and learned.index("⟦") < learned.index("⟧")
    assert learned.index("q0") < learned.index("⟦")  # the prompt is not learned
    assert "⟦" not in shown(force_terminal=True)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "⟦ ⟧" in shown(force_terminal=True)


def test_rows_of_several_files_are_shown_with_their_file(
    tmp_path: Path, tiny_model_folder: Path
) -> None:
    heads, rows = [], tmp_path / "rows"
    rows.mkdir()
    for name in ("a", "b"):
        written(rows / f"{name}.jsonl", {"prompt": "q", "completion": name})
        report = luthier.inspect(rows, base=str(tiny_model_folder))
        out = Console(file=StringIO(), width=100, highlight=False)
        print_report(report, out)
        heads.append([each for each in ("line 1", "a.jsonl:1", "b.jsonl:1")
                      if f"train, {each}" in out.file.getvalue()])  # type: ignore[attr-defined]  # fmt: skip
        assert ("<span>a.jsonl:1</span>" in report.html()) == (name == "b")
    assert heads == [["line 1"], ["a.jsonl:1", "b.jsonl:1"]]


@pytest.mark.parametrize("last", ["a", ["a"], ["a", "b"], []])
def test_report_names_multi_label_classification(
    tmp_path: Path, family_folder: Callable[[str], Path], last: str | list[str]
) -> None:
    rows = [{"text": f"the dog {n}", "label": "ab"[n % 2]} for n in range(9)]
    source = written(tmp_path / "a.jsonl", *rows, {"text": "the fox", "label": last})
    report = luthier.inspect(source, base=str(family_folder("bert")))
    out = Console(file=StringIO(), width=200, highlight=False)
    print_report(report, out)
    several = last in (["a", "b"], [])
    text = out.file.getvalue()  # type: ignore[attr-defined]
    assert ("classification, several labels per row, on " in text) == several
    assert ("several labels per row, on " in report.html()) == several
    assert [str(each.place) for each in report.findings.examples.get("label.several", ())] == (
        [f"{source}:10"] if several else []
    )


def test_image_row_shows_label_as_learned(
    tmp_path: Path, family_folder: Callable[[str], Path]
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 7), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=pixels, labels=np.arange(6) % 2)
    report = luthier.inspect(tmp_path / "images.npz", base=str(family_folder("small_cnn")))
    shown = report.summaries["learning"]["splits"]["train"]["shown"]
    assert {(*row["learned"], row["taught"]) for row in shown} == {(False, "0"), (False, "1")}


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_no_part_of_a_report_shows_personal_data(
    tmp_path: Path, family_folder: Callable[[str], Path], family: str
) -> None:
    private = "Call +44 20 7946 0958 or write to Bob.Miller@gmail.com now"
    rows: list[dict[str, Any]]
    rows = [{"text": f"{private} {'x' * n}", "label": "ab"[n % 2]} for n in (1, 2, 3, 3)]
    words = [*["Call", "+44", "20", "7946", "0958", "or", "write", "to", "Bob.Miller@gmail.com"]]
    tagged: list[dict[str, Any]] = [
        {"tokens": words, "tags": ["B-A", *["O"] * (len(words) - 1)]}
    ] * 2
    for number, each in enumerate((rows, tagged)):
        source = written(tmp_path / f"{number}.jsonl", *each)
        report = luthier.inspect(source, base=str(family_folder(family)))
        out = Console(file=StringIO(), width=200, highlight=False)
        print_report(report, out)
        for text in (report.html(), out.file.getvalue(), json.dumps(report.plain())):  # type: ignore[attr-defined]
            plain = re.sub(r"[\W_]|<[^>]*>", "", text).lower()
            assert "07946" not in plain and "0958" not in plain
            assert "miller" not in plain and "gmail" not in plain
        assert report.findings.counts["privacy.phone"] and report.findings.counts["privacy.email"]
        shown = report.summaries["learning"]["splits"]["train"]["shown"]
        assert all("*" in "".join(row["tokens"]) for row in shown) and shown


def test_reports_without_base_model_name_missing_checks(tmp_path: Path) -> None:
    report = a_report(tmp_path, None)
    out = Console(file=StringIO(), width=100, highlight=False)
    print_report(report, out)
    assert "needs a base model" in out.file.getvalue()  # type: ignore[attr-defined]
    assert "needs a base model" in report.html() and "<mark>" not in report.html()


def test_report_ends_with_next_command() -> None:
    found = Findings()
    report = Report({"train": ["my data.jsonl"], "validation": ["v.jsonl"]}, {"train": 2}, found)
    ((words, command),) = next_steps(report)
    assert command == "luthier tune 'my data.jsonl' --validation v.jsonl"
    assert words.endswith(":")
    found.add(Finding(NEAR, Place("a", 1), "x"))
    assert "warnings" in next_steps(report)[0][0]
    found.add(Finding(Rule("an.error", "error", "x"), Place("a", 1), "x"))
    assert next_steps(report)[-1][1] == ""


def test_proposed_commands_repeat_column_options() -> None:
    found, columns = Findings(), {"text": "the sentence", "label": ""}
    report = Report({"train": ["a.jsonl"]}, {"train": 2}, found, columns=columns)
    named = " --map 'text=the sentence' --ignore label"
    assert next_steps(report)[0][1] == f"luthier tune a.jsonl{named}"
    found.add(Finding(all_rules()["duplicate.near"], Place("a.jsonl", 1), "x"))
    assert cleaning_command(report).endswith(f"--dedupe near{named}")
    assert f"luthier inspect a.jsonl{named} --html" in warnings(report)[-1]


def test_several_findings_show_the_general_fix() -> None:
    found, rule = Findings(), all_rules()["label.few_rows"]
    report = Report({"train": ["a.jsonl"]}, {"train": 2}, found)
    for name in "abc":
        place = Place("a.jsonl", len(found.examples) + 1)
        found.add(Finding(rule, place, f"{name} has 7 rows.", f"Add 1 row with {name}."))
        out = Console(file=StringIO(), width=200, highlight=False)
        print_report(report, out)
        text = " ".join(out.file.getvalue().split())  # type: ignore[attr-defined]
        alone = name == "a"
        assert ("Add 1 row with a." in text) == alone and (rule.fix in text) != alone
        assert ("Add 1 row with a." in warnings(report)[0]) == alone
    assert warnings(report)[0].endswith(f"a has 7 rows. 2 more findings. {rule.fix}")
    assert "a.jsonl:1: " in warnings(report)[0]


def test_token_runs_merge_neighbours_and_shorten_long_rows() -> None:
    found = token_runs(["a", "b", "c", "d\x07"], [False, False, True, True])
    assert [(run.text, run.learned) for run in found] == [("ab", False), ("cd\\x07", True)]
    found = token_runs(["x"] * 1000, [False] * 999 + [True])
    assert sum(len(run.text) for run in found) == 360
    assert sum(run.left_out for run in found) == 640
    assert found[-1] == type(found[-1])("x", True)


def test_places_name_their_file_once() -> None:
    places = [Place("x/a", 1), Place("x/a", 2), Place("b", 3), Place("b", 4)]
    assert list_places(places, 3) == "a:1, 2, b:3 and 1 more"
    assert list_places([Place("a", RowNumber(n)) for n in (1, 2)], 3) == "a row 1, 2"
    stored = f"/home/rows/rows-{16 * '0'}.jsonl"
    assert list_places([Place(stored, n) for n in (1, 2)], 3) == "rows[0], rows[1]"


def test_findings_name_rows_of_a_one_line_file(tmp_path: Path) -> None:
    data = tmp_path / "rows.json"
    data.write_text(json.dumps([{"text": text, "label": "a"} for text in ("x y", "x z", "x y")]))
    report = luthier.inspect(data, base=None)
    found = next(each for each in report.plain()["rules"] if each["rule"] == "duplicate.exact")
    assert [(each["row"], each["others"][0]["row"]) for each in found["places"]] == [(1, 3)]
    assert f"{data} row 1 " in str(report.summary())


def test_names_of_files_cannot_leave_their_attributes(tmp_path: Path) -> None:
    data = tmp_path / 'a" onload="alert(1)"><script>.jsonl'
    data.write_text("{\n")
    page = luthier.inspect(data, base=None).html()
    assert "script" not in {tag for tag, _ in Tags(page).found}
    assert 'onload="' not in page and "onload=&#34;" in page


@pytest.mark.parametrize("numbers", [[5], [0, 0, 0], [1, 100_000], list(range(3, 60))])
def test_bars_cover_their_axis(numbers: list[int]) -> None:
    found = Histogram()
    found.add(np.array(numbers))
    plain: dict[str, Any] = found.plain()
    drawn = draw_histogram(plain["bars"], {"median": plain["p50"]}, "what", "tokens")["bars"]
    lefts = [float(each["x"]) for each in drawn]
    assert lefts == sorted(lefts) and lefts[0] == 8
    assert lefts[-1] + float(drawn[-1]["width"]) <= 632
    assert len(sparkline(plain["bars"])) <= 16


def written(path: Path, *rows: Any) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def test_every_fix_has_a_known_rule_and_valid_plan() -> None:
    rules = all_rules()
    kinds = ("privacy.", "secret.")
    assert not [rule for rule in FIXES if rule not in rules and not rule.startswith(kinds)]
    assert {rule for rule in rules if rule.startswith(kinds)} - {"privacy.unchecked"} <= set(FIXES)
    for name, value in set(FIXES.values()):
        key = name[2:].replace("-", "_")
        given: Any = [value] if key in ("drop", "redact") else value or True
        CleaningPlan.of({key: given, "base": "any"})


def test_rules_about_whole_sets_are_not_proposed_for_drop() -> None:
    rules = all_rules()
    dropped = {value for name, value in FIXES.values() if name == "--drop"}
    assert not [name for name in dropped if name in rules and rules[name].whole]


def test_clean_command_has_each_fix_once_with_held_out_file() -> None:
    found = Findings()
    report = Report({"train": ["a.jsonl"], "test": ["t.jsonl"]}, {"train": 20}, found, base="m")
    rules = all_rules()
    assert cleaning_command(report) == ""
    for name in (
        "duplicate.exact",
        "duplicate.near",
        "json.invalid",
        "field.empty",
        "leakage.near",
    ):
        file = "t.jsonl" if name.startswith("leakage") else "a.jsonl"
        found.add(Finding(rules[name], Place(file, 1), "x"))
    found.add(Finding(rules["privacy.email"], Place("t.jsonl", 1), "x"))
    found.add(Finding(rules["length.outlier"], Place("a.jsonl", 1), "x"))
    found.add(Finding(Rule("another.rule", "error", "x"), Place("a.jsonl", 1), "x"))
    words = shlex.split(cleaning_command(report))
    assert words[:4] == ["luthier", "clean", "a.jsonl", "a-clean.jsonl"]
    pairs = {tuple(words[at : at + 2]) for at in range(4, len(words), 2)}
    assert pairs == {
        ("--dedupe", "near"), ("--drop", "unreadable"), ("--drop", "leakage.*"), ("--test", "t.jsonl")
    }  # fmt: skip


def test_time_series_lines_are_not_proposed_for_drop() -> None:
    found = Findings()
    found.add(Finding(all_rules()["window.value"], Place("a.csv", 51), "x"))
    report = Report({"train": ["a.csv"]}, {"train": 397}, found)
    assert cleaning_command(report) == ""
    assert [command for _, command in next_steps(report)] == [""]


def test_drop_is_not_proposed_for_all_rows() -> None:
    found, rule = Findings(), all_rules()["field.missing"]
    found.add(Finding(rule, Place("a.jsonl", 1), "x"))
    files = {"train": ["a.jsonl"]}
    assert cleaning_command(Report(files, {"train": 0}, found)) == ""
    assert cleaning_command(Report(files, {"train": 8}, found)) == ""
    assert "--drop unreadable" in cleaning_command(Report(files, {"train": 9}, found))


def test_many_unreadable_rows_may_be_fixed_or_dropped() -> None:
    found, rule = Findings(), all_rules()["json.invalid"]
    found.add(Finding(rule, Place("a.jsonl", 1), "x"), 45)
    files = {"train": ["a.jsonl"]}
    ((words, command),) = next_steps(Report(files, {"train": 45}, found))
    assert "45" in words
    assert command == "luthier clean a.jsonl a-clean.jsonl --drop unreadable"
    for rows in (0, 44):
        assert next_steps(Report(files, {"train": rows}, found))[0][1] == ""


def test_frequent_finding_is_not_proposed_for_drop() -> None:
    found, rule = Findings(), all_rules()["label.contradiction"]
    found.add(Finding(rule, Place("a.jsonl", 1), "x"), 20)
    files = {"train": ["a.jsonl"]}
    assert cleaning_command(Report(files, {"train": 100}, found)) == ""
    assert "--drop label.contradiction" in cleaning_command(Report(files, {"train": 300}, found))


def test_clean_target_is_next_to_source_file(tmp_path: Path) -> None:
    file = written(tmp_path / "a.csv", {})
    assert target_of(str(file)) == str(tmp_path / "a-clean.csv")
    assert target_of(str(tmp_path)) == f"{tmp_path.name}-clean.jsonl"
    assert target_of("s3://bucket/rows.json.gz") == "rows-clean.jsonl"


def test_proposed_clean_command_fixes_findings(tmp_path: Path) -> None:
    words = ["river", "stone", "winter", "garden", "morning", "letter", "window"]
    rows: list[Any] = [
        {"text": f"{words[n % 7]} {n} {words[n % 5]} about a {words[n % 3]}", "label": "ab"[n % 2]}
        for n in range(40)
    ]
    held = written(tmp_path / "my test.jsonl", *rows[:2], *rows[38:])
    rows += [
        rows[3],
        {"text": "", "label": "a"},
        {"text": "mail bob@gmail.com\u200b", "label": "a"},
    ]
    source = written(tmp_path / "my rows.jsonl", *rows)
    report = luthier.inspect(source, test=held, base=None)
    typed = cleaning_command(report)
    done = CliRunner().invoke(app, shlex.split(typed)[1:])
    assert done.exit_code == 0, done.output
    target = tmp_path / "my rows-clean.jsonl"
    after = luthier.inspect(target, test=held, base=None)
    assert len(report.findings.rules()) > len(after.findings.rules())
    assert not {rule.id for rule in after.findings.rules()} & set(FIXES)
    assert cleaning_command(after) == ""
