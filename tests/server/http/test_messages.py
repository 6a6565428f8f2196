"""Text that no database stores: U+0000 and broken UTF-8."""

from __future__ import annotations

import pytest

from luthier.server.http.messages import Fault, RequestHead, check_text, parse_json


@pytest.mark.parametrize("text", ["%00", "a%00b", "%FF", "%ED%A0%80"])
def test_invalid_path_and_query_text_is_rejected(text: str) -> None:
    for path, query, place in ((f"/{text}", "", "path"), ("/", f"after={text}", "query")):
        with pytest.raises(Fault) as refused:
            check_text(RequestHead("GET", path, query, [], False))
        assert (refused.value.code, refused.value.details["place"]) == ("Validation", place)
    check_text(RequestHead("GET", "/%C3%A9", "after=%F0%9F%98%80", [], False))


@pytest.mark.parametrize("number", ["9" * 6000, "-" + "1" * 4301, "1e999"])
def test_number_out_of_range_is_rejected_with_first_digits(number: str) -> None:
    with pytest.raises(Fault) as refused:
        parse_json(f'{{"seed": [{number}]}}'.encode())
    assert refused.value.code == "Validation"
    assert number[:5] in refused.value.message and len(refused.value.message) < 80
    assert parse_json(b"9" * 300) == int("9" * 300)


@pytest.mark.parametrize("body", [rb'{"a": ["\u0000"]}', rb'{"\ud800": 1}', b'"\xff"', b"NaN"])
def test_json_with_invalid_text_is_rejected(body: bytes) -> None:
    with pytest.raises(ValueError, match=r"UTF-8|surrogate|character|JSON"):
        parse_json(body)
    assert parse_json(rb'"\ud83d\ude00 \\u0000"') == "\U0001f600 \\u0000"
