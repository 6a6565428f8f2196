"""Loading, checking, splitting and encoding of the rows of a run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from luthier.data.augmentation import Augmentation
from luthier.data.conversations.chat import ChatFormat
from luthier.data.disk_sequence import concatenate, select, spool
from luthier.data.inputs import PLURAL
from luthier.data.loader import MixedSet
from luthier.data.prompts import PromptChecker
from luthier.data.rows import Checker, Recognition, RowReader
from luthier.data.shapes import SHAPES, describe_shapes
from luthier.data.shapes.media import MediaRow
from luthier.data.shapes.passages import CitedAnswer, decline_some
from luthier.data.splitting import split_rows, strata_of
from luthier.engine.defaults import Choice, validation_share
from luthier.errors import DataError, RecipeError, RowRefused
from luthier.evaluation.baselines import MOST_ROWS, ComparedRows
from luthier.files import sha256_of
from luthier.formatting import list_some
from luthier.gate.encode import RowEncoder, check_shapes
from luthier.gate.inspect import inspect_job
from luthier.gate.policy import load_policy
from luthier.gate.report import Report, refusals
from luthier.gate.row_keys import group_related
from luthier.models.manifest import LossMask
from luthier.objectives import OBJECTIVES, Objective
from luthier.objectives.base import check_base, predicts
from luthier.objectives.by_shape import objective_for
from luthier.recipe import DataSpec
from luthier.types import Example, IntArray, Row


@dataclass(frozen=True)
class Dataset:
    """The encoded rows of a run, with the origin of the rows."""

    objective: Objective
    """The objective of the recipe, or the default for the shape of the rows."""
    train: Sequence[Example]
    validation: Sequence[Example]
    longest: int
    """Length of the longest training row, in tokens."""
    hashes: dict[str, str]
    """SHA-256 of each file by path, and one SHA-256 of all media files named in rows."""
    choices: list[Choice]
    dropped: int = 0
    truncated: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    mask: LossMask | None = None
    mixed: tuple[MixedSet, ...] = ()
    """Sizes of the mixed-in sets, stored after the main set in ``train``."""
    report: Report | None = None
    """Report of the data check; ``None`` if the check was skipped."""
    recognized: Recognition | None = None
    """Detected format and columns of the main source."""
    compared: tuple[ComparedRows, ComparedRows] = (ComparedRows(), ComparedRows())
    """Training and held-out rows for the baselines."""
    held_out: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    """Line numbers excluded from training, by split (``validation``, ``test``) and file."""
    learned: Sequence[Row] = ()
    """The rows of ``train``, in order, if the rows have baselines."""
    shown: Sequence[Row] = ()
    """Held-out rows with a prompt and a reply, for replies during training."""

    @property
    def main(self) -> int:
        """Number of training examples of the main file."""
        return len(self.train) - sum(each.rows for each in self.mixed)

    def with_label_issues(self, likely: LikelyLabels, chat: ChatFormat, relabel: bool) -> Dataset:
        """Return the rows without the rows of ``likely``; with ``relabel``, with the likely labels.

        ``likely`` may have rows that are held out, which do not change.
        """
        train, mixed = list[Example](), [replace(each, rows=0) for each in self.mixed]
        ends = np.cumsum([self.main, *(each.rows for each in self.mixed)])
        for place, (row, example) in enumerate(zip(self.learned, self.train, strict=True)):
            label = likely.get((row.file, row.line))
            if label is not None:
                if not relabel:
                    continue
                # Each labelled shape has a field `label`, which their base class does not declare.
                new: dict[str, Any] = {"label": label}
                changed = self.objective.encode(replace(row, **new), example.row, chat)
                if len(changed) > len(example):
                    changed = self.objective.truncate(changed, len(example))
                example = changed
            train.append(example)
            if (part := int(np.searchsorted(ends, place, "right"))) > 0:
                mixed[part - 1] = replace(mixed[part - 1], rows=mixed[part - 1].rows + 1)
        counts = {**self.counts, **_count(self.objective, train), "examples": len(train)}
        main = len(train) - sum(each.rows for each in mixed)
        mixed = [replace(m, drawn=max(1, round(m.drawn * main / self.main))) for m in mixed]
        return replace(self, train=train, mixed=tuple(mixed), counts=counts, learned=())

    def mix_record(self, spec: DataSpec) -> list[dict[str, Any]]:
        """Return the manifest's record of the mixed-in sets: file, weight, rows, and rows per pass."""
        pairs = zip(spec.mix, self.mixed, strict=True)
        return [{**each.model_dump(mode="json"), **asdict(sizes)} for each, sizes in pairs]


