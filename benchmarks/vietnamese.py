"""Vietnamese text in tokenizers, duplicate search, BM25, language detection and personal data.

``python benchmarks/vietnamese.py DATA`` prints a table. DATA has ``sib200_vi``, ``sib200_en``,
``xed_vi``, ``xquad``, ``d2l_vi`` and ``vn_laws``. The tokenizers are those of the base models on this
machine.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from luthier.data.languages import detect_languages
from luthier.evaluation.retrieval import bm25_ranks
from luthier.gate.near_duplicates import normalize
from luthier.gate.pii import Finder
from luthier.library.models import find

BASES = ("smollm2-135m-instruct", "all-minilm-l6-v2", "multilingual-e5-small", "fasttext")
MARKS = "\u0300\u0301\u0303\u0309\u0323"
CONSONANTS = "bcdghklmnpstvx"
PLANTED = {
    "mobile number, announced": "Gọi cho tôi: {mobile}.",
    "mobile number in groups": "Số của chị Lan là {mobile_in_groups}.",
    "mobile number with country code": "WhatsApp +84 {mobile_abroad}",
    "landline": "Điện thoại (024) 3{six_digits}, giờ hành chính",
    "citizen id, announced": "Số CCCD: {citizen}",
    "citizen id alone": "Hồ sơ {citizen} đã nộp",
    "e-mail address": "Gửi về nguyen.van.a{number}@cty.vn nhé",
}
"""Sentences with an item in the form that people write."""


def texts(file: Path, field: str) -> list[str]:
    return [json.loads(line)[field] for line in file.read_text().splitlines()]


def other_rule(text: str) -> str:
    """Return ``text`` with the tone marks of open syllables at the other vowel."""
    decomposed = unicodedata.normalize("NFD", text)
    first = (
        rf"(?<=[{CONSONANTS}])(?:(o)([{MARKS}])([ae])|(u)([{MARKS}])(y))(?![\w{MARKS}\u0302\u0306])"
    )
    moved = re.sub(first, r"\1\4\3\6\2\5", decomposed)
    return unicodedata.normalize("NFC", moved)


def without_marks(text: str) -> str:
    decomposed = unicodedata.normalize("NFD", text.replace("đ", "d").replace("Đ", "D"))
    return "".join(char for char in decomposed if unicodedata.category(char) != "Mn")


def nfd(text: str) -> str:
    return unicodedata.normalize("NFD", text)


def plant(form: str, draw: random.Random) -> str:
    digits = "".join(str(draw.randrange(10)) for _ in range(8))
    mobile = "0" + draw.choice(["32", "70", "83", "90", "91", "98"]) + digits[:7]
    province, year = draw.choice(["001", "031", "048", "079"]), draw.randrange(40, 100)
    citizen = f"{province}{draw.randrange(2)}{year}{digits[:6]}"
    return form.format(
        mobile=mobile,
        mobile_in_groups=f"{mobile[:4]} {mobile[4:7]} {mobile[7:]}",
        mobile_abroad=f"{mobile[1:3]} {mobile[3:6]} {mobile[6:]}",
        six_digits=f"{digits[:3]} {digits[3:7]}",
        citizen=citizen,
        number=draw.randrange(100),
    )


def row(*cells: object) -> None:
    print("| " + " | ".join(str(cell) for cell in cells) + " |")


def share(count: int, of: int) -> str:
    return f"{count:,} of {of:,}"


def tokens_per_word(base: str, sentences: Sequence[str]) -> str:
    encode = find(base).chat.tokenizer.encode
    tokens = sum(len(encode(text, add_special_tokens=False)) for text in sentences)
    return f"{tokens / sum(len(text.split()) for text in sentences):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    data: Path = parser.parse_args().data
    sentences = texts(data / "sib200_vi" / "train.jsonl", "text")
    english = texts(data / "sib200_en" / "train.jsonl", "text")
    print("| measured | result |\n| --- | --- |")
    for base in BASES:
        name = f"{base}: tokens per word, English, Vietnamese, Vietnamese in NFD"
        forms_of_words = (english, sentences, [nfd(text) for text in sentences])
        row(name, ", ".join(tokens_per_word(base, those) for those in forms_of_words))
    other = [(text, moved) for text in sentences if (moved := other_rule(text)) != text]
    forms: dict[str, tuple[Callable[[str], str], Sequence[str]]] = {
        "NFD": (nfd, sentences),
        "the other rule for tone marks": (other_rule, [text for text, _ in other]),
        "no marks (other words, must differ)": (without_marks, sentences),
    }
    for name, (form, those) in forms.items():
        equal = sum(normalize(form(text)) == normalize(text) for text in those)
        row(f"duplicates: equal to its copy in {name}", share(equal, len(those)))
    questions = texts(data / "xquad" / "test.vi.jsonl", "question")
    contexts = texts(data / "xquad" / "test.vi.jsonl", "context")
    writings: dict[str, Callable[[str], str]] = {"as written": str}
    writings |= {name: form for name, (form, _) in forms.items()}
    for name, form in writings.items():
        first = (bm25_ranks([form(text) for text in questions], contexts) == 1).sum()
        row(f"BM25: first passage is right, questions {name}", share(int(first), len(questions)))
    for name, field in (("sib200_vi", "text"), ("xed_vi", "text"), ("vn_laws", "text")):
        rows = [text for text in texts(data / name / "train.jsonl", field) if len(text) >= 40]
        codes = Counter(detect_languages(rows))
        others = {
            code or "uncertain": count for code, count in codes.most_common(4) if code != "vi"
        }
        row(
            f"language of {name}, 40 characters or more",
            f"{share(codes['vi'], len(rows))}; {others}",
        )
    draw = random.Random(0)
    finder = Finder()
    for name, template in PLANTED.items():
        found = sum(bool(finder.find(plant(template, draw))) for _ in range(200))
        row(f"personal data: {name}", share(found, 200))
    for file, field in (
        ("d2l_vi/train.jsonl", "text"),
        ("vn_laws/train.jsonl", "text"),
        ("xquad/train.vi.jsonl", "context"),
        ("sib200_vi/train.jsonl", "text"),
    ):
        rows = [*dict.fromkeys(texts(data / file, field))]
        alarms = [span.value for text in rows for span in finder.find(text)]
        row(f"personal data: items in {file}", f"{len(alarms)} in {len(rows):,} texts")


if __name__ == "__main__":
    main()
