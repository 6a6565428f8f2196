"""Sampling members with the same names in the engine and all APIs."""

from __future__ import annotations

from typing import Annotated, Any, Optional, TypeVar

from pydantic import BaseModel, Field, create_model

from luthier.models.sampling import Sampling, limited_fields

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