LikelyLabels = Mapping[tuple[str, int], str]
"""Likely label of rows with a label issue, by file and line."""
DECLINE_SHARE = 0.1
"""Share of declining answers among rows with passages."""
SHOWN_ROWS, SHOWN_CHARACTERS = 3, 2000
"""Number of rows with replies during training, and the maximum length of their prompts."""
FIRST_ROWS = 200
"""Number of rows per source to check before a base model is chosen and loaded."""


class OpenedData:
    """The row sources of a recipe. Each source is opened once: the first rows are checked early."""

    def __init__(self, spec: DataSpec, objective: Objective | None) -> None:
        """Find the files of ``spec``.

        Raises:
            DataError: for a source without files.
        """
        self.checker = checker_for(objective)
        opened = partial(RowReader, columns=spec.columns, checker=self.checker)
        self.train = opened(spec.train, group_column=spec.group_column)
        further = partial(opened, accepts_own_keys=True)
        self.validation = further(spec.validation) if spec.validation else None
        self.mix = [further(each.train) for each in spec.mix]
        self._policy = load_policy(spec.policy, spec.severity or {})

    @property
    def readers(self) -> list[RowReader]:
        """Readers of the training, validation and mixed-in rows."""
        return [self.train, *([self.validation] if self.validation else []), *self.mix]

    def check(self, objective: Objective | None = None, chat: ChatFormat | None = None) -> None:
        """Check the first rows of each source.

        Args:
            objective: if given with ``chat``, the first rows must suit the objective.
            chat: the chat format of the base model.

        Raises:
            DataError: with every problem of a source, or with the first rows that the objective
                cannot use.
        """
        for reader in self.readers:
            reader.first(FIRST_ROWS)
            if reader.problems:
                # Read on, so that the error lists every problem of the source.
                reader.read_all()
            if refused := self._policy.refused_columns(reader):
                raise DataError(refused)
        if objective is not None and chat is not None:
            train, further = self.train.first(FIRST_ROWS), [r.first(FIRST_ROWS) for r in self.mix]
            validation = self.validation.first(FIRST_ROWS) if self.validation else ()
            check_shapes(train, validation, concatenate(further), objective, chat)


def prepare(
    spec: DataSpec,
    objective: Objective | None,
    chat: ChatFormat,
    context: int,
    seed: int,
    on_progress: Callable[[int, int], None] | None = None,
    refit: bool = False,
    on_row: Callable[[int, int], None] = lambda done, count: None,
    data: OpenedData | None = None,
    vocabulary: int | None = None,
) -> Dataset:
    """Read, check, split and encode the rows of a recipe.

    Args:
        spec: the data settings.
        objective: the objective; ``None`` selects the default for the rows.
        chat: the chat format of the base model.
        context: maximum number of tokens of a row.
        seed: random seed of the split.
        on_progress: function that receives the bytes read and the total bytes.
        refit: whether to train on the validation rows too. Test rows stay held out.
        on_row: function that receives the number of checked rows and the total.
        data: the opened row sources, if opened already.
        vocabulary: number of embeddings of the base model, if known.

    Raises:
        DataError: with every problem of the rows.
    """
    # The base model may have decided the objective after the sources were opened.
    if data is None or data.checker is not checker_for(objective):
        data = OpenedData(spec, objective)
    data.train.on_progress = on_progress
    checked = _check_rows(spec, objective, chat, data, on_row)
    context = checked.objective.task.row_limit(checked.objective.format(chat), context)
    parts = _split_rows(spec, checked, chat, data.train.group_of, seed, refit)
    return _encode_rows(spec, checked, parts, chat, context, seed, vocabulary)


