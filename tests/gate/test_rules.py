"""Counts are exact, places are bounded, and policy has the last word on severity."""

from __future__ import annotations

from luthier.gate.rules import MOST_EXAMPLES, Finding, Findings, Place, Rule

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
