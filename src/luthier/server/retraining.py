"""Retraining of a model: a draft job on the model's rows and on new rows from captured requests.

A draft is a paused job, so that the operations of jobs start, show and delete the draft.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from luthier.data.files.read import read_records
from luthier.data.files.sources import files_of
from luthier.data.rows import Checker, load_rows
from luthier.errors import (
    DataError,
    DownloadError,
    LocationRefused,
    LuthierError,
    Problem,
    RefusedInput,
    WrongState,
)
from luthier.files import json_lines, sha256_of, write_bytes
from luthier.formatting import nearest_name
from luthier.gate.row_keys import hash_texts, match_questions, question_of
from luthier.library import models
from luthier.library.models import StoredModel
from luthier.limits import AccountQuotas
from luthier.recipe import Recipe, parse
from luthier.server.identifiers import ModelIds, find_endpoint, find_model
from luthier.server.jobs.deletion import delete_rows
from luthier.server.jobs.submit import FINE_TUNING, SETTABLE_DATA, Submission, submit
from luthier.server.live.health import unknown_model
from luthier.server.live.rows import (
    GOOD,
    KINDS,
    CapturedAnswer,
    Row,
    RowKind,
    captured_answers,
    training_rows,
)
from luthier.server.stores.locations import Locations
from luthier.server.stores.uploaded_files import file_address
from luthier.server.tables import jobs
from luthier.server.tables.arns import Arns
from luthier.server.tables.custom_models import LONGEST_NAME, CustomModel
from luthier.server.tables.database import Database
from luthier.server.tables.endpoints import DEPLOYMENT, Endpoint
from luthier.server.tables.foundation import foundation_model
from luthier.server.tables.jobs import PAUSED, Job, Retraining

LEAST_NEW = 20
"""Minimum number of different new inputs."""
LEAST_OF_LABEL = 10
"""Minimum number of new rows of a label that the model does not have, as for Amazon Comprehend."""
FRESH_SHARE = 0.2
"""Share of the new inputs that no model is trained on, for the comparison."""
DRAFT = "Draft of a retraining. Nothing is trained before a person resumes the job."
_KEPT_DATA = tuple(name for name in SETTABLE_DATA if name not in ("columns", "group_column"))
"""Data settings of the model that still apply: columns are renamed, and the split is explicit."""


@dataclass(frozen=True)
class ActiveModel:
    """The model to retrain, with the addresses or paths of its rows."""

    model: CustomModel
    stored: StoredModel
    job: Job | None
    """Job of the model; None for a model of the CLI."""
    deployment: str | None
    recipe: Recipe
    train: Sequence[str]
    held_out: Sequence[str]
    """Validation rows, and compared rows of an earlier retraining."""
    compared: Sequence[str]
    """Fresh and frozen rows of an earlier retraining."""


@dataclass(frozen=True)
class _Rows:
    """Rows in luthier's keys."""

    old: list[Row]
    new: list[Row]
    fresh: list[Row]
    """New rows for the comparison only."""
    frozen: list[Row]
    """Old rows that the model was not trained on."""
    new_labels: dict[str, int]
    """Number of new rows by label that the model does not have."""
    rare_labels: dict[str, str]
    """Labels with too few rows, which are left out, with the reason."""


