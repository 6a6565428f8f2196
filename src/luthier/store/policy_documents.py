"""IAM policy documents: what is a valid one, and those of the built-in roles.

Source: the IAM JSON policy grammar, identity-based policies.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from luthier.errors import RefusedInput

VERSIONS = ("2012-10-17", "2008-10-17")
LARGEST = 200
"""Statements in one document at most."""
LONGEST = 2048
"""Characters of an action or resource at most."""
_MEMBERS = ("Sid", "Effect", "Action", "NotAction", "Resource", "NotResource", "Condition")
_ACTION = re.compile(r"\*|[A-Za-z0-9-]+:[A-Za-z0-9*?._-]+")

Document = Mapping[str, Any]


def _allow(*actions: str) -> dict[str, Any]:
    return {"Effect": "Allow", "Action": list(actions), "Resource": "*"}


def _document(*statements: dict[str, Any]) -> Document:
    return MappingProxyType({"Version": VERSIONS[0], "Statement": list(statements)})


ROLES: Mapping[str, Document] = MappingProxyType(
    {
        "admin": _document(_allow("*")),
        "developer": _document(
            _allow("bedrock:*", "luthier:*", "s3:*"),
            {"Effect": "Deny", "Action": ["luthier:admin.*", "luthier:audit.*"], "Resource": "*"},
        ),
        "auditor": _document(
            _allow(
                "bedrock:Get*", "bedrock:List*", "bedrock:CallWithBearerToken", "luthier:Get*",
                "luthier:List*", "luthier:openai.*.retrieve", "luthier:openai.*.list*",
                "luthier:audit.*", "s3:ListAllMyBuckets", "s3:ListBucket",
            ),
            # Contents are not the auditor's business, what was done to them is.
            {"Effect": "Deny", "Action": ["s3:GetObject"], "Resource": "*"},
        ),
        "invoke-only": _document(
            _allow(
                "bedrock:InvokeModel", "bedrock:InvokeModelWithResponseStream",
                "bedrock:ApplyGuardrail", "bedrock:CountTokens", "bedrock:CallWithBearerToken",
                "bedrock:ListFoundationModels", "bedrock:GetFoundationModel",
                "luthier:openai.chat.*", "luthier:openai.completions.*",
                "luthier:openai.embeddings.*", "luthier:openai.responses.*",
                "luthier:openai.models.list",
                "luthier:openai.models.retrieve",
            )
        ),
    }
)  # fmt: skip
"""What the built-in roles may do, as policy documents."""


def check_role(name: str) -> str:
    """``name`` if there is such a role; raises :class:`RefusedInput` with those there are."""
    if name not in ROLES:
        raise RefusedInput(f"there is no role {name!r}; there are {', '.join(ROLES)}")
    return name


def check_document(document: Any, where: str = "policy") -> Document:
    """``document`` if it is a policy that can be evaluated.

    Raises:
        RefusedInput: with the place and what is expected there.
    """
    if not isinstance(document, Mapping):
        raise RefusedInput(f"{where} is not an object with Version and Statement")
    unknown = set(document) - {"Version", "Id", "Statement"}
    if unknown:
        raise RefusedInput(f"{where}: unknown member {', '.join(sorted(map(str, unknown)))}")
    if document.get("Version", VERSIONS[0]) not in VERSIONS:
        raise RefusedInput(f'{where}.Version is not "{VERSIONS[0]}"')
    if "Statement" not in document:
        raise RefusedInput(f"{where} has no Statement")
    statements = statements_of(document)
    if not 1 <= len(statements) <= LARGEST:
        raise RefusedInput(f"{where} has {len(statements)} statements; it takes 1 to {LARGEST}")
    for number, statement in enumerate(statements):
        _check_statement(statement, f"{where}.Statement[{number}]")
    return document


def statements_of(document: Document) -> Sequence[Any]:
    """Its statements; one alone may stand without a list."""
    given = document["Statement"]
    return given if isinstance(given, list) else [given]


def _check_statement(statement: Any, where: str) -> None:
    if not isinstance(statement, Mapping):
        raise RefusedInput(f"{where} is not an object with Effect, Action and Resource")
    if unknown := set(statement) - set(_MEMBERS):
        names = ", ".join(sorted(map(str, unknown)))
        raise RefusedInput(f"{where}: {names} cannot stand here; there are {', '.join(_MEMBERS)}")
    if statement.get("Effect") not in ("Allow", "Deny"):
        raise RefusedInput(f'{where}.Effect is neither "Allow" nor "Deny"')
    if not isinstance(statement.get("Sid", ""), str):
        raise RefusedInput(f"{where}.Sid is not a string")
    if not isinstance(statement.get("Condition", {}), Mapping):
        raise RefusedInput(f"{where}.Condition is not an object")
    for name in ("Action", "Resource"):
        given = [each for each in (name, f"Not{name}") if each in statement]
        if len(given) != 1:
            raise RefusedInput(f"{where} needs one of {name} and Not{name}")
        for value in listed(statement[given[0]]):
            _check_pattern(value, name, f"{where}.{given[0]}")
        if not listed(statement[given[0]]):
            raise RefusedInput(f"{where}.{given[0]} is empty")


def listed(value: Any) -> list[Any]:
    """One pattern, or several."""
    return value if isinstance(value, list) else [value]


def _check_pattern(value: Any, name: str, where: str) -> None:
    if not isinstance(value, str) or not value or len(value) > LONGEST:
        raise RefusedInput(f"{where} is not a string of 1 to {LONGEST} characters")
    if name == "Action" and not _ACTION.fullmatch(value):
        raise RefusedInput(
            f'{where}: {value!r} is not like "bedrock:InvokeModel", "bedrock:*", "*"'
        )
    if name == "Resource" and value != "*" and not value.startswith(("arn:", "*")):
        raise RefusedInput(f'{where}: {value!r} is neither "*" nor an ARN')
    if "${" in value:
        # Taken as plain text, a Deny would not cover what its author meant.
        raise RefusedInput(f"{where}: policy variables such as {value!r} are not evaluated here")
