"""Warning about base models whose tokenizer does not know the language of the rows."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from luthier.data.conversations.chat import ChatFormat
from luthier.data.shapes.conversations import PromptCompletion
from luthier.data.shapes.texts import LabelledText, RawText
from luthier.gate.checks.language import (
    ENGLISH,
    SAMPLES,
    Language,
    language_name,
    spelling,
)
from luthier.gate.inspect import inspect_job
from luthier.gate.report import Report, warnings
from luthier.gate.scan import inspect_rows
from luthier.objectives import OBJECTIVES
from luthier.recipe import DataSpec
from luthier.types import Row
from real_data import FOLDER, needs_data

DOCS = Path(__file__).parents[3] / "docs"
EN = [
    "The parcel that I ordered last week has not arrived at my home yet, and nobody answers.",
    "Please change the address of my order, because I have moved to another city this month.",
    "My card was charged twice for the same coffee, so I would like to have the money back.",
]
VI = [
    "Bưu kiện mà tôi đặt mua tuần trước vẫn chưa được giao đến nhà, và không có ai trả lời tôi.",
    "Xin hãy đổi địa chỉ của đơn hàng này, vì tháng này tôi đã chuyển sang sống ở thành phố khác.",
    "Thẻ của tôi bị trừ tiền hai lần cho cùng một ly cà phê, nên tôi muốn được hoàn lại số tiền.",
]
DE = [
    "Das Paket, das ich letzte Woche bestellt habe, ist noch nicht angekommen, und niemand antwortet.",
    "Bitte ändern Sie die Adresse meiner Bestellung, weil ich in eine andere Stadt gezogen bin.",
    "Meine Karte wurde zweimal für denselben Kaffee belastet, ich möchte mein Geld zurückbekommen.",
]
ZH = [
    "我上周订的包裹还没有送到家里，打电话也没有人回答，请帮我查一下现在到了哪里。",
    "请更改我的订单地址，因为这个月我已经搬到另一个城市去住了，旧地址没有人收件。",
    "我的卡为同一杯咖啡被扣了两次钱，所以我希望能把多收的钱退还给我，谢谢你们。",
]
TH = [
    "พัสดุที่ฉันสั่งเมื่อสัปดาห์ที่แล้วยังมาไม่ถึงบ้านเลย และโทรไปก็ไม่มีใครตอบฉัน",
    "กรุณาเปลี่ยนที่อยู่สำหรับคำสั่งซื้อของฉัน เพราะเดือนนี้ฉันย้ายไปอยู่อีกเมืองหนึ่งแล้ว",
    "บัตรของฉันถูกเรียกเก็บเงินสองครั้งสำหรับกาแฟแก้วเดียวกัน ฉันจึงอยากได้เงินคืน",
]


def trained_on(texts: Iterator[str], size: int) -> Any:
    """Train a byte-level BPE tokenizer like SmolLM2's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=["<end>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")


def english() -> Iterator[str]:
    yield from (path.read_text() for path in sorted(DOCS.glob("*.md")))
    yield from EN


@pytest.fixture(scope="module")
def english_base() -> ChatFormat:
    return ChatFormat.of(trained_on(english(), 6000))


@pytest.fixture(scope="module")
def multilingual_base() -> ChatFormat:
    def texts() -> Iterator[str]:
        yield from english()
        for _ in range(50):
            yield from (*VI, *DE, *ZH, *TH)

    return ChatFormat.of(trained_on(texts(), 8000))


def rows(*sentences: str, count: int = 60) -> list[Row]:
    return [
        LabelledText(
            "f.jsonl", n + 1, text=f"{sentences[n % len(sentences)]} ({n})", label=f"{n % 2}"
        )
        for n in range(count)
    ]


def gate(chat: ChatFormat, given: list[Row], objective: str | None = None) -> Report:
    chosen = OBJECTIVES[objective].model_validate({}) if objective else None
    return inspect_rows({"train": given}, [Language(chat, chosen)])


def found(report: Report) -> tuple[str, str] | None:
    """Return message and fix of the only finding."""
    kept = report.findings.examples.get("base.language", [])
    assert len(kept) < 2 and report.findings.counts.total() == len(kept)
    return (kept[0].message, kept[0].fix) if kept else None


@pytest.mark.parametrize(
    ("sentences", "name"), [(VI, "Vietnamese (vi)"), (DE, "German (de)")], ids=["vi", "de"]
)
def test_language_unsuitable_for_tokenizer_is_found(
    english_base: ChatFormat, multilingual_base: ChatFormat, sentences: list[str], name: str
) -> None:
    summary = found(gate(english_base, rows(*sentences)))
    assert summary is not None
    message, fix = summary
    assert message.startswith(f"100% of the text is in {name}")
    every = spelling(" ".join(sentences), english_base.tokenizer)
    # The tokenizer is trained on the project's docs, so rounding of the figure may vary.
    needs = re.search(r"(\d\.\d) tokens per word, and 1\.", message)
    assert needs is not None and float(needs[1]) == pytest.approx(every.per_word, abs=0.1)
    assert "`--base multilingual-e5-small`" in fix  # rows with labels are for an encoder
    assert found(gate(multilingual_base, rows(*sentences))) is None


