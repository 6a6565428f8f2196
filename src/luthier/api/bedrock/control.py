"""What the operations of the control plane work with, and how each of them is called."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from luthier.api.bedrock.activation import Activation
from luthier.api.bedrock.messages import answer_of, members_of
from luthier.api.bedrock.operations import Operation
from luthier.api.wire import Answer, Authorize, Call, Fault
from luthier.limits import AccountQuotas
from luthier.store.arns import Arn, Arns
from luthier.store.custom_models import CustomModel
from luthier.store.database import Database
from luthier.store.idempotency import Attempt, recall, remember
from luthier.store.tags import TooManyTags

TOKEN = "clientRequestToken"  # noqa: S105  (the name of a member)
_ATTEMPTS = 3


class ChecksLocations(Protocol):
    """Knows what addresses an account may name."""

    def check(self, account: str, uri: str) -> None:
        """Raise :class:`~luthier.errors.RefusedInput` unless data there can be read."""

    def folder(self, account: str, uri: str) -> Sequence[tuple[str, int]]:
        """Names and sizes of the files right below a folder; raises the same where there is none."""

    def check_writable(self, account: str, uri: str) -> None:
        """Raise the same unless files can be written below it."""


def no_graders(account: str, function: str) -> Mapping[str, Any] | None:
    """Where no Lambda graders are registered."""
    return None


def default_quotas(account: str) -> AccountQuotas:
    """The same for everybody."""
    return AccountQuotas()


@dataclass(frozen=True)
class Control:
    """The parts of the server that its control plane stands on."""

    database: Database
    arns: Arns
    locations: ChecksLocations
    authorize: Authorize
    secret: bytes = field(repr=False)
    """Kept by the server; tokens of lists are signed with it."""
    activation: Activation
    delete_model: Callable[[str, CustomModel], None]
    """Deletes a model of an account, wherever it is; raises :class:`~luthier.errors.WrongState` where
    it is in use."""
    grader: Callable[[str, str], Mapping[str, Any] | None] = no_graders
    """Method and fields of the grader behind the ARN of a Lambda function, for an account."""
    quotas: Callable[[str], AccountQuotas] = default_quotas
    """Of an account."""
    submitted: Callable[[], None] = lambda: None
    """Told that there is a new job."""
    import_asked: Callable[[], None] = lambda: None
    """Told that a model from outside was asked for."""


@dataclass(frozen=True)
class Request:
    """One request to the control plane, checked for form."""

    control: Control
    operation: Operation
    call: Call
    members: Mapping[str, Any]

    @property
    def account(self) -> str:
        """Whose resources it is about."""
        return self.call.caller.account

    @property
    def arns(self) -> Arns:
        """Of this server."""
        return self.control.arns

    def __getitem__(self, name: str) -> Any:
        return self.members[name]

    def get(self, name: str, default: Any = None) -> Any:
        """A member that may be absent."""
        return self.members.get(name, default)

    def allow(self, resource: str, shown: str | None = None) -> None:
        """Raise :class:`Fault` unless the caller may do this to ``resource``.

        A refusal names ``shown``: who asked by a name learns no ARN from it, nor whether there is one.
        """
        try:
            self.control.authorize(self.call.caller, f"bedrock:{self.operation.name}", resource)
        except Fault as fault:
            if shown is None or shown == resource:
                raise
            told = fault.message.replace(resource, shown)
            raise Fault(fault.code, told) from None

    def allow_kind(self, kind: str) -> None:
        """The same for making something."""
        self.allow(self.arns.of(self.account, kind, "*"))

    def replayed(self) -> dict[str, Any] | None:
        """The answer to an earlier sending of this request, before anything is looked at."""
        attempt = self._attempt()
        if attempt is None:
            return None
        with self.control.database.read() as session:
            return recall(session, attempt)

    def once(self, make: Callable[[Session], dict[str, Any]]) -> dict[str, Any]:
        """Make something in one transaction, once for each token of the client.

        Who loses a race for a name tries again, and is told that the name is in use.
        """
        attempt = self._attempt()
        for left in range(_ATTEMPTS - 1, -1, -1):
            try:
                with self.control.database.write() as session:
                    answer = recall(session, attempt) if attempt else None
                    if answer is None:
                        answer = make(session)
                        if attempt:
                            remember(session, attempt, answer)
                return answer
            except IntegrityError:
                if not left:
                    raise
        raise AssertionError("unreachable")

    def _attempt(self) -> Attempt | None:
        token = self.get(TOKEN)
        if token is None:
            return None
        asked = {name: value for name, value in self.members.items() if name != TOKEN}
        return Attempt.of(self.account, self.operation.name, token, asked)


Operate = Callable[[Request], Mapping[str, Any]]
"""Carries out one operation: members of its answer by name."""


def handler(control: Control, operation: Operation, operate: Operate) -> Callable[[Call], Answer]:
    """What the face calls for ``operation``."""

    def handle(call: Call) -> Answer:
        request = Request(control, operation, call, members_of(operation, call))
        try:
            return answer_of(operation, operate(request))
        except TooManyTags as error:
            raise Fault("TooManyTags", str(error), resourceName=error.resource) from error

    return handle


def tags_of(given: Iterable[Mapping[str, str]] | None) -> dict[str, str]:
    """Values by key.

    Raises:
        Fault: Validation, for a key that comes twice or belongs to AWS.
    """
    found: dict[str, str] = {}
    for tag in given or ():
        key = tag["key"]
        if key in found:
            raise Fault("Validation", f"The tag key {key} is given more than once.")
        if key.lower().startswith("aws:"):
            raise Fault("Validation", "Tag keys must not begin with aws:, which is reserved.")
        found[key] = tag["value"]
    return found


def not_found(kind: str, identifier: str) -> Fault:
    """The answer for what is not there, and for what belongs to somebody else."""
    return Fault("ResourceNotFound", f"Could not find {kind} {identifier}.")


def shown_as(request: Request, kind: str, identifier: str) -> str:
    """The ARN that a policy decides on for an identifier that names nothing of the account."""
    arn = Arn.parse(identifier)
    return str(arn) if arn else request.arns.of(request.account, kind, identifier)
