"""Random changes to the words of a text, for more variety than the rows have.

Two of the four operations of EDA (Wei & Zou 2019, arXiv:1901.11196): words are left out, and pairs of
words change places. Both keep what most texts are about, and take no resources. Left out: synonyms and
inserted words, which need a thesaurus; the copies that EDA stores, as each row is changed anew each
time it is seen instead. Words are those of the tokenizer, so pieces of a word stay together.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    import numpy as np

    from luthier.types import Example


class Augmentation(BaseModel):
    """How much of each text is changed."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    delete: float = Field(default=0.0, ge=0, lt=1)
    """Chance of each word to be left out; EDA's vetted setting is 0.1. One word always stays."""
    swap: float = Field(default=0.0, ge=0, le=1)
    """Pairs of words that change places, as a share of the words and at least one; EDA uses 0.1."""

    def __bool__(self) -> bool:
        """Whether anything is changed at all."""
        return self.delete > 0 or self.swap > 0

    def changed(self, example: Example, random: np.random.Generator) -> Example:
        """``example`` with other words, what it teaches unchanged.

        Special tokens, whose word is -1, stay where they are. The weight of a row that stands at its
        last token stays there.

        Raises:
            ValueError: for an example that does not say which words its tokens belong to.
        """
        import numpy as np

        if example.word_T is None:
            raise ValueError("the words of the row are not known")
        spans = [
            np.flatnonzero(example.word_T == word)
            for word in np.unique(example.word_T[example.word_T >= 0])
        ]
        if not spans:
            return example
        inside = np.concatenate(spans)
        before, after = np.arange(inside[0]), np.arange(inside[-1] + 1, len(example))
        words = np.arange(len(spans))
        for _ in range(max(1, round(self.swap * len(spans))) if self.swap else 0):
            first, second = random.integers(len(spans), size=2)
            words[[first, second]] = words[[second, first]]
        stays = random.random(len(spans)) >= self.delete
        if not stays.any():
            stays[random.integers(len(spans))] = True
        kept = np.concatenate([before, *(spans[word] for word in words[stays]), after])
        weight_T = np.zeros(len(kept), dtype=np.float32)
        weight_T[-1] = example.weight
        return replace(
            example,
            ids_T=example.ids_T[kept],
            weight_T=weight_T,
            word_T=example.word_T[kept],
        )