def draft(
    locations: Locations,
    arns: Arns,
    account: str,
    model: str,
    since: datetime,
    base: str | None = None,
    quotas: AccountQuotas | None = None,
    *,
    reads_paths: bool = False,
) -> Job:
    """Prepare a retraining as a paused job. The draft replaces an earlier draft of the model.

    Args:
        model: name of a custom model, or of a deployment.
        since: time of the oldest request for new rows.
        base: new base model; by default the base of the model.
        reads_paths: if the caller may read files of this machine. The recipe of a model that was
            created with the CLI names paths of this machine.

    Raises:
        NoRequests: for an unknown model.
        RefusedInput: for an unsupported model, missing old rows, or too few new rows.
        DataError: for old rows that cannot be read.
    """
    database = locations.uploads.database
    with database.read() as session:
        active = find_active(session, arns, account, model)
    check_supported(active, reads_paths)
    rows = _collect(locations, account, active, dict.fromkeys([model, active.model.name]), since)
    base_model = ModelIds(database, arns).base(account, base or active.model.base_model)
    if base_model is None:
        missing = base or active.model.base_model or "of an imported model"
        raise RefusedInput(
            f"The base {missing} does not exist. Choose a different base with `base`.",
            setting="base",
        )
    kept = {"train": [*rows.old, *rows.new], "fresh": rows.fresh, "frozen": rows.frozen}
    name, addresses = _free_name(database, account, active.model.name), dict[str, str]()
    try:
        for part, found in kept.items():
            if found:
                content = [json_lines(found).encode()]
                file = f"{name}-{part}.jsonl"
                upload = locations.uploads.add(account, content, file, "fine-tune")
                addresses[part] = file_address(upload.id)
        with database.write() as session:
            # In the same transaction as the new draft, so that a model never has two drafts, or
            # none.
            replaced = _discard(session, arns, account, active.model.name)
            # Without validation rows, the job holds out training rows to choose its steps: the
            # frozen rows only judge.
            submission = Submission(
                account=account,
                api="native",
                job_name=name,
                model_name=name,
                customization_type=FINE_TUNING,
                base=base_model,
                training=[addresses["train"]],
                settings=_settings(active, [*rows.new_labels], with_base=base is not None),
            )
            job = submit(session, submission, arns, quotas)
            plan = Retraining(
                model=active.model.name, stored_id=active.stored.id, fresh=addresses["fresh"],
                frozen=addresses.get("frozen"), deployment=active.deployment,
                base_changed=base is not None,
                rows={
                    "old": len(rows.old), "new": len(rows.new), "fresh": len(rows.fresh),
                    "frozen": len(rows.frozen),
                },
                new_labels=rows.new_labels, rare_labels=rows.rare_labels,
                estimated_seconds=None if base else _estimated_seconds(active, len(kept["train"])),
            )  # fmt: skip
            job.details = {**job.details, "retraining": plan}
            jobs.move(session, job, PAUSED, DRAFT)
    # Also on an interrupt: uploaded files without a job would count in the quota forever.
    except BaseException:
        _delete_files(locations, account, addresses.values())
        raise
    _delete_files(locations, account, replaced)
    return job


def check_supported(active: ActiveModel, reads_paths: bool = False) -> None:
    """Raise :class:`RefusedInput` for a model that cannot be retrained."""
    if active.job is None and not reads_paths:
        raise RefusedInput(
            f'Model "{active.model.name}" was not trained by a job of this service. '
            f"Run `luthier live retrain {active.model.name}` on the server's machine.",
            setting="model",
        )
    if active.stored.objective.method not in KINDS:
        raise RefusedInput(
            f'Model "{active.model.name}" was trained with `{active.stored.objective.method}`. '
            f"Feedback gives rows for {', '.join(KINDS)}.",
            setting="model",
        )


def latest(session: Session, account: str, model: str) -> Job | None:
    """Return the last retraining of a model, by the name of the model or of its deployment."""
    names = [Job.details["retraining", each].as_string() for each in ("model", "deployment")]
    retrained = or_(*(name == model for name in names))
    query = select(Job).where(Job.account == account, retrained).order_by(Job.seq.desc()).limit(1)
    return session.scalars(query).first()


def start(database: Database, arns: Arns, account: str, model: str, base: str | None = None) -> Job:
    """Queue the draft of a model.

    Raises:
        WrongState: without a draft, or for a draft on a different base.
    """
    wanted = ModelIds(database, arns).base(account, base) if base else None
    with database.write() as session:
        job = latest(session, account, model)
        if job is None or not is_draft(job):
            state = f" The last retraining, {job.name}, is {job.state}." if job else ""
            raise WrongState(
                f'Model "{model}" has no draft.{state} '
                f"Prepare a draft with `luthier live retrain {model}`."
            )
        if base and (wanted is None or wanted.arn(arns) != job.base_model):
            raise WrongState(
                f"The draft {job.name} has the base {job.recipe['base']}, not {base}. "
                f"Prepare a new draft with `luthier live retrain {model} --base {base}`."
            )
        return jobs.resume(session, job)


