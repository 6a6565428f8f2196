"""Texts in the voice of a brand."""

from __future__ import annotations

from typing import Any

import numpy as np

from children import table
from defaults import rows_of, write_rows
from pages.bench import PACKED, Bench, Colours, Found, Use, first_rows, opening, percent, worth

COPY, BEFORE = "smollm2-135m-instruct:copy", "smollm2-135m-instruct"
SHORT = {COPY: "tuned", BEFORE: "base model"}
NEAREST, OWN = "the nearest product's text", "the shop's own text"


def names_product(text: str, prompt: str) -> bool:
    """Whether a text has the first word of the product's name."""
    return prompt.split("Product: ")[1].split()[0] in text


def texts_of(bench: Bench) -> dict[str, list[str]]:
    """Return the texts of each writer for the test products."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    from brand_rows import plain_facts

    train, test = (rows_of(bench.folder / "rows" / f"{n}.jsonl") for n in ("train", "test"))
    words = TfidfVectorizer(sublinear_tf=True).fit([row["prompt"] for row in train])
    known, asked = (words.transform([row["prompt"] for row in some]) for some in (train, test))
    return {
        COPY: [each["reply"] for each in rows_of(bench.folder / "answers.jsonl")],
        BEFORE: [each["reply"] for each in rows_of(bench.folder / "before.jsonl")],
        "the facts as sentences": [plain_facts(row["prompt"]) for row in test],
        NEAREST: [train[n]["completion"] for n in (asked @ known.T).toarray().argmax(1)],
        OWN: [row["completion"] for row in test],
    }


def collect(bench: Bench) -> Found:
    """Grade the voice, the words and the names of each writer's texts."""
    from luthier.evaluation.significance import RowScores, paired_differences
    from luthier.graders import Answer, Similarity
    from luthier.types import Row

    test, texts = rows_of(bench.folder / "rows" / "test.jsonl"), texts_of(bench)
    write_rows(
        [{"text": text} for some in texts.values() for text in some], bench.folder / "texts.jsonl"
    )
    bench.run("luthier predict tfidf:voice --input texts.jsonl --output voices.jsonl")
    graded = iter(
        each["predicted"]["scores"]["ours"] for each in rows_of(bench.folder / "voices.jsonl")
    )
    voices = {name: [next(graded) for _ in some] for name, some in texts.items()}
    grader, writers = Similarity(measure="rouge_l"), dict[str, Found]()
    found = {name: RowScores.of(some) for name, some in voices.items()}
    for name, some in texts.items():
        pairs = [*zip(some, test, strict=True)]
        rouge = [
            grader.score(Answer((), text, row["completion"], Row("", 0))) for text, row in pairs
        ]
        writers[name] = {
            "voice": found[name].value, "interval": list(found[name].interval),
            "rouge_l": float(np.mean(rouge)),
            "named": float(np.mean([names_product(text, row["prompt"]) for text, row in pairs])),
        }  # fmt: skip
    gains = paired_differences({n: (found[n], found[COPY]) for n in (BEFORE, NEAREST)})
    told = [
        f"{100 * each.value:+.1f} ± {100 * each.error:.1f} points against {name} "
        f"({'significant' if each.significant else 'not significant'})"
        for name, each in gains.items()
    ]
    (judged,) = (s["result"] for s in bench.steps if "evaluate tfidf:voice" in s["command"])
    worst = int(np.argmin(voices[COPY]))
    tuned, gain = writers[COPY], gains[BEFORE]
    return {
        "rows": first_rows(bench),
        "wrong": f"{test[worst]['prompt']}\nanswer:   {texts[COPY][worst].strip()}\n"
        f"expected: {test[worst]['completion']}",
        "writers": writers,
        "headline": f"{'Tuning learns the voice' if worth(gain) else opening(worth(gain))}: "
        f"{percent(tuned['voice'])} “ours” against {percent(writers[BEFORE]['voice'])} of the base "
        f"model on {len(test)} unseen products, by a classifier. A copy of {NEAREST} has "
        f"{percent(writers[NEAREST]['voice'])}, but names the product in "
        f"{percent(writers[NEAREST]['named'])} of texts (tuned: {percent(tuned['named'])}).",
        "compared": {
            "contenders": [
                {
                    "name": name, "technique": "fine-tuning" if name == COPY else "other",
                    "score": each["voice"], "interval": each["interval"],
                }
                for name, each in sorted(writers.items(), key=lambda item: -item[1]["voice"])
                if name != OWN
            ],
            "rows": len(test),
            "worth_it": None,  # a copy has more of the voice, and no facts of the product
            "verdict": f"The voice of the tuned model, by pairs of {len(test)} products: "
            f"{'; '.join(told)}.",
        },
        "facts": f"The classifier is right on {percent(judged['scores']['accuracy'])} of "
        f"{judged['rows']} texts about unseen products.",
    }  # fmt: skip


def writer_table(found: Found) -> str:
    """Return voice, ROUGE-L and share of texts that name the product, for each writer."""
    lines = [
        [
            f"**{name}** (tuned)" if name == COPY else name, percent(each["voice"]),
            f"{100 * each['interval'][0]:.1f} to {100 * each['interval'][1]:.1f}",
            percent(each["rouge_l"]), percent(each["named"]),
        ]
        for name, each in found["writers"].items()
    ]  # fmt: skip
    return table(["", "voice", "95 % interval", "ROUGE-L", "names the product"], lines)


def paint(axes: Any, colours: Colours, found: Found) -> None:
    """Draw ROUGE-L against the voice of each writer."""
    for name, each in found["writers"].items():
        voice, rouge = 100 * each["voice"], 100 * each["rouge_l"]
        if name == OWN:  # ROUGE-L is 100 by definition
            axes.axvline(voice, color=colours["text"], linestyle="--", alpha=0.5)
            axes.text(voice - 1, 28, name, color=colours["text"], ha="right")
            continue
        axes.plot(
            voice, rouge, "o", color=colours["front" if name == COPY else "point"], markersize=12
        )
        axes.text(
            voice, rouge + 1.6, SHORT.get(name, name), color=colours["text"],
            ha="right" if voice > 50 else "left",
        )  # fmt: skip
    axes.set(
        xlabel='voice: probability of "ours", %', ylabel="ROUGE-L, %", xlim=(0, 102), ylim=(0, 30)
    )


USE = Use(
    "brand-copy",
    "Product texts in the voice of a brand",
    "products",
    "voice",
    "Rows: Magento 2 sample data (Luma), AFL-3.0 or OSL-3.0, © Magento, Inc.; a cut.",
    tuple(
        f"examples/brand-copy/{name}"
        for name in (*PACKED, "voice.jsonl.xz", "voice-test.jsonl.xz", "voice.toml")
    ),
    "ROUGE-L against the voice of a base model, a tuned model and cheap rivals",
    paint,
    collect,
    writer_table,
)
