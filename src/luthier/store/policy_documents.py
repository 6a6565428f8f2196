"""IAM policy documents: what is a valid one, and those of the built-in roles.

Source: the IAM JSON policy grammar, identity-based policies and the trust policies of roles.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from luthier.errors import RefusedInput

VERSIONS = ("2012-10-17", "2008-10-17")
LARGEST = 200
"""Statements in one document at most."""
LONGEST = 2048
"""Characters of an action or resource at most."""
_MEMBERS = ("Sid", "Effect", "Action", "NotAction", "Resource", "NotResource", "Condition")
_TRUST_MEMBERS = ("Sid", "Effect", "Principal", "Action", "Condition")
_PRINCIPAL = re.compile(
    r"[0-9]{12}|arn:aws:iam::[0-9]{12}:(root|(user|role)/[A-Za-z0-9_+=,.@-]{1,64})"
    r"|arn:aws:sts::[0-9]{12}:assumed-role/[A-Za-z0-9_+=,.@-]{1,64}/[A-Za-z0-9_+=,.@-]{2,64}"
)
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
                "luthier:openai.images.*", "luthier:Predict", "luthier:SampleImages",
                "luthier:ReconstructImages",
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
    """``document`` if it is an identity-based policy that can be evaluated.

    Raises:
        RefusedInput: with the place and what is expected there.
    """
    return _check_form(document, where, _check_statement)


def check_trust(document: Any) -> Document:
    """``document`` if it is the trust policy of a role; it names who may assume it.

    Raises:
        RefusedInput: with the place and what is expected there.
    """
    return _check_form(document, "trust policy", _check_trust_statement)


def _check_form(document: Any, where: str, check_statement: Callable[[Any, str], None]) -> Document:
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
        check_statement(statement, f"{where}.Statement[{number}]")
    return document


def statements_of(document: Document) -> Sequence[Any]:
    """Its statements; one alone may stand without a list."""
    given = document["Statement"]
    return given if isinstance(given, list) else [given]


def _check_statement(statement: Any, where: str) -> None:
    _check_members(statement, _MEMBERS, where)
    for name in ("Action", "Resource"):
        given = [each for each in (name, f"Not{name}") if each in statement]
        if len(given) != 1:
            raise RefusedInput(f"{where} needs one of {name} and Not{name}")
        _check_patterns(statement[given[0]], name, f"{where}.{given[0]}")


def _check_trust_statement(statement: Any, where: str) -> None:
    _check_members(statement, _TRUST_MEMBERS, where)
    if "Action" not in statement or "Principal" not in statement:
        raise RefusedInput(f"{where} needs Principal and Action")
    _check_patterns(statement["Action"], "Action", f"{where}.Action")
    principal = statement["Principal"]
    if isinstance(principal, Mapping) and set(principal) <= {"AWS", "Service", "Federated"}:
        for name, values in principal.items():
            for value in as_list(values):
                _check_principal(statement, name, value, f"{where}.Principal.{name}")
    else:
        _check_principal(statement, "AWS", principal, f"{where}.Principal")


def _check_principal(statement: Mapping[str, Any], kind: str, value: Any, where: str) -> None:
    if kind != "AWS" and isinstance(value, str):
        return  # a service of AWS or a provider of identities: nobody here is one
    if value == "*" and statement["Effect"] == "Deny":
        return
    if not isinstance(value, str) or not _PRINCIPAL.fullmatch(value):
        raise RefusedInput(
            f"{where}: write whom you trust as an ARN such as arn:aws:iam::111111111111:root (the "
            f"account) or arn:aws:iam::111111111111:user/NAME, not {value!r}"
        )


def _check_members(statement: Any, members: Sequence[str], where: str) -> None:
    if not isinstance(statement, Mapping):
        raise RefusedInput(f"{where} is not an object with {', '.join(members)}")
    if unknown := set(statement) - set(members):
        names = ", ".join(sorted(map(str, unknown)))
        raise RefusedInput(f"{where}: {names} cannot stand here; there are {', '.join(members)}")
    if statement.get("Effect") not in ("Allow", "Deny"):
        raise RefusedInput(f'{where}.Effect is neither "Allow" nor "Deny"')
    if not isinstance(statement.get("Sid", ""), str):
        raise RefusedInput(f"{where}.Sid is not a string")
    if not isinstance(statement.get("Condition", {}), Mapping):
        raise RefusedInput(f"{where}.Condition is not an object")


def as_list(value: Any) -> list[Any]:
    """One pattern, or several."""
    return value if isinstance(value, list) else [value]


def _check_patterns(values: Any, name: str, where: str) -> None:
    for value in as_list(values):
        _check_pattern(value, name, where)
    if not as_list(values):
        raise RefusedInput(f"{where} is empty")


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