def is_draft(job: Job) -> bool:
    """Return True for a retraining that nobody has started."""
    # A started retraining that is paused is no draft: its files and checkpoints must stay.
    return job.state == PAUSED and not job.attempts


def _discard(session: Session, arns: Arns, account: str, model: str) -> list[str]:
    """Delete the draft of a model, and return the addresses of its files."""
    job = latest(session, account, model)
    if job is None or not is_draft(job):
        return []
    plan = job.details["retraining"]
    files = [*job.details["sources"], plan["fresh"], *filter(None, [plan["frozen"]])]
    jobs.stop(session, job)
    delete_rows(session, arns, job)
    return files


def _delete_files(locations: Locations, account: str, addresses: Iterable[str]) -> None:
    for address in addresses:
        locations.uploads.delete(account, address.rpartition("/")[2])


def find_active(session: Session, arns: Arns, account: str, name: str) -> ActiveModel:
    """Return a custom model, or the model of a deployment.

    Raises:
        NoRequests: for an unknown model.
        RefusedInput: for a base model, or an unfinished model.
    """
    endpoint = find_endpoint(session, arns, account, DEPLOYMENT, name)
    custom = find_model(session, arns, account, endpoint.model if endpoint else name)
    if custom is None:
        raise unknown_model(session, account, name) or RefusedInput(
            f'"{name}" is no custom model and has no training rows.', setting="model"
        )
    if custom.stored_id is None:
        raise RefusedInput(f'Model "{custom.name}" is {custom.status}.', setting="model")
    stored = models.find(custom.stored_id)
    if endpoint is None:
        serves = Endpoint.kind == DEPLOYMENT, Endpoint.model == custom.arn(arns)
        found = session.scalars(select(Endpoint).where(*serves).order_by(Endpoint.seq))
        # With the name of a base model, clients query the base model.
        endpoint = next((each for each in found if foundation_model(each.name) is None), None)
    job = custom.job_id and session.scalar(select(Job).where(Job.id == custom.job_id))
    recipe = parse(Recipe, job.recipe if job else stored.manifest.recipe or {})
    if job:
        plan = job.details.get("retraining")
        compared = [each for each in (plan["fresh"], plan["frozen"]) if each] if plan else []
        train, held_out = job.details["sources"], [*dict.fromkeys([*job.validators, *compared])]
    else:
        spec, compared = recipe.data, []
        train = [spec.train, *(each.train for each in spec.mix)]
        held_out = [spec.validation] if spec.validation else []
    deployment = endpoint.name if endpoint else None
    return ActiveModel(custom, stored, job or None, deployment, recipe, train, held_out, compared)


def _settings(active: ActiveModel, new_labels: Sequence[str], with_base: bool) -> dict[str, Any]:
    """Return the settings of the model that differ from the defaults.

    Training and adaptation were chosen for the base: a different base gets the defaults.
    """
    recipe = active.recipe
    if active.job is None:
        # The manifest has resolved values; the run has the request.
        from luthier.engine.runs import run_of

        requested = run_of(active.stored.id).read_request().get("recipe")
        recipe = parse(Recipe, requested) if requested else recipe
    fields = recipe.model_dump(mode="json", exclude_defaults=True, exclude_none=True)
    groups = () if with_base else ("training", "adaptation")
    data = {name: value for name, value in fields["data"].items() if name in _KEPT_DATA}
    data.pop("validation_share", None)
    settings = {name: fields[name] for name in groups if fields.get(name)}
    objective = {**fields.get("objective", {}), "method": active.stored.objective.method}
    if new_labels and objective.get("labels"):
        objective["labels"] = [*objective["labels"], *new_labels]
        # There is one share for each label of the earlier model.
        objective.pop("shares", None)
    return {**settings, "objective": objective, "data": data}


def _estimated_seconds(active: ActiveModel, rows: int) -> float | None:
    """Return the duration of the model's training, scaled to ``rows``."""
    manifest = active.stored.manifest
    seconds = (manifest.metrics or {}).get("seconds")
    if not seconds or manifest.data is None or not manifest.data.rows:
        return None
    return float(seconds * rows / manifest.data.rows)


