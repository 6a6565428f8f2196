"""How the next token is chosen: the settings that every way to decode shares. Imports nothing heavy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from luthier.errors import RecipeError


@dataclass(frozen=True)
class Constraint:
    """What the whole text of an answer has to match, by the name of its field in :class:`Sampling`."""

    kind: Literal["schema", "regex", "grammar"]
    definition: Mapping[str, Any] | bool | str

    @property
    def fields(self) -> dict[str, Any]:
        """The field of :class:`Sampling` that says so."""
        return {self.kind: self.definition}


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How an answer is written: the same model, prompt, settings and seed give the same text."""

    max_tokens: int | None = None
    """Tokens of an answer at most; whoever asks says what holds where it is not given."""
    temperature: float = 0.0
    """0 takes the likeliest token; higher draws more freely."""
    top_p: float = 1.0
    """Draw only from the likeliest tokens that together have this probability; 0 leaves one."""
    top_k: int = 0
    """Draw only from so many tokens; 0 for all."""
    min_p: float = 0.0
    """Draw no token that is less likely than this share of the likeliest (arXiv:2407.01082)."""
    repetition_penalty: float = 1.0
    """Logits of tokens that stand before are divided by it, negative ones multiplied (Keskar et al.
    2019, arXiv:1909.05858)."""
    frequency_penalty: float = 0.0
    """Taken from a logit for each time the token was written already."""
    presence_penalty: float = 0.0
    """Taken from the logits of tokens that were written already."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of tokens."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer, and are no part of it; its reasoning is not searched for them."""
    seed: int | None = 0
    """Seed of the draws, the same for every prompt; a random one where it is ``None``."""
    schema: Mapping[str, Any] | bool | None = None
    """JSON schema that answers have to match; ``True`` for any JSON object."""
    regex: str | None = None
    """Regular expression that whole answers have to match, in the syntax of Rust's ``regex``."""
    grammar: str | None = None
    """Context-free grammar of answers, from ``start`` on, in the Lark syntax of ``llguidance``."""

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        if self.max_tokens is not None and self.max_tokens < 1:
            raise RecipeError("max-tokens must be at least 1")
        if not 0 <= self.temperature < math.inf:
            raise RecipeError("temperature must be 0 or more")
        if not 0 <= self.top_p <= 1:
            raise RecipeError("top-p must be from 0 to 1")
        if self.top_k < 0 or not 0 <= self.min_p <= 1:
            raise RecipeError("top-k must be 0 or more, and min-p from 0 to 1")
        if not 0 < self.repetition_penalty < math.inf:
            raise RecipeError("repetition-penalty must be above 0")
        if not all(self.stop):
            raise RecipeError("a stop sequence must not be empty")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise RecipeError("seed must be 0 or more, and below 2**63")
        if [self.schema, self.regex, self.grammar].count(None) < 2:
            raise RecipeError("give only one of schema, regex and grammar for an answer to match")

    @property
    def constraint(self) -> Constraint | None:
        """What answers have to match, where that was said."""
        if self.schema is not None:
            return Constraint("schema", self.schema)
        if self.regex is not None:
            return Constraint("regex", self.regex)
        return None if self.grammar is None else Constraint("grammar", self.grammar)
