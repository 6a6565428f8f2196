"""Graders that clients of the service may write themselves.

A grader can ask any model and any address with the server's keys, read files and run code. A client's
may score texts alone, in the sandbox where it holds code. Models that judge are named through a face,
which finds them for the account; whoever runs the server can register others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from luthier.errors import RecipeError

_PARTS = {"mix": "parts", "multi": "graders"}
"""Graders made of others, and the field that holds them by name."""
ALLOWED = (
    "exact", "first_line", "number", "regex", "similarity", "json_schema", "string_check",
    "text_similarity", "python", *_PARTS,
)  # fmt: skip


def clients_grader(fields: Any) -> dict[str, Any]:
    """``fields`` of a grader, where a client may write them.

    Raises:
        RecipeError: for one that asks models or addresses, or reads files.
    """
    if isinstance(fields, str):
        fields = {"method": fields}
    method = fields.get("method") if isinstance(fields, Mapping) else None
    if method not in ALLOWED:
        raise RecipeError(f"grader {method!r} cannot be used here; there are {', '.join(ALLOWED)}")
    given = dict(fields)
    if method == "json_schema" and not isinstance(given.get("against"), Mapping):
        raise RecipeError("grader json_schema: `against` is the schema itself, an object")
    if part := _PARTS.get(method):
        held = given.get(part)
        if not isinstance(held, Mapping):
            raise RecipeError(f"grader {method}: `{part}` holds graders by name")
        given[part] = {name: clients_grader(each) for name, each in held.items()}
    return given
