"""Checks of a new evaluation or comparison, so that a wrong request fails at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from luthier.errors import DataError, RecipeError
from luthier.server.jobs.data import base_reads_media, peek_rows
from luthier.server.jobs.submit import check_client_grader
from luthier.server.stores.locations import Locations
from luthier.server.tables.measurements import EVALUATION, MeasuredModel

if TYPE_CHECKING:
    from luthier.graders import Grader


def graders_of(request: Mapping[str, Any]) -> dict[str, Grader] | None:
    """Return the graders of a request by name; ``None`` for the default.

    Raises:
        RecipeError: for a grader that clients may not define, or for wrong fields.
    """
    from luthier.graders import parse_graders

    sent = request.get("graders")
    if not sent:
        return None
    named = sent if isinstance(sent, Mapping) else {name: name for name in sent}
    return parse_graders({name: check_client_grader(each) for name, each in named.items()})


def learned_columns(model: MeasuredModel) -> dict[str, str]:
    """Return the column names of the model's training rows by key."""
    from luthier.library.models import describe

    recipe = describe(model["stored_id"]).manifest.recipe or {}
    return recipe.get("data", {}).get("columns") or {}


def columns_of(
    locations: Locations, account: str, columns: dict[str, str], address: str
) -> dict[str, str]:
    """Return ``columns``, learned by a model, if the rows at ``address`` have the columns."""
    wanted = {name for name in columns.values() if name}
    if not wanted:
        return {}
    records = peek_rows(locations, account, address).records
    return columns if records and wanted <= records[0].keys() else {}


def check_measurement(
    locations: Locations,
    account: str,
    kind: str,
    request: Mapping[str, Any],
    models: Sequence[MeasuredModel],
) -> None:
    """Check graders, addresses, and the first rows.

    Raises:
        RefusedInput: for a measurement that would fail.
    """
    # These modules import all objectives, which would delay the start of the server.
    from luthier.data.prompts import PromptChecker
    from luthier.data.rows import Checker
    from luthier.data.unread import UNREAD
    from luthier.evaluation.evaluate import check, check_shapes
    from luthier.gate.policy import GatePolicy
    from luthier.library.models import describe
    from luthier.workflows.compare import check_models
    from luthier.workflows.evaluate import SLICES
    from luthier.workflows.prompting import questions_of

    graders = graders_of(request) or {}
    stored = [describe(each["stored_id"]) for each in models]
    if kind != EVALUATION:
        check_models(stored[-1], stored[:-1], bool(request.get("training")))
        stored = stored[:-1]
    addresses = [request["rows"], *filter(None, [request.get("training")])]
    for address in addresses:
        locations.check(account, address)
    if any(base_reads_media(each["stored_id"]) for each in models):
        return  # rows name files, which only the measurement fetches
    prompts = kind == EVALUATION and any(each.grades_prompts for each in graders.values())
    checker = PromptChecker if prompts else Checker
    # Columns that no key is read from may be columns of slices.
    policy = GatePolicy({**GatePolicy().severity, UNREAD: "off"})
    peeked = [
        peek_rows(locations, account, each, request["columns"], checker, policy=policy)
        for each in addresses
    ]
    if problems := [problem for each in peeked for problem in each.problems]:
        raise DataError(problems)
    if not (rows := peeked[0].rows):
        return  # the reader needs the whole file
    try:
        for each in stored:
            if kind == EVALUATION or not each.writes:
                check_shapes(rows, each.objective)
            else:
                questions_of(rows)
            if kind == EVALUATION and each.writes and graders:
                check(rows, graders)
    except DataError as error:
        # The rows were read from a copy.
        named = [problem.at(peeked[0].address, problem.line) for problem in error.problems]
        raise DataError(named) from error
    for by in request.get("slices", ()):
        if by not in SLICES and not any(by in each for each in peeked[0].records):
            text = f"No row has the column {by!r}. Use {', '.join(SLICES)} or a column of the rows."
            raise RecipeError(text, setting="slices")
