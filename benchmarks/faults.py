"""Faults of seeded_faults.py: how to make each fault, and the rules that must find the fault.

A fault is a function of all records, the index of the record to change and a random generator, and
returns the new line. Personal data is generated from its public structure, not by the code of the
checks.
"""

from __future__ import annotations

import json
import random
import string
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Record = dict[str, Any]
Spoil = Callable[[list[Record], int, random.Random], "Record | str | bytes"]


@dataclass(frozen=True)
class Fault:
    name: str
    rules: tuple[str, ...]
    """Rules of which at least one must report the row."""
    spoil: Spoil
    fits: Callable[[Record], bool] = lambda record: True
    split: str = "train"
    """Split of the changed row."""
    beside: bool = False
    """Whether the original row stays, and the changed row is the last of its split."""

    def line(self, records: list[Record], number: int, rng: random.Random) -> bytes:
        made = self.spoil(records, number, rng)
        if isinstance(made, dict):
            made = json.dumps(made, ensure_ascii=False)
        return made if isinstance(made, bytes) else made.encode()


def _answered(record: Record) -> bool:
    return bool({"completion", "messages", "chosen"} & record.keys())


def _key(record: Record) -> str:
    return next(key for key in ("completion", "chosen", "text") if key in record)


def answer(record: Record) -> str:
    """Return the trained text: the last turn, the completion, or the text."""
    if "messages" in record:
        return str(record["messages"][-1]["content"])
    return str(record[_key(record)])


def with_answer(record: Record, text: object) -> Record:
    if "messages" in record:
        *turns, last = record["messages"]
        return {**record, "messages": [*turns, {**last, "content": text}]}
    return {**record, _key(record): text}


def text(name: str, rule: str, change: Callable[[str, random.Random], str], **fields: Any) -> Fault:
    """Return a fault of the reply's text."""

    def spoil(records: list[Record], number: int, rng: random.Random) -> Record:
        record = records[number]
        return with_answer(record, change(answer(record), rng))

    return Fault(name, tuple(rule.split()), spoil, **fields)


def inside(text: str, item: str, rng: random.Random) -> str:
    """``item`` between two words."""
    words = text.split(" ")
    words.insert(rng.randint(0, len(words)), item)
    return " ".join(words)


# Damage that keeps the meaning of the row.


def mojibake(text: str, rng: random.Random) -> str:
    """Return the text with one word decoded with the wrong encoding; ASCII texts get a foreign word
    first."""
    words = text.split(" ")
    wrong = [n for n, word in enumerate(words) if not word.isascii()]
    if not wrong:
        words.insert(rng.randint(0, len(words)), rng.choice(["café", "naïve", "Đà", "it’s", "—"]))
        wrong = [n for n, word in enumerate(words) if not word.isascii()]
    at = rng.choice(wrong)
    encoding = rng.choice(["cp1252", "latin-1"])
    parts = [bytes([byte]) for byte in words[at].encode()]
    words[at] = "".join(part.decode(encoding, "ignore") or part.decode("latin-1") for part in parts)
    return " ".join(words)


def decomposed(text: str, rng: random.Random) -> str:
    found = unicodedata.normalize("NFD", text)
    return found if found != text else inside(text, "cafe\u0301", rng)


def anywhere(text: str, mark: str, rng: random.Random) -> str:
    at = rng.randint(0, len(text))
    return text[:at] + mark + text[at:]


INVISIBLE = ("\ufeff", "\u200b", "\u2060", "\U000e0041\U000e0042")
MARKS = (
    "<|im_end|>",
    "<|im_start|>user",
    "[INST]",
    "[/INST]",
    "<<SYS>>",
    "<start_of_turn>",
    "<|user|>",
    "<|eot_id|>",
    "\n### Response:\n",
    "\n\nHuman: ",
    "</s>",
    "<|endoftext|>",
)
OTHER = {
    "vi": "Tôi không hiểu vì sao đơn hàng của mình vẫn chưa được giao dù đã trả tiền tuần trước, {}.",
    "en": "I do not understand why my order has not been delivered though I paid for it last week, {}.",
}


def foreign(text: str, rng: random.Random) -> str:
    vietnamese = any(letter in text for letter in "ạảấầậắặẹếềểễệịọộớờợụứừửữựđ")
    return OTHER["en" if vietnamese else "vi"].format(rng.randint(10, 99))


# Personal data from its public structure.


def digits(count: int, rng: random.Random) -> str:
    return "".join(rng.choices(string.digits, k=count))


def letters(
    count: int, rng: random.Random, alphabet: str = string.ascii_letters + string.digits
) -> str:
    return "".join(rng.choices(alphabet, k=count))


def email(rng: random.Random) -> str:
    name = rng.choice(["anna", "j.smith", "minh_tran", "o'neil", "x", "kim-lee", "Le.Van.A"])
    host = rng.choice(["gmail.com", "corp.co.uk", "mail.fpt.vn", "uni-bonn.de", "a-b.io"])
    return f"{name}{rng.choice(['', digits(3, rng), '+news'])}@{host}"


