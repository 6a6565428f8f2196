"""Grading by a model that chooses a label, as OpenAI's ``label_model`` does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from luthier.graders.score_model import PromptedModel

Label = Annotated[str, Field(min_length=1, max_length=200)]


class LabelModel(PromptedModel):
    """1 when a model answers ``input`` with one of ``passing_labels``, else 0.

    The messages say what is to be labelled; a line that names the ``labels`` is put behind them. A
    model of a server is kept to them as it writes; of another one, an answer that is none of them is an
    error, never a guess.
    """

    method: Literal["label_model"] = "label_model"
    labels: Annotated[tuple[Label, ...], Field(min_length=1, max_length=100)]
    """The labels to choose from."""
    passing_labels: Annotated[tuple[Label, ...], Field(min_length=1, max_length=100)]
    """Those of them that count as 1."""

    @model_validator(mode="after")
    def _check_labels(self) -> Self:
        if unknown := sorted(set(self.passing_labels) - set(self.labels)):
            raise ValueError(f"passing_labels are some of the labels, and {unknown} are none")
        return self

    @property
    def answer_schema(self) -> Mapping[str, Any]:
        """One of the labels, as JSON."""
        return {"enum": list(self.labels)}

    @property
    def closing(self) -> str:
        """Asks for a label."""
        return f"Answer with one of these labels and nothing else: {', '.join(self.labels)}."

    def score_of(self, reply: str) -> float | None:
        """Whether the label that the reply is, in any case, passes."""
        try:
            label = str(json.loads(reply))
        except ValueError:
            label = reply
        if label in self.labels:
            return float(label in self.passing_labels)
        wanted = _bare(label)
        chosen = next((each for each in self.labels if _bare(each) == wanted), None)
        return None if chosen is None else float(chosen in self.passing_labels)


def _bare(label: str) -> str:
    """In small letters, without quotes and a full stop."""
    return label.strip(" \t\n.\"'").casefold()
