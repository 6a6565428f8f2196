"""Mail by kind, with a threshold for spam."""

from __future__ import annotations

import json
from typing import Any

from defaults import rows_of
from pages.bench import Bench, Colours, Found, Use, wrong_label

MAILBOXES = ("invoice", "meeting", "spam", "support")
SPAM = "spam"


def collect(bench: Bench) -> Found:
    """Measure precision and recall of spam at each threshold, and of TF-IDF."""
    from sklearn.metrics import precision_recall_curve

    bench.run("luthier tune rows/train --base tfidf --name words")
    bench.run("luthier evaluate tfidf:words rows/test --output answers-words.jsonl")
    bench.run("luthier convert rows/test test.jsonl")
    train, test = (rows_of(bench.folder / f"{split}.jsonl") for split in ("train", "test"))
    answers = rows_of(bench.folder / "answers.jsonl")
    words = rows_of(bench.folder / "answers-words.jsonl")
    is_spam = [row["label"] == SPAM for row in test]
    curves = {}
    for name, found in (("tuned", answers), ("TF-IDF", words)):
        scores = [each["scores"][SPAM] for each in found]
        precision, recall, _ = precision_recall_curve(is_spam, scores)
        curves[name] = [recall[:-1].tolist(), precision[:-1].tolist()]
    points = {}
    for name, given in (
        ("stored", [each["label"] == SPAM for each in answers]),
        ("likeliest", [max(each["scores"], key=each["scores"].get) == SPAM for each in answers]),
    ):
        hits = sum(one and other for one, other in zip(given, is_spam, strict=True))
        points[name] = [hits, sum(given), sum(is_spam)]
    hits, called, spam = points["stored"]
    hits_before, called_before, _ = points["likeliest"]
    shown = [next(row for row in train if row["label"] == label) for label in ("invoice", SPAM)]
    return {
        "rows": [json.dumps(row, ensure_ascii=False) for row in shown],
        "wrong": wrong_label(bench),
        "curves": curves,
        "points": points,
        "facts": f"With the stored threshold, {hits} of {called} unseen mails called spam are spam, "
        f"and {hits} of {spam} spam mails are found. The likeliest label alone calls "
        f"{called_before} mails spam, {called_before - hits_before} of them by mistake.",
    }


def paint(axes: Any, colours: Colours, found: Found) -> None:
    """Draw precision against recall of spam, with the stored threshold."""
    for (name, (recall, precision)), colour in zip(
        found["curves"].items(), ("front", "point"), strict=True
    ):
        axes.step(
            [100 * each for each in recall], [100 * each for each in precision],
            color=colours[colour], label=name, where="post",
        )  # fmt: skip
    hits, called, spam = found["points"]["stored"]
    axes.plot(
        100 * hits / spam, 100 * hits / max(called, 1), "o", markersize=11, color=colours["right"],
        label="stored threshold",
    )  # fmt: skip
    axes.axhline(98, color=colours["grid"], linestyle="--")
    axes.set(
        xlabel="spam mails found, %", ylabel="precision of spam on unseen mail, %", ylim=(-4, 104)
    )
    axes.legend(frameon=False, labelcolor=colours["text"], loc="upper right")


USE = Use(
    "mail",
    "Sort an organisation's e-mail",
    "mails of unknown senders",
    "accuracy",
    "Mail: Fernspoke Cycles, written for luthier, Apache-2.0. People and companies are invented.",
    (
        *(f"examples/mail/{s}/{box}.mbox" for s in ("train", "test") for box in MAILBOXES),
        "examples/mail/NOTICE.md",
    ),
    "Precision against recall of spam, with the stored threshold",
    paint,
    collect,
)
