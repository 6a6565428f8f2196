"""Payment cards, bank accounts and national ids: numbers that carry a check.

Luhn and the ranges of ISO/IEC 7812 issuers stand here; IBANs and national ids are checked by
python-stdnum, where it is installed (extra ``privacy``). Vietnam's citizen id (CCCD), which it has not,
is checked by its public structure (Decree 137/2015, article 13, and Circular 59/2021).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec

from luthier.inspection.pii.contacts import CALL
from luthier.inspection.pii.spans import Span, numbered, says

_APART = r"(?<![\w.,+/-])(?:", r")(?![\w%]|[.,/-]\d)"
"""What may not stand around a number: other digits, letters, and what makes it part of a larger one."""
_CARD = re.compile(
    r"\d{14,19}|\d{4}([ -])\d{4}\1\d{4}\1\d{2,4}(?:\1\d{3})?|\d{4}([ -])\d{6}\2\d{4,5}".join(_APART)
)
_ISSUERS = (
    # Name, prefixes from and to, lengths.
    ("Visa", (4, 4), (16, 19)),
    ("Mastercard", (51, 55), (16,)),
    ("Mastercard", (2221, 2720), (16,)),
    ("American Express", (34, 34), (15,)),
    ("American Express", (37, 37), (15,)),
    ("Discover", (6011, 6011), (16, 19)),
    ("Discover", (644, 659), (16, 19)),
    ("JCB", (3528, 3589), (16, 19)),
    ("Diners Club", (300, 305), (14, 16)),
    ("Diners Club", (36, 36), (14,)),
    ("Diners Club", (38, 39), (14, 16)),
    ("UnionPay", (62, 62), (16, 17, 18, 19)),
    ("Napas", (9704, 9704), (16, 19)),
)
_IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b")


def luhn(digits: str) -> bool:
    """The check of ISO/IEC 7812-1: every second digit from the right counts twice."""
    total = 0
    for place, digit in enumerate(reversed(digits)):
        number = int(digit) * (1 + place % 2)
        total += number - 9 * (number > 9)
    return total % 10 == 0


def issuer(digits: str) -> str | None:
    """Who issues cards with this number."""
    for name, (low, high), lengths in _ISSUERS:
        if len(digits) in lengths and low <= int(digits[: len(str(low))]) <= high:
            return name
    return None


def cards(text: str, low: int, high: int) -> Iterator[Span]:
    """Payment cards from ``low`` to ``high``: an issuer's range, its length, and the check digit."""
    for found in _CARD.finditer(text, low, high):
        digits = re.sub("[ -]", "", found[0])
        name = issuer(digits) if len(set(digits)) > 1 else None
        if name and luhn(digits) and not numbered(text, found.start()):
            yield Span(*found.span(), "card", f"{name} card", digits)


def checked() -> bool:
    """Whether IBANs and national ids can be told from other numbers here."""
    return find_spec("stdnum") is not None


def ibans(text: str, low: int, high: int) -> Iterator[Span]:
    """Bank accounts (ISO 13616): a country's length and form, and the check digits."""
    for found in _IBAN.finditer(text, low, high):
        # The pattern may take words behind the number: the longest part that is an account counts.
        written = found[0]
        while len(written) >= 15:
            if _is_valid("iban", written):
                value = written.replace(" ", "")
                yield Span(found.start(), found.start() + len(written), "iban", "IBAN", value)
                break
            written = written[: max(written.rfind(" "), 0)]


@dataclass(frozen=True)
class NationalId:
    """One country's number of a person."""

    name: str
    module: str
    """Of python-stdnum; empty where the rule is here."""
    pattern: str
    words: str = ""
    """What stands before it; needed where ``bare`` does not match."""
    bare: str = ""
    """Form in which it is found without such words; empty for none, as the check is too weak."""


