"""What clients ask, checked: bodies by their models, queries, permissions, and pages of lists."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from luthier.api.bodies import CheckedBody
from luthier.api.openai.errors import invalid
from luthier.api.policies import refuse_denied
from luthier.api.wire import Answer, Authorize, Call, Caller
from luthier.store.arns import Arns

METADATA_KEYS = 16


class Body(CheckedBody):
    """A JSON body. Types are as sent, nothing is guessed; members we do not know are passed over."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", allow_inf_nan=False)


Parsed = TypeVar("Parsed", bound=BaseModel)


def body(call: Call, kind: type[Parsed]) -> Parsed:
    """The body of ``call`` as ``kind``.

    Raises:
        Fault: 400, for what is no JSON object and for the first member that is missing or wrong.
    """
    try:
        given = call.json
    except ValueError as error:
        raise invalid(f"The body of the request is not valid JSON: {error}.") from error
    if not isinstance(given, dict):
        raise invalid("The body of the request must be a JSON object.")
    return checked(given, kind)


def checked(given: Mapping[str, Any], kind: type[Parsed], under: str = "") -> Parsed:
    """``given`` as ``kind``; ``under`` is where it stands in the request."""
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        first = _telling(error)
        where = _named([part for part in (under, *first["loc"]) if part != ""])
        if first["type"] == "missing":
            text = f"Missing required parameter: '{where}'."
            raise invalid(text, where, "missing_required_parameter") from error
        message = first["msg"].removeprefix("Value error, ")
        text = f"Invalid value for '{where}': {message[:1].lower()}{message[1:]}."
        raise invalid(text, where or None, "invalid_value") from error


def _telling(error: ValidationError) -> Any:
    """The first error; of a member with alternatives, the one about its value and not its type."""
    found = error.errors(include_url=False)
    same = [each for each in found if each["loc"][:1] == found[0]["loc"][:1]]
    value = [each for each in same if each["type"] not in _ABOUT_TYPES]
    return (value or same)[0]


_ABOUT_TYPES = {"literal_error", "string_type", "int_type", "list_type", "model_type", "dict_type"}


def _named(location: Sequence[str | int]) -> str:
    """``messages[0].content``; names of alternatives that pydantic puts between are left out."""
    text = ""
    for part in location:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part.isidentifier() or not text:
            # The arms of a union are called after types: they are none of the client's members.
            if part in _ARMS or part[:1].isupper():
                continue
            text += f".{part}" if text else part
    return text


_ARMS = {"str", "int", "float", "bool", "list", "dict", "none", "constrained"}


def one_of(name: str, value: str, known: Sequence[str]) -> str:
    """``value``, when it is one of ``known``."""
    if value not in known:
        raise invalid(f"'{value}' is not one of {', '.join(known)}.", name, "invalid_value")
    return value


def _metadata(value: dict[str, str] | None) -> dict[str, str] | None:
    if value is not None and len(value) > METADATA_KEYS:
        raise ValueError(f"at most {METADATA_KEYS} keys are taken")
    for key, text in (value or {}).items():
        if len(key) > 64 or len(text) > 512:
            raise ValueError("keys have at most 64 letters, values 512")
    return value


Metadata = Annotated[dict[str, str] | None, AfterValidator(_metadata)]


def text_of(call: Call, name: str) -> str | None:
    """A member of the query; ``None`` where it is not there."""
    values = call.query.get(name)
    return values[-1] if values else None


def number_of(call: Call, name: str, default: int, most: int) -> int:
    """A whole number of the query, from 1 to ``most``."""
    text = text_of(call, name)
    if text is None:
        return default
    if not text.isascii() or not text.isdigit() or len(text) > 9 or not 1 <= int(text) <= most:
        raise invalid(f"'{name}' must be a whole number from 1 to {most}.", name, "invalid_value")
    return int(text)


def page(found: Sequence[Any], limit: int, shown: Callable[[Any], dict[str, Any]]) -> Answer:
    """A list of at most ``limit``, from rows of which one more was asked for."""
    data = [shown(each) for each in found[:limit]]
    return Answer.of(
        {
            "object": "list",
            "data": data,
            "has_more": len(found) > limit,
            "first_id": data[0]["id"] if data else None,
            "last_id": data[-1]["id"] if data else None,
        }
    )


def seconds(moment: datetime | None) -> int | None:
    """Unix time."""
    return None if moment is None else int(moment.timestamp())


class Access:
    """Asks the policies, by the names of this face."""

    def __init__(self, authorize: Authorize, region: str) -> None:
        self._authorize, self._arns = authorize, Arns(region)

    def to(self, call: Call, action: str, kind: str = "", identifier: str = "") -> None:
        """Whether the caller may do ``openai.<action>``, to one thing or in general.

        Raises:
            Fault: ``AccessDenied``, before anybody looked whether the thing is there.
        """
        resource = "*"
        if kind:
            account = call.caller.account
            resource = self._arns.openai(account, kind, identifier or "*")
        self._authorize(call.caller, f"luthier:openai.{action}", resource)

    def same_as(self, call: Call, operation: str, arn: str) -> None:
        """Refuse who is denied the ``operation`` of Bedrock that comes to the same."""
        refuse_denied(call.caller, f"bedrock:{operation}", arn)

    def to_model(self, caller: Caller, action: str, arn: str) -> None:
        """Whether the caller may have a model answer through this face."""
        self._authorize(caller, f"luthier:openai.{action}", arn)
        self.to_invoke(caller, arn)

    def to_invoke(self, caller: Caller, arn: str) -> None:
        """Whether the caller may have a model answer at all."""
        self._authorize(caller, "bedrock:InvokeModel", arn)
