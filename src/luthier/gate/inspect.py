"""Run of the data checks, from a request or a job to the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from luthier.data.conversations.chat import ChatFormat
from luthier.data.files.sources import Source
from luthier.data.inputs import PLURAL, MediaKind
from luthier.data.rows import Columns, RowReader
from luthier.data.shapes import SHAPES, describe_shapes
from luthier.data.shapes.media import BareWindow, MediaRow
from luthier.data.shapes.questions import AnsweredQuestion
from luthier.data.shapes.texts import History, LabelledText
from luthier.errors import DownloadError, Problem, RefusedInput
from luthier.gate.check import CheckContext, Split
from luthier.gate.checks import BASE_MISSING, NO_READER, checks_for
from luthier.gate.checks.language import UNSPACED, language_name, main_language
from luthier.gate.policy import load_policy
from luthier.gate.report import Report
from luthier.gate.rules import Finding, Place
from luthier.gate.scan import (
    NO_TEXT,
    ScanProgress,
    inspect_rows,
    inspect_sources,
)
from luthier.library import models as store
from luthier.library.folders import is_base_here
from luthier.models import DEFAULT_BASE, TEXT_ENCODER, WORD_CLASSIFIER
from luthier.models.base_kinds import sole_objective
from luthier.models.catalog import CATALOG, bases_for
from luthier.objectives import OBJECTIVES, Objective
from luthier.objectives.base import check_base, predicts
from luthier.objectives.question_answering import ANSWERING_BASES
from luthier.recipe import DataSpec, Recipe
from luthier.types import Row

LANGUAGE_ROWS = 200
"""Number of rows for language identification."""
AUTO = "auto"
"""Value of ``base`` for the base model that training would choose."""


MEDIA_BASES: Mapping[MediaKind, str] = {
    "image": "efficientnet-lite0",
    "audio": "small-audio-cnn",
    "window": "small-window-vae",
}
"""Base models for images, audio and time series."""


def default_base(rows: Sequence[Row], objective: Objective | None = None) -> tuple[str, str]:
    """Return the base model for the first rows of the data and the reason, if no base is named.

    On Banking77 with 5 rows per intent, a small encoder is right on 77 % of test rows after two
    minutes, and the default decoder on 65 % after fourteen (docs/log/defaults.md). Invalid rows are
    rejected later.
    """
    plain = DEFAULT_BASE, "the default"
    bases = objective.defaults.bases if objective is not None else {}
    if objective is not None and not bases and not predicts(objective):
        return plain
    row = next(iter(rows), None)
    if objective is not None and bases:
        reads = _input_kind(row) if row is not None else ""
        return (
            bases.get(reads, next(iter(bases.values()))),
            f"the default of objective {objective.method}",
        )
    if isinstance(row, MediaRow):
        for kind in OBJECTIVES.values():
            own = kind.defaults.bases.get(_input_kind(row))
            if own and row.shape in kind.shapes:
                return own, f"the default for {describe_shapes([row.shape])}"
        known = MEDIA_BASES[row.media.kind]
        return known, f"the default for {PLURAL[row.media.kind]}"
    if isinstance(row, History):
        return (
            "item-counts",
            "better than an encoder on three sets of histories, and fitted in seconds",
        )
    what = row and SHAPES[row.shape].encoder_targets
    if not what:
        return plain
    words = isinstance(row, LabelledText) and objective is None
    reason = f"an encoder is best for texts with {what}"
    if isinstance(row, AnsweredQuestion):
        reason = f"the smallest encoder, which never learned to answer; {ANSWERING_BASES}"
    return encoder_of_language(main_language(rows), reason, words)


def _input_kind(row: Row) -> str:
    """Return the kind of input; ``columns`` for a series of several columns."""
    several = isinstance(row, BareWindow) and row.media.columns > 1
    return "columns" if several else SHAPES[row.shape].reads


def encoder_of_language(code: str, reason: str, words: bool = False) -> tuple[str, str]:
    """Return the encoder for texts of a language (ISO 639 code), and why; ``reason`` for English.

    Without a local encoder of the language, ``words`` selects hashed words: on Vietnamese topics,
    the English encoder is right on 48.5 % of test rows, and hashed words are right on 79 %
    (docs/log/defaults.md).
    """
    if not code or code in CATALOG[TEXT_ENCODER].languages:
        return TEXT_ENCODER, reason
    language = language_name(code)
    fitting = bases_for(code, "embedding")
    local = [each for each in fitting if is_base_here(each)]
    if local:
        return local[0], f"an encoder trained on {language}"
    missing = f"no local encoder was trained on {language}"
    if fitting:
        missing += f"; `luthier models pull {fitting[0]}` downloads such an encoder"
    if words and code not in UNSPACED:
        return WORD_CLASSIFIER, f"a model of words in any language, because {missing}"
    return TEXT_ENCODER, f"{reason}, but {missing}"


def encoder_of_languages(codes: Sequence[str], reason: str) -> tuple[str, str]:
    """Return the encoder for texts in several languages, the most frequent first, and why."""
    foreign = [code for code in codes if code not in CATALOG[TEXT_ENCODER].languages]
    model, why = encoder_of_language((foreign or [""])[0], reason)
    names = " and ".join(map(language_name, codes))
    return model, f"{why}, for documents in {names}" if len(codes) > 1 else why


@dataclass(frozen=True)
class InspectionRequest:
    """Sources and options of an inspection."""

    data: Source
    """Rows to learn from."""
    validation: Source | None = None
    test: Source | None = None
    columns: Columns | None = None
    """The file's name for each of our keys."""
    base: str | None = AUTO
    """Base model for encoding; ``None`` to skip encoding."""
    objective: str | Mapping[str, Any] | None = None
    """Training objective; ``None`` to choose by the rows."""
    shown: int = 5
    """Number of rows per split that the report shows with tokens."""
    severity: Mapping[str, Any] = field(default_factory=dict)
    """Severities by rule. Overrides ``policy``."""
    policy: Path | None = None
    skip: Sequence[str] = ()
    """Names of checks to omit."""
    chat_template: str | None = None
    """Chat template in place of the base model's: ``chatml``, or a Jinja file."""

    @property
    def sources(self) -> dict[Split, Source]:
        """Sources of the rows by split."""
        named = {"train": self.data, "validation": self.validation, "test": self.test}
        return {split: source for split, source in named.items() if source is not None}


