"""From files to encoded rows: everything that can refuse the data, before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from luthier.data.chat import ChatFormat
from luthier.data.loader import hold_out, total_tokens
from luthier.data.rows import load_rows
from luthier.engine.defaults import Choice, validation_share
from luthier.errors import DataError, Problem, RecipeError, RowRefused
from luthier.files import sha256_of
from luthier.objectives import OBJECTIVES, Objective
from luthier.recipe import DataSpec
from luthier.types import Example, Row

RULES = {
    "rows.too_few": "A single labelled row is not enough to learn from.",
    "label.one_class": "All rows have the same label, so there is nothing to tell apart.",
    "label.unseen": "A label of the validation rows is in none of the training rows.",
    "label.mixed": "Some rows have one label and others an array of them.",
    "rating.constant": "All rows have the same rating.",
    "row.empty": "The tokenizer makes nothing of the text.",
    "row.objective": "The row has a shape that the objective does not learn from.",
    "row.template": "The row cannot be written in the model's template.",
    "row.too_long": "The row has more tokens than the model's context.",
    "row.nothing_learned": "Cut to the context, the row would have no learned token.",
}
"""Rules that need the model's tokenizer; those of the file alone are in ``data.rows``."""


@dataclass(frozen=True)
class Dataset:
    """Encoded rows of a run, and where they came from."""

    objective: Objective
    """The objective asked for, or the one chosen for the shape of the rows."""
    train: Sequence[Example]
    validation: Sequence[Example]
    longest: int
    """Tokens of the longest training row."""
    hashes: dict[str, str]
    """SHA-256 of each file, by path."""
    choices: list[Choice]
    dropped: int = 0
    truncated: int = 0
    counts: dict[str, int] = field(default_factory=dict)


def prepare(
    spec: DataSpec, objective: Objective | None, chat: ChatFormat, context: int, seed: int
) -> Dataset:
    """Read, check, split and encode the data of a recipe; :class:`DataError` lists what is wrong."""
    rows = load_rows(spec.train)
    held = load_rows(spec.validation) if spec.validation else []
    choices: list[Choice] = []
    if objective is None:
        objective = _objective_for(rows[0], chat)
        choices.append(("objective", objective.method, f"the rows are {_named([_shape(rows[0])])}"))
    objective.check(chat)
    _check_shapes(rows, held, objective, chat)
    if not spec.validation:
        share, reason = spec.validation_share, ""
        if share is None:
            share, reason = validation_share(len(rows))
            choices.append(("data.validation_share", round(share, 4), reason))
        kept, out = hold_out(len(rows), share, seed)
        rows, held = [rows[i] for i in kept], [rows[i] for i in out]
    try:
        objective = objective.fit(rows, chat)
    except RowRefused as bad:
        raise DataError([bad.at(str(spec.train), 0)]) from bad
    encoder = _Encoder(objective, objective.format(chat), context, spec.long_rows)
    train, validation = encoder.encode(rows), encoder.encode(held)
    if encoder.problems:
        raise DataError(encoder.problems)
    counts = {
        "rows": len(train),
        "validation_rows": len(validation),
        "tokens": total_tokens(train),
        "learned_tokens": int(sum(float(e.weight_T.sum()) for e in train)),
    }
    train = objective.arrange(train, context)
    validation = objective.arrange(validation, context) if validation else []
    if not train:
        raise RecipeError(f"no row of {spec.train} is left to train on")
    files = [path for path in (spec.train, spec.validation) if path]
    return Dataset(
        objective=objective,
        train=train,
        validation=validation,
        longest=max(example.tokens for example in train),
        hashes={str(path): sha256_of(Path(path)) for path in files},
        choices=choices,
        dropped=encoder.dropped,
        truncated=encoder.truncated,
        counts={**counts, "examples": len(train)},
    )


def _shape(row: Row) -> str:
    for name, shape in _FIELDS.items():
        if getattr(row, name) is not None:
            return shape
    raise ValueError("a row of no shape")


def _objective_for(row: Row, chat: ChatFormat) -> Objective:
    """The first objective of the table that learns from rows of this shape, on this tokenizer."""
    masks = chat.tokenizer.mask_token_id is not None
    tasks = ("masked_lm", "causal_lm") if masks else ("causal_lm", "masked_lm")
    kinds = [kind for kind in OBJECTIVES.values() if _shape(row) in kind.shapes]
    kinds.sort(key=lambda kind: tasks.index(kind.task) if kind.task in tasks else 0)
    able = [objective for kind in kinds if _suits(objective := kind.model_validate({}), chat)]
    return able[0] if able else kinds[0].model_validate({})


