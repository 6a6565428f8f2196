"""Detected items and near misses: published test numbers and formats from vendor documentation.

Keys are assembled at run time, so that scanners of source code find no key.
"""

from __future__ import annotations

import random
import string
import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.gate.pii import (
    SECRETS,
    Finder,
    PiiSpan,
    can_check_ids,
    entropy,
    is_cccd,
    issuer,
    luhn,
    mask,
    mask_all,
    resolve_overlaps,
)

FINDER = Finder()
needs_stdnum = pytest.mark.skipif(not can_check_ids(), reason="python-stdnum is not installed")


def found(text: str) -> list[tuple[str, str]]:
    return [(span.kind, span.value) for span in FINDER.find(text)]


def drawn(size: int, alphabet: str = string.ascii_letters + string.digits, seed: int = 1) -> str:
    return "".join(random.Random(seed).choices(alphabet, k=size))


CARDS = {  # Stripe's and Adyen's published test cards
    "4242424242424242": "Visa",
    "4111 1111 1111 1111": "Visa",
    "5555-5555-5555-4444": "Mastercard",
    "2223003122003222": "Mastercard",
    "3782 822463 10005": "American Express",
    "6011111111111117": "Discover",
    "3530111333300000": "JCB",
    "3056 9309 0259 04": "Diners Club",
    "6200000000000005": "UnionPay",
}


@pytest.mark.parametrize("card", CARDS)
def test_test_cards_of_payment_services_are_found(card: str) -> None:
    digits = card.replace(" ", "").replace("-", "")
    assert found(f"charge {card}, please") == [("card", digits)]
    assert issuer(digits) == CARDS[card]
    wrong = digits[:-1] + str((int(digits[-1]) + 1) % 10)
    assert not luhn(wrong) and ("card", wrong) not in found(f"charge {wrong}, please")


@pytest.mark.parametrize(
    "text",
    [
        "order 4242424242424242",
        "Tracking number: 4111111111111111",
        "mã vận đơn 4111111111111111",
        "4111111111111111.5 is a number",
        "0000000000000000",
    ],
)
def test_numbers_of_orders_are_no_cards(text: str) -> None:
    assert found(text) == []


@given(st.integers(10**15, 10**16 - 1), st.integers(0, 15), st.integers(1, 9))
def test_luhn_notices_any_wrong_digit(number: int, place: int, step: int) -> None:
    digits = str(number)
    last = next(d for d in "0123456789" if luhn(digits + d))
    changed = list(digits + last)
    changed[place] = str((int(changed[place]) + step) % 10)
    assert not luhn("".join(changed))


@needs_stdnum
@pytest.mark.parametrize(
    "iban",
    [  # examples of the SWIFT IBAN registry
        "GB29 NWBK 6016 1331 9268 19",
        "DE89370400440532013000",
        "FR14 2004 1010 0505 0001 3M02 606",
        "NL91ABNA0417164300",
        "MT84MALT011000012345MTLCAST001S",
    ],
)
def test_ibans(iban: str) -> None:
    assert found(f"Please pay to {iban} today") == [("iban", iban.replace(" ", ""))]
    assert ("iban", iban.replace("1", "7")) not in found(iban.replace("1", "7"))


@needs_stdnum
@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("my SSN is 536-90-4399.", "536904399"),
        ("social security number 536904399", "536904399"),
        ("CPF 390.533.447-05", "39053344705"),
        ("NIR 2 95 10 99 126 111 93", "295109912611193"),
        ("Steuer-ID: 36 574 261 809", "36574261809"),
        ("Aadhaar 2341 2341 2346", "234123412346"),
        ("codice fiscale RCCMNL83S18D969H", "RCCMNL83S18D969H"),
        ("DNI 54362315K", "54362315K"),
        ("personnummer 880320-0016", "8803200016"),
        ("身份证 11010519491231002X", "11010519491231002X"),
    ],
)
def test_national_ids(text: str, value: str) -> None:
    assert found(text) == [("national_id", value)]


@pytest.mark.parametrize("text", ["NINO AB123456C", "AB 12 34 56 C"])
def test_national_insurance_numbers(text: str) -> None:
    assert found(text) == [("national_id", "AB123456C")]
    assert found(text.replace("AB", "QQ")) == []