def inspect(
    request: InspectionRequest,
    on_stage: Callable[[str], None] = lambda text: None,
    progress: Callable[[ScanProgress], None] = lambda _: None,
    processes: int = 1,
) -> Report:
    """Run every check over every row, with up to ``processes`` worker processes for large sources.

    If the default base model cannot be downloaded, the rows are not encoded and the report has a
    warning.

    Raises:
        RecipeError: unknown objective, rule or check, or a base model that cannot learn the
            objective.
        UnknownModel, DownloadError: the given base model is unavailable.
    """
    policy = load_policy(request.policy, request.severity, request.skip)
    known, missing, base = CheckContext(shown=request.shown), "", request.base
    if base == AUTO:
        base = DEFAULT_BASE
        with suppress(RefusedInput):  # inspect_sources reports the reason
            reader = RowReader(request.data, request.columns)
            rows = reader.first(LANGUAGE_ROWS)
            base = default_base(rows, parse_objective(request.objective))[0]
    if base is not None:
        try:
            known = load_context(
                base, request.objective, request.shown, on_stage, request.chat_template
            )
        except DownloadError as error:
            if request.base not in (AUTO, DEFAULT_BASE):
                raise
            missing = str(error)
    checks, left_out = checks_for(known, policy.skip)
    place = Place(str(request.data), 0)
    extra = [Finding(BASE_MISSING, place, missing)] if missing else []
    report = inspect_sources(
        request.sources, checks, policy.severity, request.columns, progress, processes, extra
    )
    is_used = known.chat and any(report.rows.values()) and "learning" not in report.left_out
    if report.left_out:  # where no row has a text, no base would help
        left_out = {n: NO_TEXT if why == NO_READER else why for n, why in left_out.items()}
    left_out = {**left_out, **report.left_out}
    return replace(
        report,
        base=base if is_used else None,
        chat_template=request.chat_template,
        left_out=left_out,
        columns=request.columns or {},
    )


def parse_objective(objective: str | Mapping[str, Any] | None) -> Objective | None:
    """The objective of a name, or of a table of ``method`` and fields."""
    fields: dict[str, Any] = {"data": {"train": "-"}}
    return Recipe.parse(fields | ({"objective": objective} if objective else {})).objective


def load_context(
    base: str,
    objective: str | Mapping[str, Any] | None = None,
    shown: int = 5,
    on_stage: Callable[[str], None] = lambda text: None,
    chat_template: str | None = None,
) -> CheckContext:
    """Return format, context length and objective of a base model; download a missing base."""
    chosen = parse_objective(objective)
    stored = store.find(base, on_stage)
    chat, room = stored.chat.with_chat_template(chat_template), stored.room
    if chosen is None and (own := sole_objective(stored.kind)) is not None:
        chosen = OBJECTIVES[own].model_validate({})
    if chosen is not None:
        check_base(chosen, chat)
    return CheckContext(chat, chosen, room, shown)


def inspect_job(
    spec: DataSpec,
    splits: Mapping[Split, Sequence[Row]],
    objective: Objective,
    chat: ChatFormat | None = None,
    on_row: Callable[[int, int], None] = lambda done, count: None,
    warnings: Sequence[Problem] = (),
) -> Report:
    """Run the checks of a job over the rows. Encoding reports separate findings.

    Args:
        on_row: called with the number of processed rows and the total.
        warnings: warnings of the reader.

    Raises:
        RecipeError: invalid policy or severity.
    """
    policy = load_policy(spec.policy, spec.severity or {})
    checks, left_out = checks_for(CheckContext(chat, objective, in_job=True), policy.skip)
    report = inspect_rows(splits, checks, policy.severity, on_row, warnings)
    named = {"train": spec.train, "validation": spec.validation}
    sources = {split: source for split, source in named.items() if source}
    left_out = {**left_out, **report.left_out}
    return replace(report, left_out=left_out, sources=sources, columns=spec.columns or {})
