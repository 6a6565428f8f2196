"""Many texts at once are told as py3langid tells each of them."""

from __future__ import annotations

import random

import pytest
from py3langid.langid import MODEL_FILE, LanguageIdentifier

from luthier.gate import language_identification
from luthier.gate.language_identification import (
    CERTAIN,
    LEAST_CHARACTERS,
    LEAST_GROUP,
    MOST_BYTES,
    NO_LANGUAGE,
    detect_languages,
    load_identifier,
)

WORDS = {
    "en": "The parcel that I ordered last week has not arrived at my home yet number",
    "vi": "Bưu kiện mà tôi đặt mua tuần trước vẫn chưa được giao đến nhà tôi số",
    "fr": "Le colis que j'ai commandé la semaine dernière n'est pas encore arrivé numéro",
    "sr": "Пакет који сам наручио прошле недеље још није стигао на моју адресу broj koji",
    "zh": "我 上周 订购 的 包裹 还 没有 送到 我 家 里 号码 是 什么 时候 能 到",
    "ar": "الطرد الذي طلبته الأسبوع الماضي لم يصل إلى منزلي بعد رقم",
    "hi": "पिछले सप्ताह मैंने जो पार्सल मंगवाया था वह अभी तक मेरे घर नहीं पहुंचा",
    "ja": "先週 注文 した 荷物 が まだ 家 に 届いて いません 番号 は 何 です か",
}
ODD = (
    "",
    "a",
    "😀",
    "😀" * 60,
    "👩‍👩‍👧‍👦 family " * 12,
    "\0" * 50,
    "lone \ud800 surrogate in a text of more than forty characters",
    "e\u0301" * 45,
    "THE PARCEL THAT I ORDERED LAST WEEK HAS NOT ARRIVED AT MY HOME",
    "İSTANBUL'DAN GELEN KARGO HENÜZ EVİME ULAŞMADI BİLE",
    "\u2603" * 50,
    "1 + 1 = 2, 2 + 2 = 4, 4 + 4 = 8, 8 + 8 = 16, 16 + 16 = 32",
    "def main() -> None:\n    print(sum(range(10)))\n" * 3,
    "x" * (LEAST_CHARACTERS - 1),
    "x" * LEAST_CHARACTERS,
    "\u200b" * 60,
    "한국어 문장은 여기 있습니다 그리고 조금 더 길어야 합니다 그래서 계속 씁니다",
)


@pytest.fixture(scope="module")
def single() -> LanguageIdentifier:
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def expected(single: LanguageIdentifier, text: str) -> str:
    if len(text) < LEAST_CHARACTERS:
        return ""
    code, probability = single.classify(text)
    return str(code) if probability >= CERTAIN and code != NO_LANGUAGE else ""


def mixed_texts(count: int) -> list[str]:
    """Texts of one to three languages, of words and of letters, so that many are uncertain."""
    draw = random.Random(5)
    texts = []
    for _ in range(count):
        words = [w for code in draw.sample(sorted(WORDS), draw.choice((1, 1, 2, 3)))
                 for w in draw.choices(WORDS[code].split(), k=draw.randrange(2, 14))]  # fmt: skip
        if draw.random() < 0.4:
            draw.shuffle(words)
        text = " ".join(words)
        texts.append(text[draw.randrange(9) :] if draw.random() < 0.5 else text)
    return texts


def test_languages_are_told() -> None:
    texts = [WORDS["en"], WORDS["vi"], WORDS["fr"], "OK, yes", "1 + 1 = 2, 2 + 2 = 4, 4 + 4 = 8, 8"]
    assert detect_languages(texts) == ["en", "vi", "fr", "", ""]
    assert detect_languages(texts * LEAST_GROUP) == ["en", "vi", "fr", "", ""] * LEAST_GROUP
    assert detect_languages([]) == []


def test_many_texts_are_told_as_each_alone(single: LanguageIdentifier) -> None:
    texts = [*mixed_texts(1500), *ODD]
    random.Random(1).shuffle(texts)
    codes = [expected(single, text) for text in texts]
    assert detect_languages(texts) == codes
    assert len(set(codes)) > len(WORDS) and codes.count("") > 100


def test_long_texts_are_told_as_each_alone(single: LanguageIdentifier) -> None:
    long = [" ".join(mixed_texts(size)) for size in (20, 40)]
    texts = [*long, ("a😀" * 50_000), *mixed_texts(LEAST_GROUP)]
    assert len(long[1].encode()) > MOST_BYTES
    assert detect_languages(texts) == [expected(single, text) for text in texts]


def test_probabilities_are_those_of_each_alone(single: LanguageIdentifier) -> None:
    texts = sorted(mixed_texts(200), key=lambda text: -len(text.encode()))
    found = load_identifier().classify([text.encode() for text in texts])
    known = [single.classify(text) for text in texts]
    for (code, probability), (name, exact) in zip(found, known, strict=True):
        assert probability == pytest.approx(exact, abs=1e-4)
        assert code == name or exact < 0.5


def test_what_is_near_the_limit_is_left_to_py3langid(monkeypatch: pytest.MonkeyPatch) -> None:
    identifier = load_identifier()
    near = CERTAIN + language_identification.NEAR / 2

    def classify(contents: list[bytes]) -> list[tuple[str, float]]:
        return [("xx", near)] * len(contents)

    monkeypatch.setattr(identifier, "classify", classify)
    assert detect_languages([WORDS["fr"]] * LEAST_GROUP) == ["fr"] * LEAST_GROUP