def test_vietnamese_citizen_id_needs_province_century_and_year() -> None:
    assert is_cccd("001099012345")  # Hà Nội, a man born in 1999
    assert is_cccd("079305000001")  # Hồ Chí Minh City, a woman born in 2005
    assert not is_cccd("003099012345")  # no province
    assert not is_cccd("001299012345")  # born in 2099
    assert not is_cccd("001999012345")  # century 23
    assert found("CCCD: 001099012345") == [("national_id", "001099012345")]
    assert found("số căn cước 001 099 012 345 cấp tại") == [("national_id", "001099012345")]
    assert found("mã đơn hàng 001099012345") == []


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("+84 912 345 678", "+84912345678"),
        ("gọi cho tôi số 0912.345.678 nhé", "+84912345678"),
        ("Call 0800 169 6031 between 10am and 9pm", "+448001696031"),
        ("fax (301) 496-5248", "+13014965248"),
        ("301-496-5248", "+13014965248"),
        ("+1 (650) 253-0000", "+16502530000"),
        ("appelez le +33 1 42 68 53 00", "+33142685300"),
    ],
)
def test_telephone_number_formats_have_same_value(text: str, value: str) -> None:
    assert found(text) == [("phone", value)]


@pytest.mark.parametrize(
    "text",
    [
        "order 6502530000",
        "Invoice no. 0912345678",
        "6502530000 rows were read",
        "from 1900–1994 and 2001-2005",
        "on 2019-03-05 12:00",
        "48+24=72, 1,234,567,890 and 3.14159265358979",
        "ISBN 978-3-16-148410-0",
        "i = (223905 - 1858) / 1387",
        "+999 123 456 789",
    ],
)
def test_order_numbers_and_dates_are_no_telephone_numbers(text: str) -> None:
    assert found(text) == []


def test_regions_are_an_option() -> None:
    text = "téléphone 01 42 68 53 00"
    assert found(text) == []
    assert [span.value for span in Finder(regions=("FR",)).find(text)] == ["+33142685300"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Write to Jo.Doe+x@Corp.co.uk.", [("email", "jo.doe+x@corp.co.uk")]),
        ("user@example.com, git@github.com:a/b", []),
        ("@name, a@b, 3 @ 4.50", []),
        ("server 54.239.28.85:443", [("ip", "54.239.28.85")]),
        ("2606:4700::6810:85e5", [("ip", "2606:4700::6810:85e5")]),
        ("192.168.0.1 127.0.0.1 203.0.113.9 8.8.8.8 fe80::1 2001:db8::7", []),
        ("version 10.15.7.1, v5.4.3.2, section 4.3.2.1, 12:30:45, std::vector", []),
    ],
)
def test_addresses(text: str, expected: list[tuple[str, str]]) -> None:
    assert found(text) == expected


KEYS = [
    "AKIA" + drawn(16, "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"),
    "ghp" + "_" + drawn(36),
    "github" + "_pat_" + drawn(22) + "_" + drawn(59),
    "glpat" + "-" + drawn(20),
    "sk" + "-" + drawn(48),
    "sk" + "-proj-" + drawn(64),
    "sk" + "-ant-api03-" + drawn(93) + "AA",
    "AIza" + drawn(35),
    "xoxb" + "-" + "123412341234-" + drawn(24),
    "sk" + "_live_" + drawn(24),
    "hf" + "_" + drawn(34, string.ascii_letters),
    "npm" + "_" + drawn(36),
    "pypi" + "-AgEIcHlwaS5vcmc" + drawn(60),
    "SG" + "." + drawn(22) + "." + drawn(43),
    "987654321:" + "AA" + drawn(33),
]


@pytest.mark.parametrize("key", KEYS)
def test_keys_by_the_forms_of_their_vendors(key: str) -> None:
    assert found(f"use {key} for it") == [("api_key", key)]
    assert found(f'{{"key": "{key}"}}') == [("api_key", key)]
    shorter = key[:12]
    assert all(kind != "api_key" for kind, _ in found(f"use {shorter} for it"))