@pytest.mark.parametrize("sentences", [ZH, TH], ids=["zh", "th"])
def test_language_without_spaces_is_measured_per_character(
    english_base: ChatFormat, multilingual_base: ChatFormat, sentences: list[str]
) -> None:
    summary = found(gate(english_base, rows(*sentences)))
    assert summary is not None and "tokens per character" in summary[0]
    assert found(gate(multilingual_base, rows(*sentences))) is None


def test_language_fix_depends_on_objective(english_base: ChatFormat) -> None:
    asked = [
        PromptCompletion("f", n + 1, prompt=VI[n % 3], completion=VI[(n + 1) % 3])
        for n in range(30)
    ]
    for given, objective in ((asked, None), (rows(*VI), "masked_lm")):
        summary = found(gate(english_base, given, objective))
        assert summary is not None and "multilingual-e5-small" not in summary[1]
        kind = "masked language model" if objective else "decoder"
        assert f"no {kind} for Vietnamese" in summary[1]


def test_english_code_and_symbols_have_no_language_finding(english_base: ChatFormat) -> None:
    draw = random.Random(0)
    letters = ["".join(draw.choices("ACGT", k=90)) for _ in range(40)]
    code = [
        f"SELECT u.id, COUNT(o.id) FROM users u WHERE u.n > {n} GROUP BY u.id" for n in range(40)
    ]
    chemistry = [
        f"{n}-acetoxybenzoic acid, N-(4-hydroxyphenyl)acetamide, toluene" for n in range(40)
    ]
    for sentences in (EN, letters, code, chemistry, ["OK", "1 + 1 = 2"]):
        assert found(gate(english_base, rows(*sentences))) is None


def test_unsuitable_language_needs_a_minimum_share_of_rows(english_base: ChatFormat) -> None:
    summary = found(gate(english_base, rows(*EN, count=60) + rows(*VI, count=40)))
    assert summary is not None and summary[0].startswith("40% of the text is in Vietnamese")
    assert found(gate(english_base, rows(*EN, count=90) + rows(*VI, count=10))) is None
    # Held-out rows are not trained on.
    held = {"train": rows(*EN), "validation": rows(*VI)}
    assert not inspect_rows(held, [Language(english_base, None)]).findings.counts


def test_many_short_rows_are_joined_and_sampled(english_base: ChatFormat) -> None:
    check = Language(english_base, None)
    words = [replace(row, text=row.text.split()[0]) for row in rows(*VI, count=5000) if row.text]
    short = [replace(row, text=" ".join(VI[n % 3].split()[:4])) for n, row in enumerate(words)]
    report = inspect_rows({"train": short}, [check])
    assert found(report) is not None
    assert len(check._samples) == SAMPLES


def test_byte_tokenizer_has_no_language_finding() -> None:
    assert found(gate(ChatFormat.of(trained_on(iter(()), 257)), rows(*VI))) is None


def test_unknown_token_counts_hidden_bytes(family_folder: Callable[[str], Path]) -> None:
    from luthier.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(family_folder("bert"))  # word pieces of Latin letters alone
    assert tokenizer.unk_token_id in tokenizer("ภาษาไทย")["input_ids"]
    thai = spelling("ภาษาไทย", tokenizer)
    assert (thai.pieces, thai.letters, thai.words) == (3 * 7, 7, 1)


def test_job_warns_about_base_language(english_base: ChatFormat) -> None:
    objective = OBJECTIVES["classification"].model_validate({})
    spec = DataSpec(train="f.jsonl")
    report = inspect_job(spec, {"train": rows(*VI)}, objective, english_base)
    (line,) = [each for each in warnings(report) if "base.language" in each]
    assert "Vietnamese (vi)" in line and "`--base multilingual-e5-small`" in line


def test_names_of_languages() -> None:
    assert [language_name(code) for code in ("vi", "zh", "dz")] == ["Vietnamese", "Chinese", "dz"]


ENGLISH_SETS = ["banking77", "gsm8k", "medquad", "ncbi_disease", "sms_spam", "wnut17"]


@needs_data("sib200_vi")
@pytest.mark.parametrize("name", [*ENGLISH_SETS, "sib200_en", "sib200_vi", "d2l_vi"])
def test_real_rows(english_base: ChatFormat, name: str) -> None:
    from luthier.data.rows import RowReader

    given = list(RowReader(str(FOLDER / name / "train.jsonl")))[:1000]
    summary = found(inspect_rows({"train": given}, [Language(english_base, None)]))
    assert (summary is not None) == name.endswith("_vi")


@needs_data("sib200_vi")
def test_bilingual_tokenizer_has_no_language_finding() -> None:
    def texts(*names: str) -> Iterator[str]:
        for name in names:
            for line in (FOLDER / name / "train.jsonl").read_text().splitlines():
                yield json.loads(line)["text"]

    both = trained_on(texts("d2l_vi", "d2l_en", "wiki_en"), 8000)
    assert spelling(ENGLISH, both).per_word < 1.5
    for name in ("sib200_vi", "sib200_en"):
        given = [RawText("f", n + 1, text=text) for n, text in enumerate(texts(name))]
        assert found(gate(ChatFormat.of(both), given)) is None
