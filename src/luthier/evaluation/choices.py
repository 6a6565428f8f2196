"""Multiple choice by log-likelihood, as in lm-evaluation-harness.

The log-likelihood of a choice is the sum over its tokens after the prompt (Gao et al. 2021,
``loglikelihood``). ``accuracy`` selects the most likely choice. ``accuracy_norm`` (``acc_norm`` in
the harness) divides by the characters of the choice, because long choices have more tokens. A row
with one choice is a cloze test, as in LAMBADA (Paperno et al. 2016): correct if every token is the
most likely token. ``perplexity`` is computed over whole choices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from luthier.data.conversations.chat import ChatFormat
from luthier.data.shapes.choices import MultipleChoice
from luthier.errors import RowRefused, line_field
from luthier.evaluation.significance import RowScores, Score, Statistic, perplexity_of
from luthier.types import Example


@dataclass(frozen=True)
class ChoiceLikelihood:
    """Likelihood of a choice under a model."""

    logp: float
    """Log-probability of all tokens, in nats."""
    is_greedy: bool
    """True if every token is the most likely token."""


def encode_choices(row: MultipleChoice, chat: ChatFormat) -> list[Example]:
    """Return the tokens of each choice after the prompt, with weight 1 for the choice's tokens.

    Prompt and choice are tokenized as one text. The tokens after the prompt's own tokens belong to
    the choice. A space separates prompt and choice, unless the prompt ends with a space; the space
    belongs to the choice.

    Raises:
        RowRefused: a choice has no tokens of its own.
    """
    examples = []
    for place, (prompt, choice) in enumerate(row.pairs):
        stem = prompt.rstrip()
        rest = (prompt[len(stem) :] or " ") + choice
        source_T = None
        if chat.decoder is None:
            before_T, choice_T = chat.text_tokenizer.continued_tokens(stem, rest)
        else:
            source_T = chat.text_tokenizer.encode_whole(stem)
            before_T, choice_T = chat.decoder.opening, chat.text_tokenizer.target_tokens(rest)
        if not len(choice_T):
            raise RowRefused(
                "choices.type",
                f"choice {place} has no tokens after the prompt.",
                "Separate the choice from the last word of the prompt.",
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
    """Return the index of the most likely choice, without and with length normalization."""
    logps = np.array([each.logp for each in found])
    return int(logps.argmax()), int((logps / [len(choice) for choice in row.choices]).argmax())


def choice_scores(
    rows: Sequence[MultipleChoice], found: Sequence[Sequence[ChoiceLikelihood]]
) -> tuple[dict[str, Score], list[dict[str, Any]]]:
    """Return the scores, and a JSON record of each row."""
    right: dict[str, list[bool]] = {"accuracy": [], "accuracy_norm": []}
    records = []
    for row, each in zip(rows, found, strict=True):
        is_cloze = len(row.choices) == 1
        for name, place in zip(right, picks(row, each), strict=True):
            right[name].append(each[0].is_greedy if is_cloze else place == row.answer)
        records.append(
            {
                **line_field(row.line),
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
