"""Table of the data checks, in the order of execution. To add a check, add a line."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from luthier.errors import RecipeError
from luthier.formatting import did_you_mean
from luthier.gate.check import Check, CheckContext
from luthier.gate.checks.amount import Amount
from luthier.gate.checks.balance import Balance
from luthier.gate.checks.contradictions import Contradictions
from luthier.gate.checks.conversations import Conversations
from luthier.gate.checks.duplicates import Duplicates
from luthier.gate.checks.echo import Echo
from luthier.gate.checks.encoding import Encoding
from luthier.gate.checks.language import Language
from luthier.gate.checks.learning import Learning
from luthier.gate.checks.lengths import Lengths
from luthier.gate.checks.markers import Markers
from luthier.gate.checks.privacy import Privacy
from luthier.gate.checks.white_space import WhiteSpace
from luthier.gate.rules import DOUBTS, READING_RULES, Rule
from luthier.plugins import PluginTable

_KINDS: tuple[type[Check], ...] = (
    Learning,
    Encoding,
    Markers,
    WhiteSpace,
    Conversations,
    Echo,
    Duplicates,
    Contradictions,
    Amount,
    Balance,
    Lengths,
    Language,
    Privacy,
)
CHECKS: PluginTable[type[Check]] = PluginTable(
    "checks", Check, {kind.name: kind for kind in _KINDS}
)
"""Checks by name. The modules of the checks import heavy libraries lazily."""

BASE_MISSING = Rule(
    "base.missing",
    "warning",
    "The base model is unavailable, so no row is encoded.",
    "Template, token counts and the loss mask are not checked.",
    "Run `luthier models pull ID` with a network, or `luthier inspect --base none`.",
    whole=True,
)


NO_READER = "needs a base model with a tokenizer"
"""Reason for omitting checks that need a tokenizer."""


def checks_for(
    known: CheckContext, skip: Collection[str] = ()
) -> tuple[list[Check], dict[str, str]]:
    """Create the applicable checks, and explain why the remaining checks are omitted.

    Args:
        known: model and objective, if given.
        skip: names of checks to omit.
    """
    chosen, left = [], {}
    for name, kind in CHECKS.items():
        if name in skip:
            left[name] = "skipped"
        elif known.in_job and not kind.in_jobs:
            left[name] = "not run in jobs"
        elif kind.needs_model and known.chat is None:
            left[name] = "needs a base model"
        elif kind.needs_tokenizer and known.chat is not None and not known.chat.has_tokenizer:
            left[name] = NO_READER
        else:
            chosen.append(kind.of(known))
    return chosen, left


def rules_named(name: str, also: Iterable[str] = ()) -> list[Rule]:
    """Return the rule with the id ``name``, or all rules with the prefix of ``prefix.*``.

    Raises:
        RecipeError: unknown rule. The message suggests the nearest id or name in ``also``.
    """
    rules = all_rules()
    if name.endswith(".*"):
        found = [rule for id_, rule in rules.items() if id_.startswith(name[:-1])]
    else:
        found = [rules[name]] if name in rules else []
    if not found:
        hint = did_you_mean(name, [*rules, *also], "docs/reference.md lists them all")
        raise RecipeError(f"unknown rule {name!r}; {hint}", rule="policy.unknown", setting=name)
    return found


def all_rules() -> dict[str, Rule]:
    """Every rule of reading and of the checks, by id."""
    known = {**READING_RULES, **DOUBTS, BASE_MISSING.id: BASE_MISSING}
    return known | {rule.id: rule for check in CHECKS.values() for rule in check.rules}