def _free_name(database: Database, account: str, name: str) -> str:
    """Return the first of ``name-r2``, ``name-r3``, … that no job or model has but the draft."""
    # The third retraining of `tickets` is `tickets-r4`, and not `tickets-r2-r2-r2`.
    stem = re.sub(r"-r\d+$", "", name)[: LONGEST_NAME - 5]
    with database.read() as session:
        mine = (
            Job.account == account,
            or_(Job.name.startswith(stem), Job.model_name.startswith(stem)),
        )
        taken = {
            each
            for row in session.execute(select(Job.name, Job.model_name).where(*mine))
            for each in row
        }
        taken |= set(
            session.scalars(select(CustomModel.name).where(CustomModel.account == account))
        )
        job = latest(session, account, name)
        if job is not None and is_draft(job):
            # The draft is deleted in the transaction that creates its successor, which may have its
            # name.
            taken -= {job.name, job.model_name}
    return next(free for number in count(2) if (free := f"{stem}-r{number}") not in taken)


def _collect(
    locations: Locations, account: str, active: ActiveModel, names: Iterable[str], since: datetime
) -> _Rows:
    """Return old and new rows, without test rows among the training rows."""
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        old, frozen = old_rows(locations, account, active, folder)
        # A request to a deployment has the name of the deployment and of the model.
        captured = {
            (answer.request, answer.position): answer
            for name in names
            for answer in captured_answers(locations.uploads.objects, account, name, since)
        }
        answers = [*captured.values()]
        kind = cast(RowKind, active.stored.objective.method)
        rated = [each for each in answers if kind != "sft" or _is_good(each)]
        new, new_labels, rare = with_frequent_labels(training_rows(rated, kind), active.stored)
        if kind == "sft":
            old, new, frozen = _in_one_form(old, new, frozen)
        parsed = {}
        for part, records in (("old", old), ("new", new), ("frozen", frozen)):
            file = folder / f"{part}.jsonl"
            write_bytes(file, json_lines(records).encode())
            parsed[part] = load_rows(str(file)) if records else []
        tested = match_questions(parsed["new"], parsed["frozen"])
        known = match_questions(parsed["new"], parsed["old"])
        keys = [hash_texts(question_of(row)) for row in parsed["new"]]
        usable = [n for n in range(len(new)) if n not in tested]
        unseen = sorted({keys[n] for n in usable if n not in known})
        if len(unseen) < LEAST_NEW:
            texts = "; ".join(f'"{name}" ({why})' for name, why in rare.items())
            left_out = (
                f" Labels that the model does not have are left out: {texts}." if rare else ""
            )
            raise RefusedInput(
                f'Model "{active.model.name}" has {len(unseen)} new inputs with feedback since '
                f"{since:%Y-%m-%d}; a retraining needs {LEAST_NEW}. {len(answers):,} answers were "
                f"captured; {len(new)} give rows of the kind {kind}, {len(known)} of them for inputs "
                f"of the training rows.{left_out} Collect more feedback, or choose an earlier `since`.",
                setting="since",
            )
        test = {*unseen[: round(FRESH_SHARE * len(unseen))]}
        fresh = [new[n] for n in usable if keys[n] in test]
        learned = [n for n in usable if keys[n] not in test]
        # The feedback is newer than the old rows for the same input.
        replaced = match_questions(parsed["old"], [parsed["new"][n] for n in learned])
        kept = [row for n, row in enumerate(old) if n not in replaced]
        return _Rows(kept, [new[n] for n in learned], fresh, frozen, new_labels, rare)


def _is_good(answer: CapturedAnswer) -> bool:
    """Return True for an answer that people corrected or rated as good."""
    better = answer.latest("corrected", "preferred")
    return better is not None or (answer.rating or 0) >= GOOD


def with_frequent_labels(
    rows: Sequence[Row], stored: StoredModel
) -> tuple[list[Row], dict[str, int], dict[str, str]]:
    """Return rows without rare unknown labels, the number of rows by new label, and rare labels."""
    known = (stored.manifest.objective or {}).get("labels")
    if stored.objective.method != "classification" or not known:
        return [*rows], {}, {}
    labels = [row["label"] if isinstance(row["label"], list) else [row["label"]] for row in rows]
    counts = Counter(name for each in labels for name in each if name not in known)
    rare = {}
    for name, number in counts.items():
        if number < LEAST_OF_LABEL:
            near = nearest_name(name, known)
            hint = f'. Did you mean "{near}"?' if near else ""
            rare[name] = f"{number} of {LEAST_OF_LABEL} rows{hint}"
    new = {name: number for name, number in counts.items() if name not in rare}
    kept = [row for row, each in zip(rows, labels, strict=True) if not rare.keys() & {*each}]
    return kept, new, rare


