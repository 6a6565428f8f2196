"""Rows with choices, scored by how likely a model finds each, as lm-evaluation-harness does it.

The log-likelihood of a choice is that of its tokens behind the prompt (Gao et al. 2021; there
``loglikelihood``). ``accuracy`` takes the likeliest choice; ``accuracy_norm`` (there ``acc_norm``)
divides by the characters of the choice first, as longer ones have more tokens to pay for. A row with
one choice is a cloze, as LAMBADA (Paperno et al. 2016): it is right where each of its tokens is the
likeliest, and ``perplexity`` is that of whole choices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from luthier.data.chat import ChatFormat
from luthier.data.shapes.choices import MultipleChoice
from luthier.errors import RowRefused
from luthier.evaluation.significance import RowScores, Score, Statistic, perplexity_of
from luthier.types import Example


@dataclass(frozen=True)
class ChoiceLikelihood:
    """One choice under a model."""

    logp: float
    """Log-probability of all its tokens, in nats."""
    is_greedy: bool
    """Whether each of its tokens is the likeliest."""


def encode_choices(row: MultipleChoice, chat: ChatFormat) -> list[Example]:
    """Return the tokens of each choice behind its prompt, those of the choice of weight 1.

    Both are tokenized as one text, and the tokens after those of the prompt alone are the choice's. A
    space stands between unless the prompt ends with one; the space belongs to the choice.

    Raises:
        RowRefused: where a choice gives no tokens of its own.
    """
    examples = []
    for place, (prompt, choice) in enumerate(row.pairs):
        stem = prompt.rstrip()
        rest = (prompt[len(stem) :] or " ") + choice
        source_T = None
        if chat.start_id is None:
            before_T, choice_T = chat.continued_tokens(stem, rest)
        else:
            source_T = chat.encode_whole(stem)
            before_T, choice_T = chat.decoder_opening, chat.target_tokens(rest)
        if not len(choice_T):
            raise RowRefused(
                "choices.type",
                f"choice {place} gives no tokens of its own behind the prompt.",
                "Write a choice that does not run into the last word of the prompt.",
            )
        weight_T = np.zeros(len(before_T) + len(choice_T), dtype=np.float32)
        weight_T[len(before_T) :] = 1.0
        ids_T = np.concatenate([before_T, choice_T])
        examples.append(Example(ids_T, weight_T, place, source_T=source_T))
    return examples


def keep_end(text: Example, size: int) -> Example:
    """Return the last ``size`` tokens: the end of the question, and the choice."""
    weight_T = text.weight_T[-size:].copy()
    weight_T[0] = 0.0  # if the choice alone is longer, nothing precedes its first token
    return Example(text.ids_T[-size:], weight_T, text.row, source_T=text.source_T)


def picks(row: MultipleChoice, found: Sequence[ChoiceLikelihood]) -> tuple[int, int]:
    """Places of the likeliest choice, and of the likeliest for its characters."""
    logps = np.array([each.logp for each in found])
    return int(logps.argmax()), int((logps / [len(choice) for choice in row.choices]).argmax())


def choice_scores(
    rows: Sequence[MultipleChoice], found: Sequence[Sequence[ChoiceLikelihood]]
) -> tuple[dict[str, Score], list[dict[str, Any]]]:
    """Scores of the rows, and what a model says of each, ready for JSON."""
    right: dict[str, list[bool]] = {"accuracy": [], "accuracy_norm": []}
    records = []
    for row, each in zip(rows, found, strict=True):
        is_cloze = len(row.choices) == 1
        for name, place in zip(right, picks(row, each), strict=True):
            right[name].append(each[0].is_greedy if is_cloze else place == row.answer)
        records.append(
            {
                "line": row.line,
                "prompt": row.plain_text(),
                "expected": row.choices[row.answer],
                "reply": "" if is_cloze else row.pairs[picks(row, each)[0]][1],
                "logps": [one.logp for one in each],
                "scores": {name: float(marks[-1]) for name, marks in right.items()},
            }
        )
    cloze_R = [len(row.choices) == 1 for row in rows]
    if all(cloze_R):
        del right["accuracy_norm"]
    scores: dict[str, Score] = {name: RowScores.of(marks) for name, marks in right.items()}
    if all(cloze_R):
        logp_R = np.array([each[0].logp for each in found])
        scores["perplexity"] = Statistic.of(
            lambda row_K: perplexity_of(-float(logp_R[row_K].mean())), len(logp_R), False
        )
    return scores, records
