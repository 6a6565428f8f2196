"""Copied questions by the cosine of embeddings."""

from __future__ import annotations

from typing import Any

import numpy as np

from defaults import rows_of
from pages.bench import ROWS, Bench, Colours, Found, Use, ends, first_rows


def collect(bench: Bench) -> Found:
    """Compare cosines of the tuned model, of the base model and of TF-IDF on labelled pairs."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    from luthier.evaluation.preferences import area_under_curve
    from luthier.evaluation.significance import Statistic

    base, tuned = (rows_of(bench.folder / name) for name in ("base.jsonl", "answers.jsonl"))
    train = rows_of(bench.folder / "rows" / "train.jsonl")
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    words.fit([text for row in train for text in (row["query"], row["positive"])])
    sides = (words.transform([each[side] for each in base]) for side in ("query", "document"))
    one, other = sides
    score_of = {
        "all-minilm-l6-v2:copies": [each["score"] for each in tuned],
        "the base model": [each["score"] for each in base],
        "TF-IDF": np.asarray(one.multiply(other).sum(1)).ravel().tolist(),
    }
    same_N = np.array([each["expected"] > 0.5 for each in base])
    size = sum(
        each.stat().st_size
        for each in (bench.home / "models" / "base" / "all-minilm-l6-v2").glob("*.safetensors")
    )

    def area(scores: list[float]) -> Statistic:
        score_N = np.array(scores)
        return Statistic.of(
            lambda row_K: area_under_curve(score_N[row_K], same_N[row_K]), len(base)
        )

    found = {name: area(scores) for name, scores in score_of.items()}
    contenders: list[dict[str, Any]] = [
        {
            "name": name, "technique": technique, "score": found[name].value,
            "interval": list(found[name].interval), "seconds": None, "model_bytes": bytes_,
        }
        for name, technique, bytes_ in zip(
            found, ("fine-tuning", "zero-shot", "simple baselines"), (size, size, 0), strict=True
        )
    ]  # fmt: skip
    contenders.sort(key=lambda each: -each["score"])
    own, rival = ends(contenders)
    own_N, rival_N = (np.array(score_of[each["name"]]) for each in (own, rival))
    gain = Statistic.of(
        lambda row_K: (
            area_under_curve(own_N[row_K], same_N[row_K])
            - area_under_curve(rival_N[row_K], same_N[row_K])
        ),
        len(base),
        is_share=False,
    )
    low, high = gain.interval
    worth_it = (gain.value > 0) if low > 0 or high < 0 else None
    similar = [each for each in tuned if each["similar"]]
    wrong = next(each for each in tuned if each["similar"] != (each["expected"] > 0.5))
    threshold = max(each["score"] for each in tuned if not each["similar"])
    pair = (bench.folder / "rows" / "test.jsonl").read_text().split("\n")[0]
    hits = sum(each["expected"] > 0.5 for each in similar)
    return {
        "rows": [*first_rows(bench, 1), pair],
        "wrong": f"{wrong['query']}\n{wrong['document']}\n"
        f"answer:   {'similar' if wrong['similar'] else 'not similar'} (cosine {wrong['score']:.3f})\n"
        f"expected: {'similar' if wrong['expected'] > 0.5 else 'not similar'}",
        "compared": {
            "contenders": contenders, "rows": len(base), "worth_it": worth_it,
            "verdict": f"The AUC of the tuned model minus the AUC of {rival['name']} is "
            f"{100 * gain.value:+.1f} points (95 % interval {100 * low:+.1f} to {100 * high:+.1f}), on "
            f"{len(base)} pairs by paired bootstrap.",
        },
        "facts": f"At the threshold that training chose, {hits} of {int(same_N.sum())} copies are "
        f"found, and {len(similar) - hits} of {int((~same_N).sum())} other pairs are false alarms.",
        "scores": {"same": same_N.tolist(), **score_of},
        "threshold": threshold,
    }  # fmt: skip


def paint(axes: Any, colours: Colours, found: Found) -> None:
    """Draw the cosines of copies and of other pairs, with the chosen threshold."""
    same_N = np.array(found["scores"]["same"])
    score_N = np.array(found["scores"]["all-minilm-l6-v2:copies"])
    borders = np.linspace(min(score_N.min(), 0), 1, 31)
    for chosen_N, name, colour in ((same_N, "copies", "right"), (~same_N, "other pairs", "front")):
        axes.hist(score_N[chosen_N], borders, color=colours[colour], alpha=0.6, label=name)
    axes.axvline(found["threshold"], color=colours["text"], linestyle="--", label="threshold")
    axes.set(xlabel="cosine of the tuned model", ylabel="pairs")
    axes.legend(frameon=False, labelcolor=colours["text"], loc="upper left")


USE = Use(
    "copied-questions",
    "Copied questions and passages",
    "pairs",
    "AUC",
    "Rows: COVID-QA question pairs (Möller et al. 2020), Apache-2.0; a cut.",
    tuple(f"examples/copied-questions/{name}" for name in ROWS),
    "Histograms of the scores of copies and of other pairs, with the threshold",
    paint,
    collect,
)