def _in_one_form(
    old: Sequence[Row], new: Sequence[Row], frozen: Sequence[Row]
) -> tuple[list[Row], ...]:
    """Return rows of conversations as prompts with completions, if all can be; else as messages.

    Old conversations stay messages.
    """
    pairs = [_as_pair(row) for row in new]
    if any("messages" in row for row in (*old, *frozen)) or None in pairs:
        return tuple([_as_messages(row) for row in part] for part in (old, new, frozen))
    return [*old], [row for row in pairs if row is not None], [*frozen]


def _as_pair(row: Row) -> Row | None:
    """Return a row as prompt and completion; None for a longer conversation."""
    turns = row.get("messages")
    if turns is None:
        return row
    is_plain = "tools" not in row and all(turn.keys() <= {"role", "content"} for turn in turns)
    if not is_plain or len(turns) != 2:
        return None
    if not isinstance(turns[0]["content"], str) or not turns[1]["content"]:
        return None
    texts = {"prompt": turns[0]["content"], "completion": turns[1]["content"]}
    return {**texts, "requests": row["requests"]}


def _as_messages(row: Row) -> Row:
    if "completion" not in row:
        return row
    turns = [
        {"role": "user", "content": row["prompt"]},
        {"role": "assistant", "content": row["completion"]},
    ]
    return {name: row[name] for name in ("requests",) if name in row} | {"messages": turns}


def old_rows(
    locations: Locations, account: str, active: ActiveModel, folder: Path
) -> tuple[list[Row], list[Row]]:
    """Return the training rows and the test rows of the model.

    Raises:
        RefusedInput: if a file was deleted or changed since the training.
    """
    record = active.stored.manifest.data
    if record is None:
        raise RefusedInput(
            f'Model "{active.model.name}" has no record of its rows.', setting="model"
        )
    path_of = {digest: path for path, digest in record.sha256.items()}
    train: list[Row] = []
    frozen: list[Row] = []
    for source in (*active.train, *active.held_out):
        try:
            files = (
                locations.fetch(account, source, folder / f"{len(train)}-{len(frozen)}")
                if active.job
                else [(str(path), path) for path in files_of(source)]
            )
            hashed = [(address, file, sha256_of(file)) for address, file in files]
        except (LocationRefused, DownloadError, DataError, OSError) as error:
            raise _missing(active, source, str(error)) from error
        for address, file, digest in hashed:
            path = path_of.get(digest)
            # An upload with compared rows is no file of the training, and cannot change.
            if path is None and source not in active.compared:
                raise _missing(active, address, "The file has changed since the training.")
            # The frozen rows of a retraining are a file of their own. The rows that it held out to
            # choose its steps are trained again, or each retraining would lose a tenth of the rows.
            test_lines = set[int]() if active.compared else set(record.held_out.get(path or "", ()))
            if source in active.held_out:
                frozen += [own for _, own in _records(file, active.recipe)]
                continue
            for line, own in _records(file, active.recipe):
                (frozen if line in test_lines else train).append(own)
    return train, frozen


def _records(file: Path, recipe: Recipe) -> list[tuple[int, Row]]:
    """Return line numbers and rows in luthier's keys."""
    problems: list[Problem] = []
    checker = Checker(str(file), problems, recipe.data.columns)
    checker.accepts_own_keys = True
    found = [(line, checker.own_record(record)) for line, record in read_records(file, problems)]
    if problems:
        raise DataError(problems)
    return [(line, dict(own)) for line, own in found if own is not None]


def _missing(active: ActiveModel, source: str, why: str) -> LuthierError:
    return RefusedInput(
        f'The training rows of model "{active.model.name}" cannot be read from {source}: {why}',
        advice="Restore the file, or train a new model with `luthier tune`.",
    )
