"""Sampling members of request bodies: fields of the engine, and vLLM's ``structured_outputs``."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal, Optional, TypeVar

from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator

from luthier.models.decoding.sampling import Constraint, Sampling, limited_fields

_API_NAMES = {"max_tokens", "temperature", "top_p", "seed"}
"""Fields for which the APIs differ in name, range or default."""
NAMES = limited_fields(Sampling).keys() - _API_NAMES

Model = TypeVar("Model", bound=BaseModel)


def with_sampling(body: type[Model]) -> type[Model]:
    """Return ``body`` with an optional member for each shared field of :class:`Sampling`.

    Members that ``body`` declares are not changed.
    """
    members: dict[str, Any] = {
        # Optional of Annotated: the limits apply to the number, not to None.
        name: (Optional[Annotated[kind, Field(ge=low, le=high)]], None)  # noqa: UP045
        for name, (kind, (low, high, _)) in limited_fields(Sampling).items()
        if name in NAMES and name not in body.model_fields
    }
    return create_model(body.__name__, __base__=body, __module__=body.__module__, **members)


def sampling_of(body: BaseModel) -> dict[str, Any]:
    """Return the shared sampling fields with a value."""
    return body.model_dump(include=set(NAMES), exclude_none=True)


class StructuredOutputs(BaseModel):
    """Value of ``structured_outputs``, with exactly one field. Source: vLLM's
    ``StructuredOutputsParams``."""

    model_config = ConfigDict(strict=True, extra="forbid")

    json_schema: dict[str, Any] | str | None = Field(default=None, alias="json")
    """JSON schema, as object or text."""
    json_object: Literal[True] | None = None
    """Allow any JSON object."""
    regex: str | None = None
    """Regular expression for the whole text."""
    choice: Annotated[list[str], Field(min_length=1)] | None = None
    """Allowed replies."""
    grammar: str | None = None
    """Lark grammar."""

    @model_validator(mode="after")
    def _check(self) -> StructuredOutputs:
        if len(self.model_fields_set) != 1 or self.constraint is None:
            raise ValueError(
                "exactly one of json, json_object, regex, choice and grammar is required"
            )
        return self

    @property
    def constraint(self) -> Constraint | None:
        """Constraint for the engine."""
        if isinstance(self.json_schema, str):
            try:
                schema = json.loads(self.json_schema)
            except (ValueError, RecursionError) as error:
                raise ValueError("json is not valid JSON") from error
            return Constraint("schema", schema)
        if self.json_schema is not None:
            return Constraint("schema", self.json_schema)
        if self.json_object:
            return Constraint("schema", True)
        if self.choice is not None:
            return Constraint("regex", "|".join(map(re.escape, self.choice)))
        if self.regex is not None:
            return Constraint("regex", self.regex)
        return None if self.grammar is None else Constraint("grammar", self.grammar)