IDS: tuple[NationalId, ...] = (
    NationalId(
        "VN citizen id (CCCD)", "", r"0\d{2} ?\d{3} ?\d{3} ?\d{3}",
        r"cccd|căn cước|cmnd|định danh|citizen", ".+",
    ),
    NationalId(
        "US social security number", "us.ssn", r"\d{3}-\d{2}-\d{4}|\d{9}|\d{3} \d{2} \d{4}",
        r"ssn|social security", r"\d{3}-\d{2}-\d{4}",
    ),
    NationalId("UK national insurance number", "", r"[A-Z]{2} ?\d{2} ?\d{2} ?\d{2} ?[A-D]", "", ".+"),
    NationalId(
        "FR NIR", "fr.nir", r"[1278] ?\d{2} ?\d{2} ?(?:\d{2}|2[AB]) ?\d{3} ?\d{3} ?\d{2}", "", ".+"
    ),
    NationalId(
        "DE tax id", "de.idnr", r"[1-9]\d ?\d{3} ?\d{3} ?\d{3}",
        r"steuer|idnr|id-nr|tax id|\btin\b", r"\d\d \d{3} \d{3} \d{3}",
    ),
    NationalId(
        "IN Aadhaar", "in_.aadhaar", r"[2-9]\d{3}[ -]?\d{4}[ -]?\d{4}",
        r"aadhaar|aadhar|uidai", r"\d{4} \d{4} \d{4}",
    ),
    NationalId(
        "BR CPF", "br.cpf", r"\d{3}\.\d{3}\.\d{3}-\d{2}|\d{11}", r"\bcpf\b",
        r"\d{3}\.\d{3}\.\d{3}-\d{2}",
    ),
    NationalId("ES DNI", "es.dni", r"\d{8}[- ]?[A-Z]", r"\bdni\b|\bnif\b", r"\d{8}-?[A-Z]"),
    NationalId("ES NIE", "es.nie", r"[XYZ][- ]?\d{7}[- ]?[A-Z]", "", ".+"),
    NationalId(
        "IT codice fiscale", "it.codicefiscale",
        r"[A-Z]{6}[0-9LMNP-V]{2}[A-EHLMPRST][0-9LMNP-V]{2}[A-Z][0-9LMNP-V]{3}[A-Z]", "", ".+",
    ),
    NationalId("NL BSN", "nl.bsn", r"\d{9}|\d{4}\.\d{2}\.\d{3}", r"\bbsn\b|burgerservice|sofinummer"),
    NationalId("PL PESEL", "pl.pesel", r"\d{11}", r"pesel"),
    NationalId("SE personnummer", "se.personnummer", r"(?:19|20)?\d{6}[-+]\d{4}", "", ".+"),
    NationalId("CN resident id", "cn.ric", r"[1-6]\d{16}[\dX]", "", ".+"),
    NationalId("KR resident number", "kr.rrn", r"\d{6}-[1-8]\d{6}", "", ".+"),
    NationalId("MY NRIC", "my.nric", r"\d{6}-\d{2}-\d{4}", "", ".+"),
    NationalId(
        "TH citizen id", "th.pin", r"\d-\d{4}-\d{5}-\d{2}-\d|\d{13}", r"บัตร|citizen", r"[\d-]{17}"
    ),
)  # fmt: skip
_ONE_ID = [
    (each, re.compile(each.pattern.join(_APART)), re.compile(each.words, re.I) if each.words else None,
     re.compile(each.bare) if each.bare else None)
    for each in IDS
]  # fmt: skip


def national_ids(text: str, low: int, high: int) -> Iterator[Span]:
    """Numbers that a state gave to a person, of the countries in :data:`IDS`."""
    for each, pattern, words, bare in _ONE_ID:
        for found in pattern.finditer(text, low, high):
            said = words is not None and says(words, text, found.start())
            plain = bare is not None and bare.fullmatch(found[0]) is not None
            plain = plain and not numbered(text, found.start())
            # Numbers without a check digit of their own may as well be telephone numbers.
            plain = plain and bool(each.module or not says(CALL, text, found.start()))
            if (said or plain) and _is_id(each, found[0]):
                value = re.sub(r"[ .-]", "", found[0])
                yield Span(*found.span(), "national_id", each.name, value)


def _is_id(each: NationalId, written: str) -> bool:
    if each.module:
        return _is_valid(each.module, written)
    if each.name.startswith("VN"):
        return is_cccd(written.replace(" ", ""))
    return is_nino(written.replace(" ", ""))


@lru_cache(maxsize=4096)
def _is_valid(module: str, written: str) -> bool:
    """Whether python-stdnum's ``module`` takes the number; nothing is valid where it is missing."""
    try:
        judge = import_module(f"stdnum.{module}")
    except ModuleNotFoundError:
        return False
    return bool(judge.is_valid(written))


# fmt: off
_PROVINCES = frozenset({
    1, 2, 4, 6, 8, 10, 11, 12, 14, 15, 17, 19, 20, 22, 24, 25, 26, 27, 30, 31, 33, 34, 35, 36,
    37, 38, 40, 42, 44, 45, 46, 48, 49, 51, 52, 54, 56, 58, 60, 62, 64, 66, 67, 68, 70, 72, 74,
    75, 77, 79, 80, 82, 83, 84, 86, 87, 89, 91, 92, 93, 94, 95, 96,
})
# fmt: on
"""Codes of the place of birth in Vietnam, as of the 63 provinces before July 2025."""


def is_cccd(digits: str) -> bool:
    """Whether 12 digits have the structure of a Vietnamese citizen id; it has no check digit.

    Three digits of a province, one of century and sex (0 and 1 for the 20th, 2 and 3 for the 21st), two
    of the year of birth, six of a serial number.
    """
    if len(digits) != 12 or int(digits[:3]) not in _PROVINCES or digits[6:] == "000000":
        return False
    century = int(digits[3]) // 2
    year = 1900 + 100 * century + int(digits[4:6])
    return century <= 1 and 1905 <= year <= date.today().year


def is_nino(written: str) -> bool:
    """Whether it can be a UK National Insurance number, by its first letters (HMRC, NIM39110)."""
    first, second = written[0], written[1]
    return (
        first not in "DFIQUV"
        and second not in "DFIQUVO"
        and written[:2] not in {"BG", "GB", "NK", "KN", "TN", "NT", "ZZ"}
    )