def test_private_keys_tokens_and_passwords_are_found() -> None:
    body = "\n".join(drawn(64, string.ascii_letters + "+/", seed) for seed in range(12))
    pem = f"-----BEGIN RSA PRIVATE KEY-----\n{body}\n-----END RSA PRIVATE KEY-----"
    assert found(f"my key:\n{pem}\nkeep it") == [("private_key", pem)]
    cut = pem[:400]
    assert found(cut) == [("private_key", cut)]
    jwt = f"eyJ{drawn(30)}.eyJ{drawn(60)}.{drawn(43)}"
    assert found(f"Authorization: Bearer {jwt}") == [("jwt", jwt)]
    assert found("postgres://app:s3cretPw9@db.corp.io/x")[0] == ("password", "s3cretPw9")
    assert found("The password is Tr0ub4dor&3.") == [("password", "Tr0ub4dor&3")]
    value = drawn(24)
    assert found(f"API_KEY = '{value}'") == [("password", value)]
    azure = "AccountKey=" + drawn(86) + "=="
    assert found(azure)[0][0] == "api_key"


@pytest.mark.parametrize(
    "text",
    [
        "AKIA" + "IOSFODNN7EXAMPLE",
        "sk-" + "x" * 40,
        "api_key = 'your-api-key-here'",
        "token = tokenizer.encode(text)",
        "password: str = None",
        "password=os.environ['PASSWORD']",
        "secret_key = get_secret_key2()",
        "the token is generated by the server",
        "-----BEGIN PRIVATE KEY----- opens such a file, and then the key follows in base64 text.",
        "task-abcdefghijklmnopqrstuvwxyz is long",
    ],
)
def test_placeholders_and_code_are_no_secrets(text: str) -> None:
    assert found(text) == []


def test_entropy_is_in_bits() -> None:
    assert entropy("aaaa") == 0
    assert entropy("abcdefgh") == pytest.approx(3)


def test_joined_texts_are_searched_separately() -> None:
    assert found("call\n\x00\n6502530000") == []
    assert found("order\n\x00\n4242424242424242") == [("card", "4242424242424242")]


PIECES = st.sampled_from(
    [*CARDS, *KEYS, "a.b@corp.io", "+84 912 345 678", "536-90-4399", "54.239.28.85", "AB123456C",
     "001099012345", "call", "(", ")", "-", ".", "key=", "\n", "İ", "é", "0", "12", "@", ":", "::"]
)  # fmt: skip


@given(st.lists(st.one_of(PIECES, st.text(max_size=6)), max_size=12), st.sampled_from(["", " "]))
def test_items_are_in_order_apart_and_masked(parts: list[str], between: str) -> None:
    text = between.join(parts)
    spans = FINDER.find(text)
    assert all(a.end <= b.start for a, b in pairwise(spans))
    parts, done = [], 0
    for span in spans:
        item, seen = text[span.start : span.end], mask(text, span)
        assert 0 <= span.start < span.end <= len(text)
        assert item[2:] not in seen and (span.kind not in SECRETS or item[:2] not in seen)
        parts += [text[done : span.start], seen]
        done = span.end
    assert mask_all(text, spans) == "".join([*parts, text[done:]])


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9), st.integers(0, 3)), max_size=12))
def test_overlapping_spans_resolve_to_most_serious(given: list[tuple[int, int, int]]) -> None:
    kinds = ("private_key", "email", "card", "phone")
    spans = [PiiSpan(start, start + size, kinds[kind], "", "") for start, size, kind in given]
    kept = resolve_overlaps(spans)
    assert all(a.end <= b.start for a, b in pairwise(kept))
    taken = {place for span in kept for place in range(span.start, span.end)}
    for span in spans:
        assert taken & set(range(span.start, span.end)), "nothing is dropped without a reason"


@pytest.mark.parametrize(
    "text",
    ["9" * 100_000, "1 " * 50_000, "a@" * 50_000, "-----BEGIN PRIVATE KEY-----" * 8_000,
     "key=" * 25_000, "://a:" * 40_000, ":a:b" * 50_000, "1.1." * 25_000, "eyJ" * 60_000],
    ids=["digits", "spaced", "at", "pem", "key", "url", "colons", "dots", "jwt"],
)  # fmt: skip
def test_hostile_text_takes_no_long_time(text: str) -> None:
    began = time.process_time()
    FINDER.find(text)
    assert time.process_time() - began < 5