@dataclass(frozen=True)
class CheckedRows:
    """The rows of all sources, with the report of the data check."""

    objective: Objective
    rows: Sequence[Row]
    held: Sequence[Row]
    """Rows of the validation file."""
    mixed: list[Sequence[Row]]
    report: Report
    recognized: Recognition | None
    choices: list[Choice]


@dataclass(frozen=True)
class SplitRows:
    """Training and held-out rows, with the objective that fits the training rows."""

    objective: Objective
    rows: Sequence[Row]
    held: Sequence[Row]
    held_out: dict[str, dict[str, list[int]]]
    """Line numbers excluded from training, by split and file."""
    choices: list[Choice]


def _check_rows(
    spec: DataSpec,
    objective: Objective | None,
    chat: ChatFormat,
    data: OpenedData,
    on_row: Callable[[int, int], None],
) -> CheckedRows:
    """Read whole files and check the rows, before a held-out part is split off."""
    rows = data.train.read_all()
    held = [] if data.validation is None else data.validation.read_all()
    mixed = [each.read_all() for each in data.mix]
    choices: list[Choice] = []
    if objective is None:
        objective = objective_for(rows[0], chat)
        choices.append(
            ("objective", objective.method, f"the rows are {describe_shapes([rows[0].shape])}")
        )
    check_base(objective, chat)
    check_shapes(rows, held, concatenate(mixed), objective, chat)
    try:
        # One check for the source: every row would fail in the same way.
        chat.check_input_kind(SHAPES[rows[0].shape].reads)
    except RowRefused as bad:
        raise DataError([bad.at(rows[0].file, rows[0].line)]) from bad
    if spec.augmentation:
        check_augmentation(spec.augmentation, objective, chat)
    splits = {"train": concatenate([rows, *mixed]), "validation": held}
    filled = {name: each for name, each in splits.items() if each}
    doubts = [each for one in data.readers for each in one.warnings]
    report = inspect_job(spec, filled, objective, chat, on_row, doubts)
    rows, held, *mixed = [objective.regroup(each) for each in (rows, held, *mixed)]
    if not rows:
        raise DataError(refusals(report)[0])
    return CheckedRows(objective, rows, held, mixed, report, data.train.recognition, choices)


def _split_rows(
    spec: DataSpec,
    checked: CheckedRows,
    chat: ChatFormat,
    group_of: Mapping[tuple[str, int], str],
    seed: int,
    refit: bool,
) -> SplitRows:
    """Split off the held-out rows and fit the objective to the training rows."""
    choices = [*checked.choices]
    rows = checked.rows
    if isinstance(rows[0], CitedAnswer):
        share = DECLINE_SHARE if spec.decline_share is None else spec.decline_share
        rows, count = decline_some(rows, share, seed)
        reason = f"{count:,} of {len(rows):,} rows get passages without the answer, and decline"
        choices.append(("data.decline_share", share, reason))
    rows, chosen, tested = _split(spec, rows, group_of, seed, choices, refit)
    if spec.train_share is not None and spec.train_share < 1:
        # With one seed, the rows of a smaller share are among the rows of a larger share.
        left_out = [1 - spec.train_share]
        part_N, _ = split_rows(strata_of(rows), group_related(rows), left_out, seed)
        rows = select(rows, part_N)
    held_out = {"validation": _lines(chosen), "test": _lines(tested)}
    try:
        objective = checked.objective.fit(concatenate([rows, *checked.mixed]), chat)
    except RowRefused as bad:
        raise DataError([bad.at(str(spec.train), 0)]) from bad
    choices += [
        (f"objective.{name}", list_some(value, 8) if _is_names(value) else True, "the rows say so")
        for name, value in objective
        if (value is True or _is_names(value)) and getattr(checked.objective, name) is None
    ]
    held = checked.held if spec.validation else chosen
    lines = {name: each for name, each in held_out.items() if each}
    return SplitRows(objective, rows, held, lines, choices)