def phone(rng: random.Random) -> str:
    """Return a phone number in a common notation: with a country code, in groups, or after a word
    such as "call"."""
    vn = f"9{rng.choice('01678')}{digits(7, rng)}"
    area = rng.choice(["212", "415", "650", "312"])
    us = f"{area}{rng.choice('23456789')}{rng.choice('02345678')}{digits(5, rng)}"
    gb = f"7{rng.choice(['400', '500', '810', '911'])}{digits(6, rng)}"
    return rng.choice(
        [
            f"+84 {vn[:3]} {vn[3:6]} {vn[6:]}",
            f"0{vn[:3]} {vn[3:6]} {vn[6:]}",
            f"gọi 0{vn}",
            f"+84{vn}",
            f"({us[:3]}) {us[3:6]}-{us[6:]}",
            f"{us[:3]}-{us[3:6]}-{us[6:]}",
            f"+1 {us[:3]} {us[3:6]} {us[6:]}",
            f"call {us}",
            f"+44 {gb[:4]} {gb[4:]}",
            f"0{gb[:4]} {gb[4:]}",
            f"tel. 0{gb}",
        ]
    )


def card(rng: random.Random) -> str:
    prefix, size = rng.choice(
        [("4", 16), ("51", 16), ("55", 16), ("2221", 16), ("37", 15), ("6011", 16)]
    )
    body = prefix + digits(size - len(prefix) - 1, rng)
    doubled = [int(d) * (2 if n % 2 == 0 else 1) for n, d in enumerate(reversed(body))]
    body += str(-sum(number // 10 + number % 10 for number in doubled) % 10)
    if size == 16 and rng.random() < 0.5:
        return rng.choice(" -").join(body[at : at + 4] for at in range(0, 16, 4))
    return body


def iban(rng: random.Random) -> str:
    country, bban = rng.choice(
        [
            ("DE", digits(18, rng)),
            ("GB", letters(4, rng, string.ascii_uppercase) + digits(14, rng)),
            ("NL", letters(4, rng, string.ascii_uppercase) + digits(10, rng)),
            ("AT", digits(16, rng)),
        ]
    )
    number = int("".join(str(int(c, 36)) for c in f"{bban}{country}00"))
    plain = f"{country}{98 - number % 97:02}{bban}"
    return rng.choice([plain, " ".join(plain[at : at + 4] for at in range(0, len(plain), 4))])


def national_id(rng: random.Random) -> str:
    cpf = digits(9, rng)
    for _ in range(2):
        rest = (
            sum(int(d) * w for d, w in zip(cpf, range(len(cpf) + 1, 1, -1), strict=True)) * 10 % 11
        )
        cpf += str(rest % 10)
    nir = f"{rng.choice('12')}{digits(2, rng)}{rng.randint(1, 12):02}{rng.randint(1, 95):02}"
    nir += f"{rng.randint(1, 990):03}{rng.randint(1, 999):03}"
    area = rng.choice([n for n in range(1, 900) if n != 666])
    province = rng.choice(["001", "079", "048", "031", "092"])
    return rng.choice(
        [
            f"{province}{rng.choice('01')}{rng.randint(40, 99)}{digits(5, rng)}{rng.randint(1, 9)}",
            f"{area:03}-{rng.randint(1, 99):02}-{rng.randint(1, 9999):04}",
            f"{rng.choice(['AB', 'CE', 'JM'])}{digits(6, rng)}{rng.choice('ABCD')}",
            f"{cpf[:3]}.{cpf[3:6]}.{cpf[6:9]}-{cpf[9:]}",
            f"{nir}{97 - int(nir) % 97:02}",
        ]
    )


def address(rng: random.Random) -> str:
    first, second = rng.choice([54, 91, 139, 203, 185]), rng.randint(1, 112)
    return f"{first}.{second}.{rng.randint(0, 254)}.{rng.randint(1, 254)}"


def api_key(rng: random.Random) -> str:
    return rng.choice(
        [
            "AKIA" + letters(16, rng, string.ascii_uppercase + "234567"),
            "ghp" + "_" + letters(36, rng),
            "sk" + "-proj-" + letters(48, rng),
            "AIza" + letters(35, rng),
            "hf" + "_" + letters(34, rng, string.ascii_letters),
            "xoxb" + f"-{digits(12, rng)}-" + letters(24, rng),
            "sk" + "_live_" + letters(24, rng),
        ]
    )


def private_key(rng: random.Random) -> str:
    body = "\n".join(
        letters(64, rng, string.ascii_letters + string.digits + "+/") for _ in range(8)
    )
    kind = rng.choice(["RSA ", "", "EC ", "OPENSSH "])
    return f"-----BEGIN {kind}PRIVATE KEY-----\n{body}\n-----END {kind}PRIVATE KEY-----"


def password(rng: random.Random) -> str:
    value = letters(rng.randint(10, 24), rng) + rng.choice("23456789")
    return rng.choice(
        ["password: {}", "api_key = '{}'", "my password is {}", '"token": "{}"']
    ).format(value)


def item(kind: str, made: Callable[[random.Random], str]) -> Fault:
    group = "secret" if kind in ("api_key", "private_key", "password") else "privacy"
    return text(
        kind.replace("_", " "), f"{group}.{kind}", lambda old, rng: inside(old, made(rng), rng)
    )


def _json(change: Callable[[str, Record], str | bytes]) -> Spoil:
    def spoil(records: list[Record], number: int, rng: random.Random) -> str | bytes:
        record = records[number]
        return change(json.dumps(record, ensure_ascii=False), record)

    return spoil


def _turns(change: Callable[[list[Record]], list[Record]]) -> Spoil:
    return lambda records, number, rng: {"messages": change(list(records[number]["messages"]))}


def _is_chat(record: Record) -> bool:
    return "messages" in record


def _first_key(record: Record) -> str:
    return next(iter(record))


FAULTS: tuple[Fault, ...] = (
    # Structure.
    Fault("line cut off", ("json.invalid",), _json(lambda line, _: line[: len(line) * 2 // 3])),
    Fault("not an object", ("json.not_object",), _json(lambda line, _: f"[{line}]")),
    Fault("not UTF-8", ("encoding.utf8",), _json(lambda line, _: line.encode()[:-3] + b'\xe9"}')),
    Fault(
        "half a surrogate pair",
        ("encoding.surrogate",),
        lambda records, n, rng: json.dumps(with_answer(records[n], answer(records[n]) + "\ud83d")),
    ),
    Fault(
        "key written twice",
        ("json.duplicate_key",),
        _json(lambda line, record: f'{{"{_first_key(record)}": "x", {line[1:]}'),
    ),
    Fault(
        "key missing",
        ("field.missing", "row.unknown_shape", "row.mixed_shapes", "preference.missing"),
        lambda records, n, rng: dict(list(records[n].items())[:-1]),
        lambda record: len(record) > 1,
    ),
    Fault(
        "object for text",
        ("field.type", "preference.type"),
        lambda records, n, rng: with_answer(records[n], {"value": 7}),
    ),
    Fault(
        "empty answer",
        ("field.empty", "preference.empty", "preference.equal"),
        lambda records, n, rng: with_answer(records[n], " \n"),
    ),
    Fault(
        "unknown role",
        ("message.role",),
        _turns(lambda turns: [{**turns[0], "role": "narrator"}, *turns[1:]]),
        _is_chat,
    ),
    Fault("no last answer", ("message.last",), _turns(lambda turns: turns[:-1]), _is_chat),
    Fault("two user turns", ("message.order",), _turns(lambda turns: [turns[0], *turns]), _is_chat),
    # Text.
    text(
        "control character",
        "encoding.control",
        lambda old, rng: anywhere(old, rng.choice("\x00\x07\x1b\x92"), rng),
    ),
    text("lost character", "encoding.replacement", lambda old, rng: anywhere(old, "\ufffd", rng)),
    text("one word of mojibake", "encoding.mojibake", mojibake),
    text(
        "invisible character",
        "encoding.invisible",
        lambda old, rng: anywhere(old, rng.choice(INVISIBLE), rng),
    ),
    text(
        "turned direction",
        "encoding.bidi",
        lambda old, rng: anywhere(old, rng.choice("\u202e\u2066"), rng),
    ),
    text("decomposed letters", "encoding.not_nfc", decomposed),
    text(
        "HTML entity",
        "encoding.markup",
        lambda old, rng: inside(old, rng.choice(["&amp;", "&#39;", "<br>"]), rng),
    ),
    text(
        "mark of a template",
        "marker.other_template marker.special_token",
        lambda old, rng: inside(old, rng.choice(MARKS), rng),
    ),
    text(
        "name of a role", "marker.role_prefix", lambda old, rng: f"Assistant: {old}", fits=_answered
    ),
    text(
        "placeholder",
        "marker.placeholder",
        lambda old, rng: inside(old, rng.choice(["{{name}}", "[Your Name]", "Lorem ipsum"]), rng),
    ),
    text(
        "refusal",
        "marker.refusal",
        lambda old, rng: rng.choice(
            [
                "As an AI language model, I have no view on this.",
                "I'm sorry, but I can't help with that.",
                "Tôi xin lỗi, nhưng tôi không thể giúp việc này.",
            ]
        ),
        fits=_answered,
    ),
    text(
        "answer that says nothing",
        "target.says_nothing",
        lambda old, rng: rng.choice(["N/A", "-", "None", "null"]),
        fits=_answered,
    ),
    Fault(
        "answer repeats the prompt",
        ("reply.repeats_prompt",),
        lambda records, n, rng: with_answer(
            records[n], records[n].get("prompt") or records[n]["messages"][-2]["content"]
        ),
        _answered,
    ),
    text("a hundred times as long", "length.outlier", lambda old, rng: " ".join([old] * 100)),
    text("another language", "language.other", foreign),
    # Personal data and secrets.
    item("email", email),
    item("phone", phone),
    item("card", card),
    item("iban", iban),
    item("national_id", national_id),
    item("ip", address),
    item("api_key", api_key),
    item("private_key", private_key),
    item("password", password),
)
"""All faults of single rows. ``spoil`` receives all records, so a fault can copy a row."""
