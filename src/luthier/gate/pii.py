"""Detection of personal data and secrets in text.

API keys, tokens and passwords are recognized by the formats that vendors document. Obvious
placeholders (``AKIAIOSFODNN7EXAMPLE``, ``sk-xxxx``, ``your-api-key``) are ignored. Check digits of
payment cards (Luhn and ISO/IEC 7812 ranges) are verified here. python-stdnum verifies IBANs and
national ids, if installed (extra ``privacy``).
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left
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
    "private_key", "api_key", "jwt", "password", "email", "iban", "card", "national_id", "phone",
    "ip",
]  # fmt: skip
KINDS: tuple[PiiKind, ...] = get_args(PiiKind)
"""All kinds in order of priority: the earlier kind wins overlapping characters."""
NOT_SEARCHED = (
    "Not searched: names of people, postal addresses, birth dates, and record or customer numbers."
)
"""Personal data without a recognizable form, for the output of commands that redact."""
SECRETS: frozenset[PiiKind] = frozenset({"private_key", "api_key", "jwt", "password"})
SEPARATOR = "\x00"
"""Separator of joined texts. No item contains the separator."""
REGIONS = ("US", "GB", "VN")
"""Default countries of national telephone numbers."""
LEAST_BITS = 3.0
"""Minimum entropy of an assigned secret of letters and digits, in bits per character."""


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


@dataclass(frozen=True)
class Pattern:
    """Form of an item that contains a literal text."""

    kind: PiiKind
    detail: str
    mark: str | re.Pattern[str]
    """Text in every item, because a search for plain text is several times as fast as a regular
    expression."""
    regex: re.Pattern[str]
    rejects: re.Pattern[str]
    """Placeholders and other invented items."""
    normalize: Callable[[re.Match[str]], str] = lambda found: found[found.lastgroup or 0]
    """Function that returns the normalized item; empty to reject a match."""
    before: int = 0
    after: int = 512
    """Most characters of an item before and after the start of the mark."""

    def find(self, text: str) -> Iterator[PiiSpan]:
        """Yield the items around each mark. Without ``before``, an item starts with the mark."""
        # Searching a few characters around a mark keeps the time linear for hostile text.
        look, done = self.regex.search if self.before else self.regex.match, 0
        for at in _places(self.mark, text):
            if at < done:
                continue
            found = look(text, max(done, at - self.before), at + self.after)
            if found and found.end() > at:
                group = found.lastgroup or 0
                if not self.rejects.search(found[group]) and (value := self.normalize(found)):
                    yield PiiSpan(*found.span(group), self.kind, self.detail, value)
                done = found.end()


def _places(mark: str | re.Pattern[str], text: str) -> Iterator[int]:
    if isinstance(mark, re.Pattern):
        yield from (found.start() for found in mark.finditer(text))
        return
    at = text.find(mark)
    while at >= 0:
        yield at
        at = text.find(mark, at + len(mark))


_PLACEHOLDER = (
    r"example|sample|dummy|your|change|replace|insert|placeholder|redacted|xxxx|\*\*\*|\.\.\.|<|"
    r"0000000|1234567890(?!\d)|abcdefgh|(.)\1{7}"
)
_VARIABLE = r"[$%{].*|[A-Za-z]+(?:[._-][A-Za-z]+\d{0,2})+|[a-z]+(?:[A-Z][a-z]+)+\d{0,2}"
"""Names of code: ``os.environ.get``, ``${TOKEN}``, ``self.token1``, ``snake_case``."""
_MADE_UP = re.compile(_PLACEHOLDER, re.IGNORECASE)
_NO_PASSWORD = re.compile(rf"(?s:^(?:{_VARIABLE})$)|(?i:{_PLACEHOLDER})")
_NO_PEOPLE = re.compile(
    r"@(?:[\w-]+\.)*(?:example\.(?:com|org|net)|example|invalid|test|localhost)$|^git@|\.\.", re.I
)
"""Addresses in domains reserved for examples (RFC 2606), of repositories, or with two dots."""
_NEVER = re.compile(r"(?!)")
_VERSION = re.compile(
    r"(?:\bv|version|release|firmware|section|chapter|phiên bản)[\s.:]{0,2}$", re.IGNORECASE
)
_RESOLVERS = frozenset({"8.8.8.8", "8.8.4.4", "1.1.1.1", "1.0.0.1", "9.9.9.9", "208.67.222.222"})


def _public_ip(found: re.Match[str]) -> str:
    """Return a public address; empty for private, reserved and documentation ranges, and versions.

    IPv4 addresses that begin with a number below 5 are mostly version numbers. IPv6 addresses such
    as ``::a`` are common in programs; public addresses are in 2000::/3 (RFC 4291).
    """
    before = found.string[max(0, found.start() - 12) : found.start()]
    try:
        address = ip_address(found[0])
    except ValueError:
        return ""
    if address.version == 6:
        is_version = int(address) >> 125 != 1
    else:
        is_version = bool(re.match(r"[1-4]\.", found[0]) or _VERSION.search(before))
    if is_version or not address.is_global or str(address) in _RESOLVERS:
        return ""
    return str(address)


def _keys(detail: str, mark: str, regex: str, before: int = 0) -> Pattern:
    return Pattern("api_key", detail, mark, re.compile(regex), _MADE_UP, before=before)


_DOMAIN = r"@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,8}[A-Za-z]{2,24}(?![\w@-]|\.\w)"
_OCTET = r"(?:25[0-5]|2[0-4]\d|1?\d?\d)"
# fmt: off
PATTERNS = (
    Pattern("private_key", "private key", "-----BEGIN ", re.compile(
        r"-----BEGIN [A-Z0-9 ]{0,20}PRIVATE KEY(?: BLOCK)?-----"
        r"(?=(?:[^-]|-(?!----)){0,20000}?[A-Za-z0-9+/]{40})"
        r"(?:[\w+/=\s\\:,.()]|-(?!----)){40,20000}(?:-----END [A-Z0-9 ]{0,40}-----)?"
    ), _NEVER, after=20_128),
    _keys("AWS access key id", "AKIA", r"(?<![A-Z0-9])AKIA[A-Z2-7]{16}(?![A-Z0-9])"),
    _keys("AWS access key id", "ASIA", r"(?<![A-Z0-9])ASIA[A-Z2-7]{16}(?![A-Z0-9])"),
    *(_keys("GitHub token", f"gh{kind}_", rf"\bgh{kind}_[A-Za-z0-9]{{36,255}}\b") for kind in "pousr"),
    _keys("GitHub token", "github_pat_", r"\bgithub_pat_[A-Za-z0-9]{22}_[A-Za-z0-9]{59}\b"),
    _keys("GitLab token", "glpat-", r"\bglpat-[A-Za-z0-9_-]{20,}"),
    _keys("Anthropic key", "sk-ant-", r"\bsk-ant-[A-Za-z0-9]+-[A-Za-z0-9_-]{60,}"),
    _keys("OpenAI key", "sk-", r"\bsk-(?:(?:proj|svcacct|admin)-[A-Za-z0-9_-]{40,}"
                               r"|(?!ant-)[A-Za-z0-9]{20,})(?![\w-])"),
    _keys("Google API key", "AIza", r"\bAIza[A-Za-z0-9_-]{35}(?![\w-])"),
    _keys("Google OAuth secret", "GOCSPX-", r"\bGOCSPX-[A-Za-z0-9_-]{28}(?![\w-])"),
    _keys("Slack token", "xox", r"\bxox[abeoprs]-(?:\d+-)?[A-Za-z0-9-]{10,}"),
    _keys("Slack webhook", "hooks.slack.com/",
          r"hooks\.slack\.com/services/T[A-Z0-9]{6,}/B[A-Z0-9]{6,}/[A-Za-z0-9]{20,}"),
    _keys("Stripe key", "sk_live_", r"\bsk_live_[A-Za-z0-9]{16,}\b"),
    _keys("Stripe key", "rk_live_", r"\brk_live_[A-Za-z0-9]{16,}\b"),
    _keys("Hugging Face token", "hf_", r"\bhf_[A-Za-z]{34}\b"),
    _keys("npm token", "npm_", r"\bnpm_[A-Za-z0-9]{36}\b"),
    _keys("PyPI token", "pypi-AgE", r"\bpypi-AgE[A-Za-z0-9_-]{50,}"),
    _keys("SendGrid key", "SG.", r"\bSG\.[A-Za-z0-9_-]{22}\.[A-Za-z0-9_-]{43}(?![\w-])"),
    _keys("Telegram bot token", ":AA", r"\b\d{8,10}:AA[A-Za-z0-9_-]{33}(?![\w-])", 10),
    _keys("Azure storage key", "AccountKey=", r"AccountKey=(?P<value>[A-Za-z0-9+/]{86}==)"),
    _keys("DigitalOcean token", "dop_v1_", r"\bdop_v1_[a-f0-9]{64}\b"),
    Pattern("jwt", "JSON web token", "eyJ", re.compile(
        r"\beyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{16,}"), _NEVER, after=8192),
    Pattern("password", "password in a URL", "://", re.compile(
        r"://[^\s/:@]{1,64}:(?P<value>[^\s/@]{3,128})@[\w.-]+"), _NO_PASSWORD),
    Pattern("email", "e-mail address", "@", re.compile(
        rf"[A-Za-z0-9][A-Za-z0-9._+'-]{{0,63}}(?<![.']){_DOMAIN}"), _NO_PEOPLE,
            lambda found: found[0].lower(), before=64),
    Pattern("ip", "IPv4 address", re.compile(r"\d\.\d{1,3}\.\d{1,3}\.\d"), re.compile(
        rf"(?<![\w.-])(?:{_OCTET}\.){{3}}{_OCTET}(?![\w-]|\.\d)"), _NEVER, _public_ip, 3, 24),
    Pattern("ip", "IPv6 address", re.compile(r":[0-9A-Fa-f]{0,4}:[0-9A-Fa-f]{1,4}\b"), re.compile(
        r"(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{1,4}(?![\w:]|\.\d)"),
            _NEVER, _public_ip, 32, 48),
)
# fmt: on


_NAMES = ("secret", "token", "passw", "pwd", "key", "mật khẩu")
_ASSIGNED = re.compile(
    r"(?:secret|token|passw(?:or)?d|passwd|pwd|(?:api|access|auth|account)[ _-]?key|mật khẩu)"
    r"[\w.-]{0,24}[\"'`]?\s{0,4}(?:=>|:=|=|:|\bis\b|\blà\b)\s{0,4}[\"'`]?"
    r"(?P<value>[a-z0-9_+/=.!@$%^&*~-]{8,256})"
)
"""Assignment to a name for secrets, in lower case."""
_SIGNS = ("[a-z]", "[A-Z]", "[0-9]", r"[^A-Za-z0-9_.\-/=]")


def assigned_secrets(text: str) -> Iterator[PiiSpan]:
    """Yield values of names such as ``token`` that look like a password or random characters."""
    lower = text.replace("İ", "I").lower()  # the one letter that would become two
    # The pattern has no literal start, and would read every text.
    if not any(name in lower for name in _NAMES):
        return
    for found in _ASSIGNED.finditer(lower):
        start, end = found.span("value")
        value = text[start:end]
        # A sentence may end after the secret, but "==" is base64 padding.
        value = value if value.endswith("==") else value.rstrip(".!=")
        signs = [re.search(sign, value) is not None for sign in _SIGNS]
        # Words of code and prose have letters only: a digit, or three kinds of characters, makes a
        # password likely.
        is_password = sum(signs) >= (2 if signs[2] else 3) and len(value) >= 8
        if (
            is_password
            and (len(value) < 12 or entropy(value) >= LEAST_BITS)
            and not _NO_PASSWORD.search(value)
        ):
            yield PiiSpan(start, start + len(value), "password", "assigned secret", value)


def entropy(value: str) -> float:
    """Shannon entropy of the characters, in bits a character."""
    counts = Counter(value).values()
    return -sum(count / len(value) * math.log2(count / len(value)) for count in counts)


_NUMBERED = re.compile(
    r"(?:\b(?:order|invoice|ticket|tracking|parcel|shipment|serial|isbn|issn|doi|sku|asin|item|part"
    r"|model|batch|case|claim|transaction|txn|reference|ref|booking|pmid|pmc|nct|version|build|id"
    r"|mã(?: đơn| vận đơn| giao dịch)?|đơn hàng|hoá đơn|hóa đơn|commande|facture)"
    r"(?: ?(?:number|no|nr|num|id|code|số|hàng))?\.?|#|№)[\s:=#.-]{0,3}$",
    re.IGNORECASE,
)
"""Words before an order number or similar number."""
_CALL = re.compile(
    r"\b(?:phone|phones|tel|telephone|call|calling|called|ring|dial|fax|mobile|mob|cell|whatsapp|zalo|viber"
    r"|sms|text|txt|contact|hotline|helpline|landline|line|reach|number is|no is|điện thoại|sđt|đt|gọi"
    r"|liên hệ|di động|số máy|téléphone|tél|portable|appelez|handy|telefon|teléfono|llame)\b",
    re.IGNORECASE,
)
"""Words before a telephone number."""


def _is_after(words: re.Pattern[str], text: str, start: int, before: int = 40) -> bool:
    """Return True if ``words`` match in the ``before`` characters before ``start``."""
    low = max(0, start - before)
    return words.search(text, max(low, text.rfind(SEPARATOR, low, start)), start) is not None


def _is_order(text: str, start: int) -> bool:
    return _NUMBERED.search(text[max(0, start - 32) : start]) is not None


_YEARS = re.compile(r"\(?(?:1[5-9]|20)\d\d ?[-–] ?(?:1[5-9]|20)\d\d\)?")
_NORTH_AMERICAN = re.compile(r"(?:1[-. ])?(?:\(\d{3}\) ?|\d{3}[-.])\d{3}[-.]\d{4}")


def phones(text: str, low: int, high: int, regions: tuple[str, ...]) -> Iterator[PiiSpan]:
    """Yield telephone numbers that are valid in their numbering plan (Google's libphonenumber).

    Numbers with a country code are found anywhere. A national number must be valid in one of
    ``regions``. The number must be written in groups or follow a word such as "call", because ten
    plain digits are equally often an order number.
    """
    # Imported late, because most texts have no such digits.
    from phonenumbers import PhoneNumberFormat, PhoneNumberMatcher, format_number

    done = set[int]()
    for region in regions:  # the first region wins
        for match in PhoneNumberMatcher(text[low:high], region):
            at, written = low + match.start, match.raw_string
            # A number with a country code matches in every region.
            if at in done:
                continue
            done.add(at)
            is_global = written.startswith(("+", "(+"))
            if is_global or (not _is_order(text, at) and _is_announced(text, at, written)):
                value = str(format_number(match.number, PhoneNumberFormat.E164))
                yield PiiSpan(at, at + len(written), "phone", "telephone number", value)


def _is_announced(text: str, start: int, written: str) -> bool:
    """Return True if a national number is written or announced as a telephone number."""
    if _YEARS.fullmatch(written):
        return False
    if _is_after(_CALL, text, start, before=48) or _NORTH_AMERICAN.fullmatch(written):
        return True
    groups = [len(digits) for digits in re.findall(r"\d+", written)]
    return (
        2 <= len(groups) <= 5
        and max(groups) <= 6
        and min(groups) >= 2
        and written[0] in "0("
        and " - " not in written  # a difference of numbers
    )


_APART = r"(?<![\w.,+/-])(?:", r")(?![\w%]|[.,/-]\d)"
"""Boundaries of a number: no digits, letters or parts of a larger number around the match."""
_CARD = re.compile(
    r"\d{14,19}|\d{4}([ -])\d{4}\1\d{4}\1\d{2,4}(?:\1\d{3})?|\d{4}([ -])\d{6}\2\d{4,5}".join(_APART)
)
_ISSUERS = {
    "Visa": r"4(?:\d{15}|\d{18})",
    "Mastercard": r"(?:5[1-5]\d\d|222[1-9]|22[3-9]\d|2[3-6]\d\d|27[01]\d|2720)\d{12}",
    "American Express": r"3[47]\d{13}",
    "Discover": r"(?:6011|64[4-9]\d|65\d\d)(?:\d{12}|\d{15})",
    "JCB": r"(?:352[89]|35[3-8]\d)(?:\d{12}|\d{15})",
    "Diners Club": r"(?:30[0-5]|38\d|39\d)(?:\d{11}|\d{13})|36\d{12}",
    "UnionPay": r"62\d{14,17}",
    "Napas": r"9704(?:\d{12}|\d{15})",
}
"""Numbers of each issuer of cards: prefixes and lengths."""
_IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b")


def luhn(digits: str) -> bool:
    """The check of ISO/IEC 7812-1: every second digit from the right counts twice."""
    doubled = (int(digit) * (1 + place % 2) for place, digit in enumerate(reversed(digits)))
    return sum(number - 9 * (number > 9) for number in doubled) % 10 == 0


def issuer(digits: str) -> str | None:
    """Return the issuer of payment cards with this number."""
    return next((name for name, form in _ISSUERS.items() if re.fullmatch(form, digits)), None)


def cards(text: str, low: int, high: int) -> Iterator[PiiSpan]:
    """Yield payment cards between ``low`` and ``high``, by issuer range, length and check digit."""
    for found in _CARD.finditer(text, low, high):
        digits = re.sub("[ -]", "", found[0])
        # 0000… passes the Luhn check.
        name = issuer(digits) if len(set(digits)) > 1 else None
        if name and luhn(digits) and not _is_order(text, found.start()):
            yield PiiSpan(*found.span(), "card", f"{name} card", digits)


def can_check_ids() -> bool:
    """Return True if python-stdnum is installed, which verifies IBANs and national ids."""
    return find_spec("stdnum") is not None


def ibans(text: str, low: int, high: int) -> Iterator[PiiSpan]:
    """Bank accounts (ISO 13616): a country's length and form, and the check digits."""
    for found in _IBAN.finditer(text, low, high):
        # The pattern may take words behind the number: the longest part that is an account counts.
        written = found[0]
        while len(written) >= 15 and not _is_valid("iban", written):
            written = written[: max(written.rfind(" "), 0)]
        if len(written) >= 15:
            value = written.replace(" ", "")
            yield PiiSpan(found.start(), found.start() + len(written), "iban", "IBAN", value)


# Rows repeat numbers, such as the account of a company in each invoice.
@lru_cache(maxsize=4096)
def _is_valid(module: str, written: str) -> bool:
    """Return True if python-stdnum's ``module`` accepts the number; False without the library."""
    try:
        return bool(import_module(f"stdnum.{module}").is_valid(written))
    except ModuleNotFoundError:
        return False


_PROVINCES = re.compile(
    r"0(?:0[12468]|1[0124579]|2[024-7]|3[013-8]|4[024-689]|5[12468]|6[024678]|7[024579]|8[02-4679]"
    r"|9[1-6])"
)
"""Codes of the place of birth in Vietnam, as of the 63 provinces before July 2025."""


def is_cccd(written: str) -> bool:
    """Return True if a number has the structure of a Vietnamese citizen id (Decree 137/2015,
    article 13, and Circular 59/2021). No check digit exists, and python-stdnum lacks the id.

    Three digits for the province, one for century and sex (0 and 1 for the 20th century, 2 and 3
    for the 21st), two for the year of birth, six for a serial number.
    """
    digits = written.replace(" ", "")
    if len(digits) != 12 or not _PROVINCES.match(digits) or digits[6:] == "000000":
        return False
    century = int(digits[3]) // 2
    year = 1900 + 100 * century + int(digits[4:6])
    return century <= 1 and 1905 <= year <= date.today().year


# fmt: off
_IDS: tuple[tuple[str, str | Callable[[str], bool], str, str, str], ...] = (
    ("VN citizen id (CCCD)", is_cccd, r"0\d{2} ?\d{3} ?\d{3} ?\d{3}",
     r"cccd|căn cước|cmnd|định danh|citizen", ".+"),
    ("US social security number", "us.ssn", r"\d{3}-\d{2}-\d{4}|\d{9}|\d{3} \d{2} \d{4}",
     r"ssn|social security", r"\d{3}-\d{2}-\d{4}"),
    # Possible prefixes (HMRC, NIM39110); no check digit exists.
    ("UK national insurance number", bool, r"(?!BG|GB|NK|KN|TN|NT|ZZ)[A-CEGHJ-PR-TW-Z]"
     r"[A-CEGHJ-NPR-TW-Z] ?\d{2} ?\d{2} ?\d{2} ?[A-D]", "", ".+"),
    ("FR NIR", "fr.nir", r"[1278] ?\d{2} ?\d{2} ?(?:\d{2}|2[AB]) ?\d{3} ?\d{3} ?\d{2}", "", ".+"),
    ("DE tax id", "de.idnr", r"[1-9]\d ?\d{3} ?\d{3} ?\d{3}",
     r"steuer|idnr|id-nr|tax id|\btin\b", r"\d\d \d{3} \d{3} \d{3}"),
    ("IN Aadhaar", "in_.aadhaar", r"[2-9]\d{3}[ -]?\d{4}[ -]?\d{4}",
     r"aadhaar|aadhar|uidai", r"\d{4} \d{4} \d{4}"),
    ("BR CPF", "br.cpf", r"\d{3}\.\d{3}\.\d{3}-\d{2}|\d{11}", r"\bcpf\b",
     r"\d{3}\.\d{3}\.\d{3}-\d{2}"),
    ("ES DNI", "es.dni", r"\d{8}[- ]?[A-Z]", r"\bdni\b|\bnif\b", r"\d{8}-?[A-Z]"),
    ("ES NIE", "es.nie", r"[XYZ][- ]?\d{7}[- ]?[A-Z]", "", ".+"),
    ("IT codice fiscale", "it.codicefiscale",
     r"[A-Z]{6}[0-9LMNP-V]{2}[A-EHLMPRST][0-9LMNP-V]{2}[A-Z][0-9LMNP-V]{3}[A-Z]", "", ".+"),
    ("NL BSN", "nl.bsn", r"\d{9}|\d{4}\.\d{2}\.\d{3}", r"\bbsn\b|burgerservice|sofinummer", ""),
    ("PL PESEL", "pl.pesel", r"\d{11}", r"pesel", ""),
    ("SE personnummer", "se.personnummer", r"(?:19|20)?\d{6}[-+]\d{4}", "", ".+"),
    ("CN resident id", "cn.ric", r"[1-6]\d{16}[\dX]", "", ".+"),
    ("KR resident number", "kr.rrn", r"\d{6}-[1-8]\d{6}", "", ".+"),
    ("MY NRIC", "my.nric", r"\d{6}-\d{2}-\d{4}", "", ".+"),
    ("TH citizen id", "th.pin", r"\d-\d{4}-\d{5}-\d{2}-\d|\d{13}", r"บัตร|citizen", r"[\d-]{17}"),
)
# fmt: on
"""Name, check (a module of python-stdnum or a function), form, words before the number, and forms
that need no such words. No words are needed for a form with a strong check digit."""
_ID_FORMS = [
    (name, check, re.compile(form.join(_APART)), re.compile(words or "(?!)", re.IGNORECASE),
     re.compile(bare or "(?!)"))
    for name, check, form, words, bare in _IDS
]  # fmt: skip


def national_ids(text: str, low: int, high: int) -> Iterator[PiiSpan]:
    """Yield personal identification numbers."""
    for name, check, form, words, bare in _ID_FORMS:
        for found in form.finditer(text, low, high):
            start, written = found.start(), found[0]
            if not _is_after(words, text, start) and (
                not bare.fullmatch(written)
                or _is_order(text, start)
                # Numbers without a check digit may as well be telephone numbers.
                or (callable(check) and _is_after(_CALL, text, start))
            ):
                continue
            if check(written) if callable(check) else _is_valid(check, written):
                value = re.sub(r"[ .-]", "", written)
                yield PiiSpan(*found.span(), "national_id", name, value)


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
        for pattern in PATTERNS:
            yield from pattern.find(text)
        yield from assigned_secrets(text)
        # The checks of numbers are slow, and run only around seven digits, which few texts have.
        for found in _NUMBERS.finditer(text):
            low, high = max(0, found.start() - _BEFORE), found.end()
            yield from cards(text, low, high)
            yield from ibans(text, low, high)
            yield from national_ids(text, low, high)
            yield from phones(text, low, high, self.regions)


def resolve_overlaps(found: Iterable[PiiSpan]) -> list[PiiSpan]:
    """Resolve overlaps: the first kind wins, then the longest item. Returns the items in order."""
    kept: list[PiiSpan] = []
    # Secrets win over personal data: the message must name what has to be revoked.
    for span in sorted(found, key=lambda each: (KINDS.index(each.kind), each.start - each.end)):
        at = bisect_left(kept, span.start, key=lambda each: each.start)
        if (not at or kept[at - 1].end <= span.start) and (
            at == len(kept) or span.end <= kept[at].start
        ):
            kept.insert(at, span)
    return kept


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
    # Two characters let users find the item; of a secret, none may leak into a report.
    shown = 0 if span.kind in SECRETS else 2
    stars = re.sub(r"\w", "*", item[shown:])
    if len(stars) > 24:
        stars = f"{'*' * 8} ({len(item)} characters)"
    return item[:shown] + stars