def _is_names(value: object) -> bool:
    return isinstance(value, tuple) and all(isinstance(each, str) for each in value)


def _encode_rows(
    spec: DataSpec,
    checked: CheckedRows,
    parts: SplitRows,
    chat: ChatFormat,
    context: int,
    seed: int,
    vocabulary: int | None,
) -> Dataset:
    """Encode, pack and mix the rows.

    Raises:
        DataError: with every problem of the rows.
    """
    objective, rows, mixed_rows, choices = parts.objective, parts.rows, checked.mixed, parts.choices
    encoder = RowEncoder(objective, chat, vocabulary=vocabulary)
    long_rows = objective.long_rows(spec.long_rows)
    encode = partial(encoder.encode_all, context=context, long_rows=long_rows)
    sets, validation = [encode(each) for each in (rows, *mixed_rows)], encode(parts.held)
    if encoder.truncated and spec.long_rows is None:
        choices.append(("data.long_rows", long_rows, f"the default of {objective.method}"))
    refused, capped = refusals(checked.report)
    if problems := [*encoder.problems, *refused]:
        raise DataError(problems, capped=capped)
    encoded = concatenate(sets)
    counts = {**_count(objective, encoded), "validation_rows": len(validation)}
    answers, is_comparable = predicts(objective), objective.task.is_comparable
    learned = concatenate(map(_rows_of, (rows, *mixed_rows), sets)) if answers else ()
    compared = (
        ComparedRows.of(learned, encoded if answers else (), is_comparable, seed),
        ComparedRows.of(
            _rows_of(parts.held, validation), validation, is_comparable, seed, MOST_ROWS // 5
        ),
    )
    # After the baselines took their rows: packing joins rows into one example.
    sets = [objective.pack(each, context) if each else [] for each in sets]
    validation = objective.pack(validation, context) if validation else []
    train, mixed = _mix(spec, sets)
    choices += _shares(spec, mixed, len(train) - sum(each.rows for each in mixed))
    return Dataset(
        objective=objective,
        train=train,
        validation=validation,
        longest=max(view.tokens for view in _sequences(objective, train))
        + objective.completions[1],
        hashes={str(path): sha256_of(path) for path in spec.files}
        | _hash_named_media(spec, chain(rows, parts.held, *mixed_rows)),
        choices=choices,
        dropped=encoder.dropped,
        truncated=encoder.truncated,
        counts={**counts, "examples": len(train)},
        mask=(loss_mask(_sequences(objective, encoded), chat) if objective.task.writes else None),
        mixed=mixed,
        report=checked.report,
        recognized=checked.recognized,
        compared=compared,
        held_out=parts.held_out,
        learned=learned,
        # Of other tasks, no row has a reply, and the search would read all held-out rows again.
        shown=(
            [*islice(filter(_can_show, parts.held), SHOWN_ROWS)] if objective.task.writes else ()
        ),
    )


def _can_show(row: Row) -> bool:
    """Return true for a row with a reply to a short prompt of text, without tools."""
    turns = row.prompt_turns()
    if not turns or row.images or row.tools or row.expected_reply() is None:
        return False
    return sum(len(turn.content) for turn in turns) <= SHOWN_CHARACTERS


def _sequences(objective: Objective, examples: Iterable[Example]) -> Iterator[Example]:
    """Yield every input sequence of the network for ``examples``."""
    return chain.from_iterable(objective.views([example]) for example in examples)


def _count(objective: Objective, examples: Sequence[Example]) -> dict[str, int]:
    """Return the number of rows, tokens and learned tokens of ``examples``."""
    counts = {"rows": len(examples), "tokens": 0, "learned_tokens": 0}
    for view in _sequences(objective, examples):
        counts["tokens"] += view.tokens
        counts["learned_tokens"] += int(np.count_nonzero(view.weight_T))
    return counts


