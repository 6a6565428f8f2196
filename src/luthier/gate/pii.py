"""Detection of personal data and secrets in text.

API keys, tokens and passwords are recognized by the formats that vendors document. Obvious
placeholders (``AKIAIOSFODNN7EXAMPLE``, ``sk-xxxx``, ``your-api-key``) are ignored. Check digits of
payment cards (Luhn and ISO/IEC 7812 ranges) are verified here. python-stdnum verifies IBANs and
national ids, if installed (extra ``privacy``). Vietnam's citizen id (CCCD) is missing in
python-stdnum and verified by its public structure (Decree 137/2015, article 13, and Circular
59/2021).
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from ipaddress import ip_address
from typing import Literal, get_args

PiiKind = Literal[
    "private_key",
    "api_key",
    "jwt",
    "password",
    "email",
    "iban",
    "card",
    "national_id",
    "phone",
    "ip",
]
KINDS: tuple[PiiKind, ...] = get_args(PiiKind)
"""All kinds in order of priority: the earlier kind wins overlapping characters."""
SECRETS: frozenset[PiiKind] = frozenset({"private_key", "api_key", "jwt", "password"})


@dataclass(frozen=True, slots=True)
class PiiSpan:
    """Characters ``start`` to ``end`` of a text are an item of ``kind``."""

    start: int
    end: int
    kind: PiiKind
    detail: str
    """Description for people: ``GitHub token``, ``VN citizen id``."""
    value: str
    """Normalized item: digits of a card, E.164 form of a telephone number."""


SEPARATOR = "\x00"
"""Separator of joined texts. No item contains the separator."""

_NUMBERED = re.compile(
    r"(?:\b(?:order|invoice|ticket|tracking|parcel|shipment|serial|isbn|issn|doi|sku|asin|item|part"
    r"|model|batch|case|claim|transaction|txn|reference|ref|booking|pmid|pmc|nct|version|build|id"
    r"|mã(?: đơn| vận đơn| giao dịch)?|đơn hàng|hoá đơn|hóa đơn|commande|facture)"
    r"(?: ?(?:number|no|nr|num|id|code|số|hàng))?\.?|#|№)[\s:=#.-]{0,3}$",
    re.IGNORECASE,
)


def is_order_number(text: str, start: int) -> bool:
    """Return True if the words before ``start`` announce an order number or similar number."""
    return _NUMBERED.search(text[max(0, start - 32) : start]) is not None


def is_preceded_by(words: re.Pattern[str], text: str, start: int, before: int = 40) -> bool:
    """Return True if ``words`` match in the ``before`` characters before ``start``."""
    low = max(0, start - before)
    return words.search(text, max(low, text.rfind(SEPARATOR, low, start)), start) is not None


def matches_near(
    mark: str, pattern: re.Pattern[str], text: str, before: int, after: int
) -> Iterator[re.Match[str]]:
    """Matches of ``pattern`` around each ``mark``: searching a few characters only, not the text.

    ``before`` and ``after`` are characters from the mark's start; no match needs more. With 0 before,
    the match begins with the mark.
    """
    look = pattern.search if before else pattern.match
    done = 0
    at = text.find(mark)
    while at >= 0:
        found = look(text, max(done, at - before), at + after)
        if found and found.end() > at:
            yield found
            done = found.end()
        at = text.find(mark, max(at + len(mark), done))


_BOT = ":AA"
"""Part of Telegram tokens, up to ten digits after the start."""
_TOKENS: tuple[tuple[str, str, str], ...] = (
    # Name, text that must be there, pattern.
    ("AWS access key id", "AKIA", r"(?<![A-Z0-9])AKIA[A-Z2-7]{16}(?![A-Z0-9])"),
    ("AWS access key id", "ASIA", r"(?<![A-Z0-9])ASIA[A-Z2-7]{16}(?![A-Z0-9])"),
    *(("GitHub token", f"gh{kind}_", rf"\bgh{kind}_[A-Za-z0-9]{{36,255}}\b") for kind in "pousr"),
    ("GitHub token", "github_pat_", r"\bgithub_pat_[A-Za-z0-9]{22}_[A-Za-z0-9]{59}\b"),
    ("GitLab token", "glpat-", r"\bglpat-[A-Za-z0-9_-]{20,}"),
    ("Anthropic key", "sk-ant-", r"\bsk-ant-[A-Za-z0-9]+-[A-Za-z0-9_-]{60,}"),
    (
        "OpenAI key",
        "sk-",
        r"\bsk-(?:(?:proj|svcacct|admin)-[A-Za-z0-9_-]{40,}|(?!ant-)[A-Za-z0-9]{20,})(?![\w-])",
    ),
    ("Google API key", "AIza", r"\bAIza[A-Za-z0-9_-]{35}(?![\w-])"),
    ("Google OAuth secret", "GOCSPX-", r"\bGOCSPX-[A-Za-z0-9_-]{28}(?![\w-])"),
    ("Slack token", "xox", r"\bxox[abeoprs]-(?:\d+-)?[A-Za-z0-9-]{10,}"),
    (
        "Slack webhook",
        "hooks.slack.com/",
        r"hooks\.slack\.com/services/T[A-Z0-9]{6,}/B[A-Z0-9]{6,}/[A-Za-z0-9]{20,}",
    ),
    ("Stripe key", "sk_live_", r"\bsk_live_[A-Za-z0-9]{16,}\b"),
    ("Stripe key", "rk_live_", r"\brk_live_[A-Za-z0-9]{16,}\b"),
    ("Hugging Face token", "hf_", r"\bhf_[A-Za-z]{34}\b"),
    ("npm token", "npm_", r"\bnpm_[A-Za-z0-9]{36}\b"),
    ("PyPI token", "pypi-AgE", r"\bpypi-AgE[A-Za-z0-9_-]{50,}"),
    ("SendGrid key", "SG.", r"\bSG\.[A-Za-z0-9_-]{22}\.[A-Za-z0-9_-]{43}(?![\w-])"),
    ("Telegram bot token", _BOT, r"\b\d{8,10}:AA[A-Za-z0-9_-]{33}(?![\w-])"),
    ("Azure storage key", "AccountKey=", r"AccountKey=(?P<value>[A-Za-z0-9+/]{86}==)"),
    ("DigitalOcean token", "dop_v1_", r"\bdop_v1_[a-f0-9]{64}\b"),
)
_API_KEYS = tuple((name, mark, re.compile(pattern)) for name, mark, pattern in _TOKENS)
_PEM = re.compile(
    r"-----BEGIN (?P<type>[A-Z0-9 ]{0,20}PRIVATE KEY)(?: BLOCK)?-----"
    r"(?P<body>(?:[\w+/=\s\\:,.()]|-(?!----)){40,20000})"
    r"(?:-----END [A-Z0-9 ]{0,40}-----)?"
)
_BASE64 = re.compile(r"[A-Za-z0-9+/]{40}")
_JWT = re.compile(r"\beyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{16,}")
_URL = re.compile(r"://[^\s/:@]{1,64}:(?P<value>[^\s/@]{3,128})@[\w.-]+")
_NAMES = ("secret", "token", "passw", "pwd", "key", "mật khẩu")
_ASSIGNED = re.compile(
    r"(?:secret|token|passw(?:or)?d|passwd|pwd|(?:api|access|auth|account)[ _-]?key|mật khẩu)"
    r"[\w.-]{0,24}[\"'`]?\s{0,4}(?:=>|:=|=|:|\bis\b|\blà\b)\s{0,4}[\"'`]?"
    r"(?P<value>[a-z0-9_+/=.!@$%^&*~-]{8,256})"
)
"""Assignment to a name for secrets, in lower case."""
_MADE_UP = re.compile(
    r"example|sample|dummy|your|change|replace|insert|placeholder|redacted|xxxx|\*\*\*|\.\.\.|<|"
    r"0000000|1234567890(?!\d)|abcdefgh|(.)\1{7}",
    re.IGNORECASE,
)
LEAST_BITS = 3.0
"""Minimum entropy of an assigned secret of letters and digits, in bits per character."""


def secrets(text: str) -> Iterator[PiiSpan]:
    """Every secret of ``text``; ``value`` is the secret itself."""
    if "PRIVATE KEY" in text:
        for found in _PEM.finditer(text):
            if _BASE64.search(found["body"]):
                kind = found["type"].replace("PRIVATE KEY", "private key")
                name = kind.replace("OPENSSH", "OpenSSH")  # as people write it
                yield PiiSpan(*found.span(), "private_key", name, found[0])
    for name, mark, pattern in _API_KEYS:
        for found in matches_near(mark, pattern, text, 10 if mark == _BOT else 0, 512):
            group = "value" if "value" in pattern.groupindex else 0
            if not _MADE_UP.search(found[group]):
                yield PiiSpan(*found.span(group), "api_key", name, found[group])
    for found in matches_near("eyJ", _JWT, text, 0, 8192):
        yield PiiSpan(*found.span(), "jwt", "JSON web token", found[0])
    for found in matches_near("://", _URL, text, 0, 512):
        if not _MADE_UP.search(found["value"]) and not _is_variable(found["value"]):
            yield PiiSpan(*found.span("value"), "password", "password in a URL", found["value"])
    yield from _assigned_secrets(text)


def _assigned_secrets(text: str) -> Iterator[PiiSpan]:
    lower = text.replace("İ", "I").lower()  # The one letter that would become two.
    if not any(name in lower for name in _NAMES):
        return
    for found in _ASSIGNED.finditer(lower):
        start, end = found.span("value")
        value = text[start:end]
        value = value if value.endswith("==") else value.rstrip(".!=")
        if _is_random(value) and not _MADE_UP.search(value):
            yield PiiSpan(start, start + len(value), "password", "assigned secret", value)


def _is_random(value: str) -> bool:
    """Return True if ``value`` looks random or like a password, and not like a word or code."""
    kinds = sum(
        1
        for pattern in ("[a-z]", "[A-Z]", "[0-9]", r"[^A-Za-z0-9_.\-/=]")
        if re.search(pattern, value)
    )
    if len(value) < 8 or kinds < 2 or _is_variable(value):
        return False
    if not re.search("[0-9]", value) and kinds < 3:
        return False
    return len(value) < 12 or entropy(value) >= LEAST_BITS


def _is_variable(value: str) -> bool:
    """Names of code: ``os.environ.get``, ``${TOKEN}``, ``self.token1``, ``snake_case``."""
    return (
        value.startswith(("$", "%", "{"))
        or re.fullmatch(r"[A-Za-z]+(?:[._-][A-Za-z]+\d{0,2})+|[a-z]+(?:[A-Z][a-z]+)+\d{0,2}", value)
        is not None
    )


def entropy(value: str) -> float:
    """Shannon entropy of the characters, in bits a character."""
    counts = Counter(value).values()
    return -sum(count / len(value) * math.log2(count / len(value)) for count in counts)


_LOCAL = string.ascii_letters + string.digits + "._+'-"
_DOMAIN = re.compile(
    r"@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,8}[A-Za-z]{2,24}(?![\w@-]|\.\w)"
)
_NO_PEOPLE = re.compile(
    r"@(?:[\w-]+\.)*(?:example\.(?:com|org|net)|example|invalid|test|localhost)$|^git@"
)
_IPV4 = re.compile(
    r"(?<![\w.-])(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)(?![\w-]|\.\d)"
)
_IPV6 = re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{1,4}(?![\w:]|\.\d)")
_DOTTED = re.compile(r"\d\.\d{1,3}\.\d{1,3}\.\d")
_COLONS = re.compile(r":[0-9A-Fa-f]{0,4}:[0-9A-Fa-f]{1,4}\b")
_VERSION = re.compile(
    r"(?:\bv|version|release|firmware|section|chapter|phiên bản)[\s.:]{0,2}$", re.IGNORECASE
)
_RESOLVERS = frozenset({"8.8.8.8", "8.8.4.4", "1.1.1.1", "1.0.0.1", "9.9.9.9", "208.67.222.222"})

CALL = re.compile(
    r"\b(?:phone|phones|tel|telephone|call|calling|called|ring|dial|fax|mobile|mob|cell|whatsapp|zalo|viber"
    r"|sms|text|txt|contact|hotline|helpline|landline|line|reach|number is|no is|điện thoại|sđt|đt|gọi"
    r"|liên hệ|di động|số máy|téléphone|tél|portable|appelez|handy|telefon|teléfono|llame)\b",
    re.IGNORECASE,
)
"""Words before a telephone number."""
_YEARS = re.compile(r"\(?(?:1[5-9]|20)\d\d ?[-–] ?(?:1[5-9]|20)\d\d\)?")
_NORTH_AMERICAN = re.compile(r"(?:1[-. ])?(?:\(\d{3}\) ?|\d{3}[-.])\d{3}[-.]\d{4}")


def emails(text: str) -> Iterator[PiiSpan]:
    """Yield e-mail addresses, except addresses in domains reserved for examples (RFC 2606)."""
    at = text.find("@")
    while at >= 0:
        domain = _DOMAIN.match(text, at)
        if domain:
            before = text[max(0, at - 64) : at]
            local = before[len(before.rstrip(_LOCAL)) :].lstrip("._+'-")
            value = f"{local}{domain[0]}".lower()
            if (
                local
                and local[-1] not in ".'"
                and ".." not in value
                and not _NO_PEOPLE.search(value)
            ):
                yield PiiSpan(at - len(local), domain.end(), "email", "e-mail address", value)
        at = text.find("@", domain.end() if domain else at + 1)


def addresses(text: str) -> Iterator[PiiSpan]:
    """Yield public IP addresses.

    Private, reserved and documentation ranges and well-known resolvers are ignored. Addresses that
    begin with a number below 5 are ignored too, because most are version numbers.
    """
    done = 0
    for sign in _DOTTED.finditer(text):
        found = _IPV4.search(text, max(done, sign.start() - 3), sign.end() + 8)
        if found and not _VERSION.search(text[max(0, found.start() - 12) : found.start()]):
            yield from _public(found)
            done = found.end()
    for sign in _COLONS.finditer(text):
        found = _IPV6.search(text, max(done, sign.start() - 32), sign.end() + 40)
        if found and ("::" in found[0] or found[0].count(":") == 7):
            yield from _public(found)
            done = found.end()


def _public(found: re.Match[str]) -> Iterator[PiiSpan]:
    try:
        address = ip_address(found[0])
    except ValueError:
        return
    if address.version == 6 and int(address) >> 125 != 1:
        return  # ``::a`` stands in programs; what reaches others lies in 2000::/3 (RFC 4291)
    first = found[0].partition(".")[0]
    if address.is_global and str(address) not in _RESOLVERS and first not in {"1", "2", "3", "4"}:
        yield PiiSpan(*found.span(), "ip", f"IPv{address.version} address", str(address))


def phones(text: str, low: int, high: int, regions: tuple[str, ...]) -> Iterator[PiiSpan]:
    """Yield telephone numbers that are valid in their numbering plan (Google's libphonenumber).

    Numbers with a country code are found anywhere. A national number must be valid in one of
    ``regions``. The number must be written in groups or follow a word such as "call", because ten
    plain digits are equally often an order number.
    """
    for start, written, value in _valid_phones(text[low:high], regions):
        at = low + start
        is_global = written.startswith(("+", "(+"))
        if is_global or (not is_order_number(text, at) and _is_announced(text, at, written)):
            yield PiiSpan(at, at + len(written), "phone", "telephone number", value)


def _is_announced(text: str, start: int, written: str) -> bool:
    """Return True if a national number is written or announced as a telephone number."""
    if _YEARS.fullmatch(written):
        return False
    if is_preceded_by(CALL, text, start, before=48) or _NORTH_AMERICAN.fullmatch(written):
        return True
    groups = [len(digits) for digits in re.findall(r"\d+", written)]
    return (
        2 <= len(groups) <= 5
        and max(groups) <= 6
        and min(groups) >= 2
        and written[0] in "0("
        and " - " not in written  # a difference of numbers
    )


def _valid_phones(text: str, regions: tuple[str, ...]) -> list[tuple[int, str, str]]:
    """Return start, text and E.164 form of the valid numbers; the first region wins."""
    from phonenumbers import PhoneNumberFormat, PhoneNumberMatcher, format_number

    found: dict[int, tuple[int, str, str]] = {}
    for region in regions:
        for match in PhoneNumberMatcher(text, region):
            value = str(format_number(match.number, PhoneNumberFormat.E164))
            found.setdefault(match.start, (match.start, match.raw_string, value))
    return [*found.values()]


_APART = r"(?<![\w.,+/-])(?:", r")(?![\w%]|[.,/-]\d)"
"""Boundaries of a number: no digits, letters or parts of a larger number around the match."""
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
    """Return the issuer of payment cards with this number."""
    for name, (low, high), lengths in _ISSUERS:
        if len(digits) in lengths and low <= int(digits[: len(str(low))]) <= high:
            return name
    return None


def cards(text: str, low: int, high: int) -> Iterator[PiiSpan]:
    """Yield payment cards between ``low`` and ``high``, by issuer range, length and check digit."""
    for found in _CARD.finditer(text, low, high):
        digits = re.sub("[ -]", "", found[0])
        name = issuer(digits) if len(set(digits)) > 1 else None
        if name and luhn(digits) and not is_order_number(text, found.start()):
            yield PiiSpan(*found.span(), "card", f"{name} card", digits)


def can_check_ids() -> bool:
    """Return True if python-stdnum is installed, which verifies IBANs and national ids."""
    return find_spec("stdnum") is not None


def ibans(text: str, low: int, high: int) -> Iterator[PiiSpan]:
    """Bank accounts (ISO 13616): a country's length and form, and the check digits."""
    for found in _IBAN.finditer(text, low, high):
        # The pattern may take words behind the number: the longest part that is an account counts.
        written = found[0]
        while len(written) >= 15:
            if _is_valid("iban", written):
                value = written.replace(" ", "")
                yield PiiSpan(found.start(), found.start() + len(written), "iban", "IBAN", value)
                break
            written = written[: max(written.rfind(" "), 0)]


@dataclass(frozen=True)
class NationalId:
    """Format of a country's personal identification number."""

    name: str
    module: str
    """Module of python-stdnum; empty if the rule is implemented here."""
    pattern: str
    words: str = ""
    """Pattern of announcing words. Required unless ``bare`` matches."""
    bare: str = ""
    """Pattern of numbers without announcing words; empty if the check digit is too weak."""


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


def national_ids(text: str, low: int, high: int) -> Iterator[PiiSpan]:
    """Yield personal identification numbers of the countries in :data:`IDS`."""
    for each, pattern, words, bare in _ONE_ID:
        for found in pattern.finditer(text, low, high):
            said = words is not None and is_preceded_by(words, text, found.start())
            plain = bare is not None and bare.fullmatch(found[0]) is not None
            plain = plain and not is_order_number(text, found.start())
            # Numbers without a check digit of their own may as well be telephone numbers.
            plain = plain and bool(each.module or not is_preceded_by(CALL, text, found.start()))
            if (said or plain) and _is_id(each, found[0]):
                value = re.sub(r"[ .-]", "", found[0])
                yield PiiSpan(*found.span(), "national_id", each.name, value)


def _is_id(each: NationalId, written: str) -> bool:
    if each.module:
        return _is_valid(each.module, written)
    if each.name.startswith("VN"):
        return is_cccd(written.replace(" ", ""))
    return is_nino(written.replace(" ", ""))


@lru_cache(maxsize=4096)
def _is_valid(module: str, written: str) -> bool:
    """Return True if python-stdnum's ``module`` accepts the number; False without the library."""
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
    """Return True if 12 digits have the structure of a Vietnamese citizen id. No check digit
    exists.

    Three digits for the province, one for century and sex (0 and 1 for the 20th century, 2 and 3
    for the 21st), two for the year of birth, six for a serial number.
    """
    if len(digits) != 12 or int(digits[:3]) not in _PROVINCES or digits[6:] == "000000":
        return False
    century = int(digits[3]) // 2
    year = 1900 + 100 * century + int(digits[4:6])
    return century <= 1 and 1905 <= year <= date.today().year


def is_nino(written: str) -> bool:
    """Return True for possible prefixes of a UK National Insurance number (HMRC, NIM39110)."""
    first, second = written[0], written[1]
    return (
        first not in "DFIQUV"
        and second not in "DFIQUVO"
        and written[:2] not in {"BG", "GB", "NK", "KN", "TN", "NT", "ZZ"}
    )


REGIONS = ("US", "GB", "VN")
"""Default countries of national telephone numbers."""

_NUMBERS = re.compile(
    r"\d(?:(?:[ ().·–-]{0,3}\d){5}(?:[ ().·–-]{0,3}\d| ?[A-D]\b)|[A-Z][0-9L-V]{2}[A-Z])"
    r"(?:[^\d\x00]{0,23}\d)*[^\d\x00]{0,24}"
)
"""Text with candidates for numbers: seven digits, or six digits and a letter, or Italy's mixture of
both, up to a gap without digits."""
_BEFORE = 40
"""Length of a possible prefix before the digits, in characters: ``+`` or the letters of an IBAN."""


@dataclass(frozen=True)
class Finder:
    """Looks for personal data and secrets."""

    kinds: tuple[PiiKind, ...] = KINDS
    """Kinds to search for."""
    regions: tuple[str, ...] = REGIONS
    """ISO 3166 codes of countries for telephone numbers without a country code."""

    def find(self, text: str) -> list[PiiSpan]:
        """Return the items of ``text`` in order, without overlap."""
        found = [span for span in self._all(text) if span.kind in self.kinds]
        return resolve_overlaps(found) if len(found) > 1 else found

    def _all(self, text: str) -> Iterator[PiiSpan]:
        yield from secrets(text)
        if "@" in text:
            yield from emails(text)
        for found in _NUMBERS.finditer(text):
            low, high = max(0, found.start() - _BEFORE), found.end()
            yield from cards(text, low, high)
            yield from ibans(text, low, high)
            yield from national_ids(text, low, high)
            yield from phones(text, low, high, self.regions)
        yield from addresses(text)


def resolve_overlaps(found: Iterable[PiiSpan]) -> list[PiiSpan]:
    """Resolve overlaps: the first kind wins, then the longest item. Returns the items in order."""
    kept: list[PiiSpan] = []
    group: list[PiiSpan] = []
    end = 0
    for span in sorted(found, key=lambda each: each.start):
        if group and span.start >= end:
            kept += _best(group)
            group = []
        end = max(end, span.end) if group else span.end
        group.append(span)
    return kept + _best(group)


def _best(group: list[PiiSpan]) -> list[PiiSpan]:
    if len(group) < 2:
        return group
    kept: list[PiiSpan] = []
    for span in sorted(group, key=lambda each: (KINDS.index(each.kind), each.start - each.end)):
        if all(span.end <= other.start or other.end <= span.start for other in kept):
            kept.append(span)
    return sorted(kept, key=lambda each: each.start)


def replace_items(text: str, found: Iterable[PiiSpan], new: Callable[[PiiSpan], str]) -> str:
    """Replace each item of ``text`` with the result of ``new``. Items must be in order."""
    parts, done = [], 0
    for span in found:
        parts += [text[done : span.start], new(span)]
        done = span.end
    return "".join([*parts, text[done:]])


def mask_all(text: str, found: Iterable[PiiSpan]) -> str:
    """Return ``text`` with all items masked."""
    return replace_items(text, found, lambda span: mask(text, span))


def mask(text: str, span: PiiSpan) -> str:
    """Return a masked item. The first two characters of personal data stay visible."""
    item = text[span.start : span.end]
    shown = 0 if span.kind in SECRETS else 2
    stars = re.sub(r"\w", "*", item[shown:])
    if len(stars) > 24:
        stars = f"{'*' * 8} ({len(item)} characters)"
    return item[:shown] + stars
