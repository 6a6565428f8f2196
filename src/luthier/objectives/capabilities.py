"""What an objective can do beyond :class:`~luthier.objectives.base.Objective`.

Each capability is a protocol: an objective has it by defining its methods, and whoever uses it asks
``isinstance(objective, SupportsPacking)`` in the one place that concerns it. In the order of a run:

    SupportsPacking          rows cut and joined to one length
    SupportsHeadStart        a new head that starts from what the network says of the rows
    SupportsPreparation      rows that the network completes before the first step
    SupportsPrecomputation   what is computed once for all rows and kept in files
    SupportsReferenceCache   what the reference model says of rows that are read more than once
    SupportsRollouts         texts that the network writes in the step
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

from luthier.types import Example

if TYPE_CHECKING:
    from pathlib import Path

    from luthier.models.network import Network
    from luthier.objectives.base import Objective


@runtime_checkable
class SupportsPacking(Protocol):
    """Cuts rows to size, so that no row is too long."""

    def pack(self, examples: Sequence[Example], context: int) -> Sequence[Example]:
        """Regroup encoded rows into rows of at most ``context`` tokens, the model's limit."""


@runtime_checkable
class SupportsHeadStart(Protocol):
    """Can set a head that would otherwise start at random."""

    @property
    def starts_head(self) -> bool:
        """Whether it does so with these settings."""

    def start_head(self, network: Network, examples: Sequence[Example], budget: int) -> str:
        """Set a new head by what the network says of the training rows.

        Called as ``prepare`` is and right before it, where the base model has no such head. Returns
        what was done, for people; empty for nothing.
        """


@runtime_checkable
class SupportsPreparation(Protocol):
    """Looks at the training rows with the network before the first step."""

    def prepare(
        self,
        network: Network,
        examples: Sequence[Example],
        budget: int,
        note: Callable[[str], None],
    ) -> Sequence[Example]:
        """The training rows, with what the network at its starting weights adds to them.

        Called without a gradient or dropout, once for each start of a run. A run that goes on calls it
        again before its weights are restored, so it must draw nothing at random and keep the number
        and order of the rows. ``budget`` is the tokens read at once; ``note`` tells people something.
        """


@runtime_checkable
class SupportsPrecomputation(Protocol):
    """Needs something of all rows in every epoch that can be computed once."""

    def precompute(
        self,
        network: Network,
        rows: Iterable[Example],
        budget: int,
        folder: Path,
        note: Callable[[str], None],
    ) -> None:
        """Compute ahead what is needed of all ``rows``, training and held-out ones.

        Called after ``prepare``, likewise without a gradient and once for each start. What is left in
        ``network.cache`` stays there while it trains. Files belong into ``folder`` (not made yet): a
        run that goes on finds them again, and they go when it is done.
        """


@runtime_checkable
class SupportsReferenceCache(Protocol):
    """Compares with the reference model's view of rows, which is the same in every epoch."""

    def with_reference_logps(
        self, network: Network, examples: Sequence[Example], budget: int
    ) -> Sequence[Example]:
        """The rows with the reference model's log-probabilities.

        Called as ``prepare`` is, right before the first step, for training and for validation rows.
        """


@runtime_checkable
class SupportsRollouts(Protocol):
    """Learns from texts that the network writes in the step."""

    @property
    def longest_completion(self) -> int:
        """Tokens that a text it writes may have."""

    def with_longest_completions(self, row: Example) -> list[Example]:
        """The largest that ``row`` can have become by the time the network learns from it."""

    def describe_cost(self, rows: int, measured: int, calibrated: int) -> str:
        """What a run asks of others at most (verdicts of a judge), for people; empty for nothing.

        ``rows`` is how many the steps read in all, ``measured`` those of all measurements, and
        ``calibrated`` those that the adaptation reads before.
        """

    def advise(self, lines: Sequence[Mapping[str, Any]]) -> str:
        """What people should know of the course of a run so far, from its metrics; empty for nothing.

        Asked from time to time; ``lines`` are the records of the last training steps, 200 at most.
        """


def longest_completion(objective: Objective) -> int:
    """Tokens that the network may write to a row in a step of ``objective``."""
    # Every row asks, and to compare with a protocol takes 20 microseconds: once for a class will do.
    kind = type(objective)
    if kind not in _HAS_ROLLOUTS:
        _HAS_ROLLOUTS[kind] = isinstance(objective, SupportsRollouts)
    return cast(SupportsRollouts, objective).longest_completion if _HAS_ROLLOUTS[kind] else 0


_HAS_ROLLOUTS: dict[type, bool] = {}


def with_completions(objective: Objective, rows: Sequence[Example]) -> list[Example]:
    """``rows`` as large as they can become in a step of ``objective``."""
    if not isinstance(objective, SupportsRollouts):
        return list(rows)
    return [larger for row in rows for larger in objective.with_longest_completions(row)]