def _rows_of(rows: Sequence[Row], examples: Sequence[Example]) -> Sequence[Row]:
    return select(rows, np.fromiter((e.row for e in examples), np.int64, len(examples)))


NAMED_MEDIA = "images and sounds that rows name"


def _hash_named_media(spec: DataSpec, rows: Iterable[Row]) -> dict[str, str]:
    """Return one SHA-256 of all media files named in rows, outside the hashed folders and archives."""
    files = spec.files
    named = {
        row.media.digest()
        for row in rows
        if isinstance(row, MediaRow)
        and row.media.path is not None
        and not any(Path(row.media.path).is_relative_to(path) for path in files)
    }
    if not named:
        return {}
    return {NAMED_MEDIA: hashlib.sha256("\n".join(sorted(named)).encode()).hexdigest()}


def _split(
    spec: DataSpec,
    rows: Sequence[Row],
    group_of: Mapping[tuple[str, int], str],
    seed: int,
    choices: list[Choice],
    refit: bool,
) -> list[Sequence[Row]]:
    """Split ``rows`` into training, validation and test rows. A default share is added to
    ``choices``.

    The split is stratified by label, and near-duplicates stay in one part. With
    ``data.group_column``, all rows of one value (``group_of``) stay in one part. ``refit`` returns
    the validation rows to the training rows, in file order.
    """
    share, reason = (0.0, "") if spec.validation else (spec.validation_share, "")
    if share is None:
        share, reason = validation_share(len(rows))
        choices.append(("data.validation_share", round(share, 4), reason))
    shares = [share, spec.test_share or 0.0]
    if not any(shares) or len(rows) < 2:
        return [rows, [], []]
    if spec.group_column is None:
        train_N, held_N, test_N = split_rows(strata_of(rows), group_related(rows), shares, seed)
    else:
        values = [group_of[row.file, row.line] for row in rows]
        train_N, held_N, test_N = _split_groups(spec.group_column, values, rows, shares, seed)
        apart = len({values[row] for part_N in (held_N, test_N) for row in part_N.tolist()})
        reason = f"held out: {apart} of its {len({*values}):,} values, each with all its rows"
        choices.append(("data.group_column", spec.group_column, reason))
    if refit:
        # File order: a refit of all steps then has the bits of a run without held-out rows.
        train_N, held_N = np.sort(np.concatenate([train_N, held_N])), held_N[:0]
    return [select(rows, part_N) for part_N in (train_N, held_N, test_N)]


MOST_DRAWS = 100
"""Maximum number of random group splits until each label is in the training rows."""


def _split_groups(
    column: str, values: Sequence[str], rows: Sequence[Row], shares: Sequence[float], seed: int
) -> list[IntArray]:
    """Split whole groups as :func:`split_rows` does, with every label in the training rows.

    Raises:
        RecipeError: if no split is found.
    """
    if len({*values}) <= sum(share > 0 for share in shares):
        raise RecipeError(
            f"data.group_column={column} has {len({*values})} values, too few for training and "
            "held-out rows. Remove the setting, or name a column with more values"
        )
    groups_N, strata = group_related(rows, values), strata_of(rows)
    for draw in range(MOST_DRAWS):
        # Groups contain several labels, so the labels are not stratified but checked below.
        parts = split_rows([""] * len(rows), groups_N, shares, seed + draw * 1_000_003)
        learned = {strata[row] for row in parts[0].tolist()}
        if learned == {*strata} and all(
            len(part_N) for part_N, share in zip(parts[1:], shares, strict=True) if share
        ):
            return parts
    raise RecipeError(
        f"whole values of data.group_column={column} cannot be held out: a label would be "
        "missing in training. Add groups of each label, remove the setting, or give rows with "
        "`data.validation`"
    )


