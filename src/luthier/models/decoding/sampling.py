"""Sampling settings of the CLI, the SDK and the APIs. No heavy imports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any, Literal, NamedTuple, get_type_hints

from luthier.errors import RecipeError

MOST_TOKENS = 2**31 - 1
"""Largest length or token count of a request: longer than any context, and safe to compute with."""
MOST_PENALTY = 1000.0
"""Largest repetition penalty, and the inverse of the smallest: logits stay finite."""


class FieldLimits(NamedTuple):
    """Range and help text of a sampling field."""

    low: float
    high: float
    help: str


@dataclass(frozen=True)
class Constraint:
    """A constraint on the whole completion; ``kind`` is a field of :class:`Sampling`."""

    kind: Literal["schema", "regex", "grammar"]
    definition: Mapping[str, Any] | bool | str

    @property
    def fields(self) -> dict[str, Any]:
        """Return the corresponding field of :class:`Sampling`."""
        return {self.kind: self.definition}


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Sampling settings. Equal model, prompt, settings and seed give the same text."""

    max_tokens: Annotated[
        int | None,
        FieldLimits(1, MOST_TOKENS, "Most tokens of a reply; 256, or half of a smaller context."),
    ] = None
    """Maximum number of tokens. The caller defines the default."""
    min_tokens: Annotated[int, FieldLimits(0, MOST_TOKENS, "Tokens before a reply may stop.")] = 0
    """Minimum number of tokens before a stop token or stop sequence. A finished grammar ends the
    completion earlier."""
    temperature: Annotated[float, FieldLimits(0, 1000, "0 takes the most likely token.")] = 0.0
    """Divisor of the logits; 0 for greedy decoding."""
    top_p: Annotated[float, FieldLimits(0, 1, "Draw from the most likely tokens only.")] = 1.0
    """Nucleus sampling: total probability of the candidates; 0 keeps one candidate."""
    top_k: Annotated[int, FieldLimits(0, MOST_TOKENS, "Draw from this many tokens; 0 for all.")] = 0
    """Draw only from this many of the most likely tokens; 0 for all."""
    min_p: Annotated[float, FieldLimits(0, 1, "Lowest share of the top token's probability.")] = 0.0
    """Minimum probability relative to the most likely token (arXiv:2407.01082)."""
    repetition_penalty: Annotated[
        float,
        FieldLimits(1 / MOST_PENALTY, MOST_PENALTY, "Above 1 avoids tokens that stand before."),
    ] = 1.0
    """Divisor of the logits of earlier tokens; negative logits are multiplied (Keskar et al. 2019,
    arXiv:1909.05858)."""
    frequency_penalty: Annotated[float, FieldLimits(-2, 2, "Penalty per use of a token.")] = 0.0
    """Logit penalty per earlier occurrence in the completion."""
    presence_penalty: Annotated[float, FieldLimits(-2, 2, "Penalty of tokens in the reply.")] = 0.0
    """Logit penalty for tokens in the completion."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of tokens."""
    stop: tuple[str, ...] = ()
    """Stop sequences, excluded from the completion. Reasoning is not searched."""
    seed: Annotated[int | None, FieldLimits(0, 2**63 - 1, "Seed of the draws.")] = 0
    """Random seed, equal for all prompts; ``None`` for a random seed."""
    schema: Mapping[str, Any] | bool | None = None
    """JSON schema of completions; ``True`` for any JSON object."""
    regex: str | None = None
    """Regular expression for whole completions, in the syntax of Rust's ``regex``."""
    grammar: str | None = None
    """Context-free grammar with the rule ``start``, in the Lark syntax of ``llguidance``."""

    def __post_init__(self) -> None:
        """Reject invalid values."""
        # mypy confuses the hash of a frozen dataclass with the hash of its class.
        for name, (_, (low, high, _)) in limited_fields(type(self)).items():  # type: ignore[arg-type]
            value = getattr(self, name)
            # The comparison also rejects NaN.
            if value is not None and not low <= value <= high:
                raise self.refusal(f"{name} must be between {low:,} and {high:,}", name)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            text = f"min_tokens must be at most max_tokens, {self.max_tokens:,}"
            raise self.refusal(text, "min_tokens")
        if not all(self.stop):
            raise self.refusal("a stop sequence must not be empty", "stop")
        if [self.schema, self.regex, self.grammar].count(None) < 2:
            text = "schema, regex and grammar are mutually exclusive"
            raise self.refusal(text, "grammar")

    @staticmethod
    def refusal(message: str, field: str) -> Exception:
        """Return the error for a wrong value of ``field``."""
        return RecipeError(message, rule="sampling.range")

    @property
    def constraint(self) -> Constraint | None:
        """The constraint on completions, or ``None``."""
        if self.schema is not None:
            return Constraint("schema", self.schema)
        if self.regex is not None:
            return Constraint("regex", self.regex)
        return None if self.grammar is None else Constraint("grammar", self.grammar)


@cache
def limited_fields(kind: type) -> dict[str, tuple[Any, FieldLimits]]:
    """Return the type and limits of each field of ``kind`` with limits, by name."""
    hints = get_type_hints(kind, include_extras=True)
    found = {name: getattr(hint, "__metadata__", ()) for name, hint in hints.items()}
    return {name: (hints[name].__origin__, limits[0]) for name, limits in found.items() if limits}