def _suits(objective: Objective, chat: ChatFormat) -> bool:
    try:
        objective.check(chat)
    except RecipeError:
        return False
    return True


def _check_shapes(
    rows: Sequence[Row], held: Sequence[Row], objective: Objective, chat: ChatFormat
) -> None:
    problems = []
    if len(rows) == 1 and _shape(rows[0]) != "text":
        problems.append(
            Problem(
                rows[0].file,
                rows[0].line,
                "rows.too_few",
                "this is the only row; one example cannot show what is to be learned.",
                "Give at least two, better fifty or more; a single reply belongs in the prompt.",
            )
        )
    for row in [*rows, *held]:
        shape = _shape(row)
        if shape not in objective.shapes:
            other = _objective_for(row, chat).method
            problems.append(
                Problem(
                    row.file,
                    row.line,
                    "row.objective",
                    f"objective {objective.method} learns from {_named(objective.shapes)}, "
                    f"and this row is {_named([shape])}.",
                    f"Use --objective {other}, or bring the rows into the other form.",
                )
            )
    if problems:
        raise DataError(problems)


_FIELDS = {
    "messages": "messages",
    "prompt": "prompt",
    "completion": "prompt",
    "label": "label",
    "rating": "rating",
    "tags": "tags",
    "positive": "pair",
    "text": "text",
}
"""What tells the shape of a row, in the order it is asked."""
_SHAPES = {
    "prompt": "prompt and completion",
    "messages": "messages",
    "text": "raw text",
    "label": "text with labels",
    "rating": "text with ratings",
    "tags": "tokens with tags",
    "pair": "pairs of anchor and positive",
}


def _named(shapes: Sequence[str] | frozenset[str]) -> str:
    return " or ".join(_SHAPES[shape] for shape in sorted(shapes))


class _Encoder:
    """Encodes rows and collects what is wrong with them."""

    def __init__(
        self, objective: Objective, chat: ChatFormat, context: int, long_rows: str
    ) -> None:
        self.objective, self.chat, self.context = objective, chat, context
        self.long_rows = long_rows
        self.problems: list[Problem] = []
        self.dropped = self.truncated = 0

    def encode(self, rows: Sequence[Row]) -> list[Example]:
        examples = []
        for index, row in enumerate(rows):
            try:
                example = self.objective.encode(row, index, self.chat)
            except RowRefused as bad:
                self.problems.append(bad.at(row.file, row.line))
                continue
            except RecipeError as error:
                self._problem(row, "row.template", str(error), "See the message.")
                continue
            longest = max(view.longest for view in self.objective.views(example))
            if longest <= self.context or self.objective.packs:
                examples.append(example)
            elif self.long_rows == "error":
                self._too_long(row, example, longest)
            elif self.long_rows == "drop":
                self.dropped += 1
            else:
                shorter = self._truncate(row, example)
                examples += [shorter] if shorter else []
        return examples

    def _truncate(self, row: Row, example: Example) -> Example | None:
        """Cut from the end; a row that loses all its learned tokens is a problem, not a row."""
        shorter = self.objective.cut(example, self.context)
        if not np.any(shorter.weight_T):
            self._problem(
                row,
                "row.nothing_learned",
                f"cut to the context of {self.context} tokens, nothing of the reply is left.",
                "Shorten the prompt, or use --set data.long_rows=drop.",
            )
            return None
        self.truncated += 1
        return shorter

    def _too_long(self, row: Row, example: Example, longest: int) -> None:
        lost = float(example.weight_T[self.context :].sum() / example.weight_T.sum())
        cost = f"cutting the row would lose {lost:.0%} of what it teaches"
        if example.source_T is not None and len(example.source_T) == longest:
            cost = f"cutting the prompt would lose {1 - self.context / longest:.0%} of it"
        self._problem(
            row,
            "row.too_long",
            f"{longest} tokens are more than the model's context of {self.context}; {cost}.",
            "Shorten the row, or choose --set data.long_rows=drop or truncate.",
        )

    def _problem(self, row: Row, rule: str, message: str, fix: str) -> None:
        self.problems.append(Problem(row.file, row.line, rule, message, fix))
