"""Check for personal data and secrets, which a model may memorize and reveal.

Large language models reproduce training text verbatim, including rare strings (Carlini et al. 2021,
"Extracting Training Data from Large Language Models"). Personal data is a warning, because the data
may be intended. API keys and private keys are errors, because nobody publishes keys on purpose and
the formats are unambiguous. A policy can change the severity of each kind.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, ClassVar

from luthier.gate.batch_text import JoinedTexts, Spot, SpotCheck, Spots
from luthier.gate.check import Places, RowBatch
from luthier.gate.pii import KINDS, SECRETS, Finder, PiiKind, can_check_ids
from luthier.gate.rules import Finding, Findings, Place, Rule

_WHY = "A model reveals memorized text to any client."
_REDACT = "Redact the item, or remove the row."
_REVOKE = (
    "Revoke the secret, because the file already reveals the secret. Then redact the item, or remove "
    "the row."
)

_ABOUT: Mapping[PiiKind, str] = {
    "private_key": "a private key",
    "api_key": "a key or token of a service",
    "jwt": "a signed web token",
    "password": "a password or an assigned secret",
    "email": "an e-mail address",
    "iban": "a bank account",
    "card": "a payment card number",
    "national_id": "a national id",
    "phone": "a telephone number",
    "ip": "a public IP address",
}
RULES: Mapping[PiiKind, Rule] = {
    kind: Rule(
        f"{'secret' if kind in SECRETS else 'privacy'}.{kind}",
        "error" if kind in ("private_key", "api_key") else "warning",
        f"The row contains {about}.",
        _WHY,
        _REVOKE if kind in SECRETS else _REDACT,
    )
    for kind, about in _ABOUT.items()
}
UNCHECKED = Rule(
    "privacy.unchecked",
    "note",
    "Bank accounts and national ids are not checked.",
    "Only check digits distinguish these numbers from other numbers.",
    "Install the extra: pip install 'luthier[privacy]'.",
    whole=True,
)


_VOWEL = re.compile(r"[aeioAEIO]|[FHLMNRSX][A-Z]+\b")


class Privacy(SpotCheck):
    """Check for personal data and secrets in every text. Findings never quote an item."""

    name: ClassVar[str] = "privacy"
    of_texts: ClassVar[bool] = True
    rules: ClassVar[tuple[Rule, ...]] = (*RULES.values(), UNCHECKED)
    measures_with: ClassVar[tuple[str, ...]] = ("finder",)

    def __init__(self, finder: Finder | None = None) -> None:
        super().__init__()
        self.finder = finder or Finder()

    def measure(self, batch: RowBatch) -> Spots:
        """Find all items of a batch."""
        joined = JoinedTexts.of(batch)
        found = self.finder.find(joined.text)
        spots: list[Spot] = []
        for kind in KINDS:
            these = [
                (each.start, each.end, _with_article(each.detail))
                for each in found
                if each.kind == kind
            ]
            spots += joined.spots(RULES[kind], these) if these else []
        kinds, details = (each.kind for each in found), (each.detail for each in found)
        return Spots(spots, {"items": Counter(kinds), "details": Counter(details)})

    def finish(self, places: Places, findings: Findings) -> None:
        """Report that national ids and IBANs cannot be checked, if python-stdnum is missing."""
        wanted = {"iban", "national_id"} & set(self.finder.kinds)
        if wanted and places.total and not can_check_ids():
            place = Place(places.place(0).file, 0)
            findings.add(Finding(UNCHECKED, place, "the library python-stdnum is not installed."))

    def summary(self) -> Mapping[str, Any]:
        """Items and rows of each kind."""
        items = self.counts["items"]
        return {
            "items": {"counts": {kind: items[kind] for kind in KINDS if items[kind]}},
            "rows": self.rows_by_rule(),
            "details": self.count("details"),
        }


def _with_article(detail: str) -> str:
    return f"{'an' if _VOWEL.match(detail) else 'a'} {detail}"
