"""Members of request bodies that have the names of the engine's sampling fields in every API."""

from __future__ import annotations

from typing import Annotated, Any, Optional, TypeVar

from pydantic import BaseModel, Field, create_model

from luthier.models.sampling import Sampling, limited_fields

_API_NAMES = {"max_tokens", "temperature", "top_p", "seed"}
"""Fields for which each API has a name, a range or a default of its own."""
NAMES = limited_fields(Sampling).keys() - _API_NAMES

Model = TypeVar("Model", bound=BaseModel)


def with_sampling(body: type[Model]) -> type[Model]:
    """Return ``body`` with an optional member for each shared field of :class:`Sampling`.

    A member that ``body`` declares itself stays as declared.
    """
    members: dict[str, Any] = {
        # Optional of an annotated type: the range is that of the number.
        name: (Optional[Annotated[kind, Field(ge=low, le=high)]], None)  # noqa: UP045
        for name, (kind, (low, high, _)) in limited_fields(Sampling).items()
        if name in NAMES and name not in body.model_fields
    }
    return create_model(body.__name__, __base__=body, __module__=body.__module__, **members)


def sampling_of(body: BaseModel) -> dict[str, Any]:
    """Return the shared sampling fields that a request gives a value."""
    return body.model_dump(include=set(NAMES), exclude_none=True)