def loss_mask(examples: Iterable[Example], chat: ChatFormat) -> LossMask | None:
    """Return the record of the trained tokens; ``None`` if no example has tokens as targets."""
    digest, opening_K = hashlib.sha256(), chat.reply_opening()
    stretches = behind = stopped = 0
    for each in examples:
        if each.target is not None or each.media is not None or not each.weight_T.any():
            continue
        digest.update(each.ids_T.tobytes())
        digest.update(each.weight_T.tobytes())
        edge_E = np.flatnonzero(np.diff(each.weight_T != 0, prepend=False, append=False))
        # Edges alternate: start and end of each stretch of trained tokens.
        for start, end in edge_E.reshape(-1, 2).tolist():
            stretches += 1
            before_K = each.ids_T[max(0, start - len(opening_K)) : start]
            behind += np.array_equal(before_K, opening_K)
            stopped += int(each.ids_T[end - 1]) in chat.stop_ids
    if not stretches:
        return None
    return LossMask(
        sha256=digest.hexdigest(), stretches=stretches, behind_opening=behind, with_stop=stopped
    )


def _lines(rows: Sequence[Row]) -> dict[str, list[int]]:
    lines_by_file: dict[str, set[int]] = {}
    for row in rows:
        lines_by_file.setdefault(row.file, set()).add(row.line)
    return {file: sorted(lines) for file, lines in lines_by_file.items()}


def _mix(
    spec: DataSpec, sets: Sequence[Sequence[Example]]
) -> tuple[Sequence[Example], tuple[MixedSet, ...]]:
    """Return all examples with the main set first, and the number of rows per pass for each
    mixed-in set."""
    files = [spec.train, *(each.train for each in spec.mix)]
    for path, examples in zip(files, sets, strict=True):
        if not examples:
            raise RecipeError(f"{path} has no training rows left")
    parts, mixed = [sets[0]], list[MixedSet]()
    after = max(example.row for example in sets[0]) + 1
    for each, examples in zip(spec.mix, sets[1:], strict=True):
        drawn = round(each.weight * len(sets[0]))
        if not drawn:
            raise RecipeError(
                f"data.mix: a weight of {each.weight:g} is less than one row of {each.train} per "
                f"epoch over the {len(sets[0])} rows of {spec.train}. Use {1 / len(sets[0]):.2g} "
                "or more",
                rule="data.mix_too_small",
            )
        mixed.append(MixedSet(len(examples), drawn))
        parts.append(spool(replace(e, row=after + number) for number, e in enumerate(examples)))
        after += len(examples)
    return concatenate(parts), tuple(mixed)


def _shares(spec: DataSpec, mixed: Sequence[MixedSet], main: int) -> list[Choice]:
    """Return the mixing ratios as settings to report."""
    name = Path(spec.train).name
    return [
        (
            f"data.mix {Path(each.train).name}",
            f"{sizes.drawn} of {sizes.rows}",
            f"rows beside each pass over the {main} of {name}: {each.weight:g} for each",
        )
        for each, sizes in zip(spec.mix, mixed, strict=True)
    ]


def check_augmentation(augmentation: Augmentation, objective: Objective, chat: ChatFormat) -> None:
    """Reject changes of other inputs than the model's, or that the objective does not allow."""
    if other := sorted(augmentation.kinds - {chat.reads}):
        raise RecipeError(
            f"data.augmentation has settings for {' and '.join(PLURAL[kind] for kind in other)}; "
            f"the base model takes {PLURAL[chat.reads]} as input. Remove the settings",
            rule="data.augmentation",
        )
    if not objective.allows_augmentation:
        able = [name for name, kind in OBJECTIVES.items() if kind.allows_augmentation]
        raise RecipeError(
            f"data.augmentation is not supported by {objective.method}, only by "
            f"{', '.join(able)}. Remove the setting",
            rule="data.augmentation",
        )
    if "text" in augmentation.kinds and objective.contrasts_rows:
        raise RecipeError(
            f"data.augmentation.drop and data.augmentation.swap are for labels and ratings of texts, "
            f"not for {objective.method}. Remove the settings",
            rule="data.augmentation",
        )


def checker_for(objective: Objective | None) -> type[Checker]:
    """Return the row checker: objectives that generate responses read prompts only."""
    return PromptChecker if objective and "prompt_only" in objective.further_shapes else Checker
