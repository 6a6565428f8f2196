"""E-mail addresses, telephone numbers and IP addresses."""

from __future__ import annotations

import re
import string
from collections.abc import Iterator, Sequence
from functools import lru_cache
from ipaddress import ip_address

from luthier.inspection.pii.spans import Span, numbered, says

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

_PHONE = re.compile(
    r"(?<![\w.,/$€£+=#-])(?:\+|\(\+?)?\d(?:[\s().·–-]{0,3}\d){6,16}(?![\w%]|[.,:/]\d|-\d)"
)
"""What may be a telephone number: 7 to 17 digits, as people group them."""
_MOST_WORDS = 7
"""Groups of digits, apart by blanks, up to which the number may be some of them only."""
_WORD = re.compile(r"\S+")
CALL = re.compile(
    r"\b(?:phone|phones|tel|telephone|call|calling|called|ring|dial|fax|mobile|mob|cell|whatsapp|zalo|viber"
    r"|sms|text|txt|contact|hotline|helpline|landline|line|reach|number is|no is|điện thoại|sđt|đt|gọi"
    r"|liên hệ|di động|số máy|téléphone|tél|portable|appelez|handy|telefon|teléfono|llame)\b",
    re.IGNORECASE,
)
"""Words before a telephone number."""
_NORTH_AMERICAN = re.compile(r"(?:1[-. ])?(?:\(\d{3}\) ?|\d{3}[-.])\d{3}[-.]\d{4}")
_DATE = re.compile(
    r"(?:19|20)\d\d[-. ](?:0?[1-9]|1[0-2])[-. ](?:0?[1-9]|[12]\d|3[01])\b"
    r"|(?:0?[1-9]|[12]\d|3[01])[-. ](?:0?[1-9]|1[0-2])[-. ](?:19|20)\d\d\b"
    r"|(?:1[5-9]|20)\d\d ?[-–] ?(?:1[5-9]|20)\d\d$"
)


def emails(text: str) -> Iterator[Span]:
    """E-mail addresses of people and offices; those reserved for examples (RFC 2606) are none."""
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
                yield Span(at - len(local), domain.end(), "email", "e-mail address", value)
        at = text.find("@", domain.end() if domain else at + 1)


def addresses(text: str) -> Iterator[Span]:
    """Public IP addresses.

    Left out are private, reserved and documentation ranges, well-known resolvers, and what is as likely
    a version: four numbers of which the first is below 5.
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


def _public(found: re.Match[str]) -> Iterator[Span]:
    try:
        address = ip_address(found[0])
    except ValueError:
        return
    first = found[0].partition(".")[0]
    if address.is_global and str(address) not in _RESOLVERS and first not in {"1", "2", "3", "4"}:
        yield Span(*found.span(), "ip", f"IPv{address.version} address", str(address))


def phones(text: str, low: int, high: int, regions: Sequence[str]) -> Iterator[Span]:
    """Telephone numbers that exist by the numbering plans (Google's libphonenumber).

    Numbers with a country code are found anywhere. A number in a national form must be valid in one of
    ``regions``, and be written in groups or come after a word like "call": ten digits alone are as
    often the number of an order.
    """
    for found in _PHONE.finditer(text, low, high):
        if _DATE.match(found[0].lstrip("(")):
            continue
        for start, written in _parts(found):
            value = _judged(text, start, written, tuple(regions))
            if value:
                yield Span(start, start + len(written), "phone", "telephone number", value)
                break


def _parts(found: re.Match[str]) -> Iterator[tuple[int, str]]:
    """The whole, and then without the numbers before and after it: ``24 (415) 626-4490 10``."""
    words = list(_WORD.finditer(found[0]))
    if len(words) > _MOST_WORDS:
        yield found.start(), found[0]
        return
    for size in range(len(words), 0, -1):
        for first in range(len(words) - size + 1):
            start, end = words[first].start(), words[first + size - 1].end()
            written = found[0][start:end]
            if sum(character.isdigit() for character in written) >= 7:
                yield found.start() + start, written


def _judged(text: str, start: int, written: str, regions: tuple[str, ...]) -> str | None:
    if written.count("(") != written.count(")"):
        return None
    if written.startswith(("+", "(+")):
        return _valid(written, None)
    if numbered(text, start) or not _as_written(text, start, written):
        return None
    return _valid(written, regions)


def _as_written(text: str, start: int, written: str) -> bool:
    """Whether a number without a country code is written as a telephone number, or said to be one."""
    if says(CALL, text, start, before=48) or _NORTH_AMERICAN.fullmatch(written):
        return True
    groups = [len(digits) for digits in re.findall(r"\d+", written)]
    return (
        len(groups) in (2, 3, 4, 5) and max(groups) <= 6 and min(groups) >= 2 and written[0] in "0("
    )


@lru_cache(maxsize=4096)
def _valid(written: str, regions: tuple[str, ...] | None) -> str | None:
    """E.164 form of a number that is valid, in any of ``regions`` where it names no country."""
    import phonenumbers

    for region in regions if regions is not None else (None,):
        try:
            number = phonenumbers.parse(written, region)
        except phonenumbers.NumberParseException:
            continue
        if phonenumbers.is_valid_number(number):
            return str(phonenumbers.format_number(number, phonenumbers.PhoneNumberFormat.E164))
    return None
