"""Exact counts, bounded findings, severities of policies, and rows to drop."""

from __future__ import annotations

from luthier.data.shapes.texts import LabelledText
from luthier.gate.check import Check
from luthier.gate.checks.contradictions import Contradictions
from luthier.gate.checks.duplicates import Duplicates
from luthier.gate.checks.encoding import Encoding
from luthier.gate.rules import MOST_EXAMPLES, Finding, Findings, Place, Rule
from luthier.gate.scan import Gate
from luthier.types import Row

WARNING = Rule("a.warning", "warning", "It is odd.", fix="Look at it.")
ERROR = Rule("an.error", "error", "It is wrong.")


def at(rule: Rule, line: int) -> Finding:
    return Finding(rule, Place("f", line), "here")


def test_counts_are_exact_and_places_are_bounded() -> None:
    found = Findings()
    found.extend(at(WARNING, line) for line in range(1, 3 * MOST_EXAMPLES))
    assert found.counts == {"a.warning": 3 * MOST_EXAMPLES - 1}
    assert [each.place.line for each in found.examples["a.warning"]] == list(
        range(1, MOST_EXAMPLES + 1)
    )
    assert found.exit_code == 1
    found.add(at(ERROR, 7))
    assert [rule.id for rule in found.rules()] == ["an.error", "a.warning"]
    assert found.exit_code == 2
    assert found.examples["a.warning"][0].plain()["fix"] == "Look at it."


def test_nothing_found_passes() -> None:
    assert (Findings().worst, Findings().exit_code) == ("note", 0)


def test_a_policy_decides_how_serious_a_rule_is() -> None:
    found = Findings({"a.warning": "error", "an.error": "off"})
    found.extend([at(WARNING, 1), at(ERROR, 2)])
    assert found.exit_code == 2 and "an.error" not in found.counts
    assert found.severity(WARNING) == "error"


def row(line: int, text: str, label: str = "a", file: str = "f") -> Row:
    return LabelledText(file, line, text=text, label=label)


def blamed(check: Check, rule: str, train: list[Row], test: list[Row] | None = None) -> Findings:
    findings = Findings(blamed={rule: []})
    gate = Gate([check], findings)
    gate.scan_rows("train", train)
    gate.scan_rows("test", test or [])
    gate.report({})
    return findings


def test_blame_lists_all_copies_without_original() -> None:
    rows = [row(n + 1, "the same text again") for n in range(3 * MOST_EXAMPLES)]
    found = blamed(Duplicates(), "duplicate.exact", rows)
    copies = range(1, 3 * MOST_EXAMPLES)
    assert found.blamed["duplicate.exact"] == [(number, 0) for number in copies]


def test_all_rows_of_a_contradiction() -> None:
    rows = [row(1, "one"), row(2, "two", "a"), row(3, "three"), row(4, "two", "b")]
    found = blamed(Contradictions(), "label.contradiction", rows)
    assert [number for number, _ in found.blamed["label.contradiction"]] == [1, 3]


def test_blame_lists_only_training_rows_of_leak() -> None:
    rows = [row(1, "one text"), row(2, "Two texts!"), row(3, "three"), row(4, "two texts")]
    found = blamed(Duplicates(), "leakage.exact", rows, [row(1, "two, texts", file="g")])
    assert found.counts["leakage.exact"] == 1
    assert sorted(found.blamed["leakage.exact"]) == [(1, 4), (3, 4)]


def test_blame_lists_rows_of_requested_rule_only() -> None:
    rows = [row(1, "plain"), row(2, "with\u200bit"), row(3, "also\u200b\x07")]
    found = blamed(Encoding(), "encoding.invisible", rows)
    assert found.blamed["encoding.invisible"] == [(1, -1), (2, -1)]
    assert list(found.blamed) == ["encoding.invisible"] and found.counts["encoding.control"] == 1
