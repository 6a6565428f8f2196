"""``luthier models``: list, show, pull, verify, export and delete models."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from luthier.cli.distil import show_student, student
from luthier.cli.models.certificate import certificate, show_certificate, show_verification, verify
from luthier.cli.models.export import export, push, show_export, show_push
from luthier.cli.models.samples import samples, show_samples
from luthier.cli.service.database import (
    Record,
    ServiceDatabase,
    open_database,
    service_names,
    show_record,
)
from luthier.cli.terminal.bridge import Command, CommandGroup
from luthier.cli.terminal.console import (
    check_output,
    heavy_imports,
    new_console,
    note,
    print_rows,
    print_text,
)
from luthier.errors import CorruptFile, RecipeError, UnknownModel

if TYPE_CHECKING:
    from luthier.engine.metrics import Reporter
    from luthier.engine.runs import Run
    from luthier.library.models import StoredModel
    from luthier.models.catalog import CatalogEntry
    from luthier.workflows.capabilities import Capabilities


def list_models(*, database: ServiceDatabase = None) -> Record:
    """List base models, custom models and interrupted runs."""
    from luthier.engine.runs import unfinished_runs
    from luthier.files import explain_unreadable_home
    from luthier.library.models import custom_models, pretrained_models
    from luthier.models.catalog import CATALOG

    if unreadable := explain_unreadable_home():
        note(unreadable)
    catalog, pretrained = (
        map(_catalog_record, CATALOG.values()),
        map(_base_record, pretrained_models()),
    )
    names = service_names(database)
    custom = [
        _custom_record(model) | ({"service": names[model.id]} if model.id in names else {})
        for model in custom_models()
    ]
    unfinished = [
        {
            "id": run.model_id,
            "started_at": run.started_at().isoformat(timespec="seconds"),
            "failure": run.failure(),
        }
        for run in unfinished_runs()
    ]
    return {"base": [*catalog, *pretrained], "custom": custom, "unfinished": unfinished}


def show_list(found: Record) -> None:
    """Print base models, custom models and interrupted runs as tables."""
    custom, unfinished = found["custom"], found["unfinished"]
    columns = ("base model", "parameters", "context", "input", "licence", "state")
    print_rows(columns, [_base_row(each) for each in found["base"]])
    print_text(
        "\nDownload a model with luthier models pull ID. luthier tune downloads its base model."
    )
    if not custom:
        print_text("No custom models. Create a model with luthier tune DATA.")
    else:
        print_text("")
        service = ["service"] if any("service" in each for each in custom) else []
        columns = ("custom model", "objective", "adaptation", "validation", "created", "state")
        print_rows([*columns, *service], [_custom_row(each) for each in custom])
    if unfinished:
        print_text("")
        state = {True: "diverged", False: "interrupted"}
        rows = [each | {"state": state[bool(each["failure"])]} for each in unfinished]
        print_rows(("id", "started_at", "state"), rows)
        print_text(
            "\nResume an interrupted run with its command and --resume. Delete a run with "
            "luthier models remove ID."
        )


def _base_row(record: Record) -> Record:
    from luthier.data.inputs import PLURAL

    if "damaged" in record:
        return {"base model": record["id"], "state": "damaged"}
    languages, media = record.get("languages", []), record.get("media")
    texts = ", ".join(languages) if len(languages) < 4 else f"{len(languages)} languages"
    return {
        "base model": record["id"],
        "parameters": f"{record['parameters'] / 1e6:.3g} M",
        "context": None if media else record["context"],
        "input": PLURAL[media] if media else texts,
        "licence": record["licence"],
        "state": "here" if record["here"] else record["source"].partition(":")[0],
    }


def _custom_row(record: Record) -> Record:
    from luthier.cli.tune import validation_result

    if "damaged" in record:
        return {"custom model": record["id"], "state": "damaged"}
    kept, service = record.get("validation", {}), record.get("service")
    refit = record.get("refit_rows", 0)
    states = [name for name in ("withheld", "unchanged") if record.get(name)]
    return record | {
        "custom model": record["id"],
        "validation": validation_result(record.get("measure", ""), kept, refit),
        "created": record["created"][:16].replace("T", " "),
        "state": ", ".join(states),
        "service": service and f"{service['name']} of account {service['account']}",
    }


def _catalog_record(entry: CatalogEntry) -> Record:
    from luthier.library.folders import is_base_here

    return {
        "id": entry.id,
        "kind": entry.kind,
        "parameters": entry.parameters,
        "context": entry.context,
        "licence": entry.licence,
        "languages": list(entry.languages),
        "media": entry.media,
        "source": entry.source.provenance["source"],
        "here": is_base_here(entry.id),
        "about": entry.about,
    }


def _base_record(model: StoredModel) -> dict[str, Any]:
    """Return the list entry of a pre-trained base model."""
    manifest = model.manifest
    if model.damaged or "network" not in (manifest.recipe or {}):
        reason = model.damaged or "its record lacks the recipe of its pre-training"
        return {"id": model.id, "here": True, "damaged": reason}
    return {
        "id": model.id,
        "kind": manifest.kind,
        "parameters": manifest.parameters,
        "context": manifest.context,
        "licence": "your own",
        "here": True,
        "about": f"pre-trained here: {(manifest.recipe or {})['network']['family']}",
    }


def _custom_record(model: StoredModel) -> dict[str, Any]:
    """Return the list entry of a custom model."""
    from luthier.objectives import OBJECTIVES

    manifest = model.manifest
    if model.damaged:
        return {"id": model.id, "damaged": model.damaged}
    method = (manifest.objective or {}).get("method", "")
    record = {
        "id": model.id,
        "parent": manifest.parent,
        "created": manifest.created,
        "objective": method,
        "validation_loss": None,
        **({"withheld": manifest.withheld} if manifest.withheld else {}),
    }
    if cut := manifest.student:
        kept = f"student, {cut['layers']} of {cut['teacher_layers']} layers"
        return record | {"adaptation": kept, "parameters": manifest.parameters}
    if manifest.source is not None:
        return record | {"adaptation": f"imported {manifest.saved}", "source": manifest.source}
    if manifest.recipe is None or manifest.metrics is None:
        return {"id": model.id, "damaged": "its record lacks the recipe or the metrics of its run"}
    verdict = manifest.metrics.get("verdict") or {}
    if refit := manifest.metrics.get("refit"):
        record["refit_rows"] = refit["rows"]
    if verdict.get("unchanged"):
        record["unchanged"] = True
    return record | {
        "adaptation": manifest.recipe["adaptation"]["method"],
        "validation_loss": manifest.metrics["validation_loss"],
        # A plugin with the objective may be uninstalled.
        "measure": OBJECTIVES[method].measure if method in OBJECTIVES else "",
        "validation": verdict.get("kept", {}),
    }


def show_model(model: str) -> Record:
    """Show a model's record, files and integrity.

    Args:
        model: Model id.
    """
    from luthier.library.folders import is_base_here
    from luthier.library.models import catalogue_model, find
    from luthier.models.catalog import CATALOG

    entry = CATALOG.get(model)
    if entry is None or is_base_here(model):
        try:
            stored = find(model)
        except UnknownModel:
            _check_run_ended(model)
            raise
    else:
        stored = catalogue_model(entry)
    return {
        "id": stored.id,
        "folder": str(stored.folder),
        "lineage": lineage(stored),
        **stored.manifest.plain(),
        **({} if stored.folder.is_dir() else {"here": False}),
        "files": _files(stored),
    }


def print_model(details: Record) -> None:
    """Print the main facts of a model."""
    from luthier.library.folders import is_base_here
    from luthier.library.models import catalogue_model, find
    from luthier.models.catalog import CATALOG

    model = details["id"]
    is_here = model not in CATALOG or is_base_here(model)
    stored = find(model) if is_here else catalogue_model(CATALOG[model])
    print_text(model)
    for name, text in _summary(stored, details["files"]):
        print_text(f"  {name:<13} {text}")
    print_text(f"complete record: luthier models show {model} --json")


def _run_of(model: str) -> Run | None:
    """Return the run of a model id; ``None`` if no run has this id.

    An empty name, `..` or a path would denote a folder outside the runs.
    """
    from luthier.engine.runs import run_of
    from luthier.library.folders import split_id
    from luthier.models.catalog import CATALOG
    from luthier.recipe import NAME_PATTERN

    name = split_id(model)[1] if ":" in model else model
    return run_of(model) if model not in CATALOG and NAME_PATTERN.fullmatch(name) else None


def _check_run_ended(model: str) -> None:
    """Reject the id of a model with an unfinished run."""
    if (run := _run_of(model)) is None:
        return
    if run.is_worked_on():
        raise UnknownModel(f"the model {model} is still in training")
    if run.is_unfinished():
        started = f"the run of {run.started_at():%Y-%m-%d %H:%M} UTC"
        remove = f"`luthier models remove {model}` deletes the run"
        # A diverged run diverges again, so `--resume` would not help.
        if reason := run.failure():
            raise UnknownModel(f"no model {model} exists: {started} diverged ({reason}). {remove}")
        raise UnknownModel(
            f"no model {model} exists: {started} was interrupted. Repeat the command with --resume, or "
            f"{remove}"
        )


def _summary(model: StoredModel, files: dict[str, dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """Yield the main properties of a model as pairs of name and text."""
    record, plain = model.manifest, _custom_record(model) if ":" in model.id else {}
    if above := lineage(model)[1:]:
        yield "base", ", from ".join(above)
    elif record.source:
        yield "source", record.source
    if record.created:
        yield "created", record.created[:16].replace("T", " ") + " UTC"
    made_by = plain.get("adaptation")
    fields = (record.recipe or {}).get("adaptation") or {}
    if made_by and made_by == fields.get("method"):
        settings = ", ".join(
            f"{name} {_text(value)}"
            for name, value in fields.items()
            if name != "method" and value and not isinstance(value, dict | list)
        )
        yield (
            "learned",
            f"{plain['objective']} with {made_by}" + (f" ({settings})" if settings else ""),
        )
    elif made_by:
        yield "origin", made_by
    if (data := record.data) is not None:
        read = ", ".join(Path(path).name for path in data.sha256)
        yield "rows", f"{data.rows:,} of {read}, {data.validation_rows:,} held out"
    if found := (record.data_report or {}).get("rules"):
        kinds = [
            f"{each['rule']} ({each['count']:,})" for each in found if each["severity"] != "note"
        ]
        if kinds:
            yield "data warnings", ", ".join(kinds)
    if (result := record.metrics) and "steps" in result:
        yield (
            "run",
            f"{result['steps']:,} steps, {result['tokens']:,} tokens, {result['seconds']:,.0f} s",
        )
    if record.verdict:
        yield "result", record.verdict
    if record.limits_text:
        yield "limits", record.limits_text
    if (parity := record.parity) is not None:
        trained, reloaded = f"{parity.trained:.4f}", f"{parity.reloaded:.4f}"
        yield "parity", f"loss {trained} trained, {reloaded} reloaded, on {parity.rows:,} rows"
    if record.parameters:
        yield "parameters", f"{record.parameters:,}"
    if record.context:
        yield "context", f"{record.context:,} tokens"
    if record.licence:
        yield "licence", record.licence
    for each in record.exports or ():
        yield "exported", f"{each.name} on {each.created[:10]}"
    for weights in record.quantized or ():
        yield f"as {weights.quantization}", weights.describe()
    if not model.folder.is_dir():
        yield "files", f"not on this machine. Fetch with luthier models pull {model.id}"
        return
    damaged = [name for name, each in files.items() if each["intact"] is False]
    size = sum(each["bytes"] for each in files.values()) / 1e6
    known = any(each["intact"] for each in files.values())
    state = "intact" if known else "no recorded hashes"
    if damaged:
        state = f"damaged or missing: {', '.join(damaged)}"
    yield "files", f"{len(files)}, {size:,.1f} MB, {state}"
    yield "folder", str(model.folder)


def lineage(model: StoredModel) -> list[str]:
    """Return the ids of a model and all ancestors."""
    from luthier.library.models import ancestors

    above = ancestors(model)
    return [model.id, *(f"{a} (not here)" if isinstance(a, str) else a.id for a in above)]


def _files(model: StoredModel) -> dict[str, dict[str, Any]]:
    """Return path, size, hash and state of each file, without metadata files."""
    from luthier.files import hashes_of
    from luthier.models.manifest import OWN_FILES

    if not model.folder.is_dir():
        return {}
    recorded = model.manifest.files
    every = hashes_of(model.folder).items()
    found = {name: value for name, value in every if name.partition("/")[0] not in OWN_FILES}
    return {
        name: {
            "path": str(model.folder / name),
            "bytes": (model.folder / name).stat().st_size if name in found else 0,
            "sha256": found.get(name),
            "intact": found.get(name) == recorded[name] if name in recorded else None,
        }
        for name in sorted(found.keys() | recorded.keys())
    }


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or isinstance(value, dict | list):
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class ModelCapabilities:
    """Objectives and adaptations within the limits of this machine."""

    models: list[Capabilities]


def capabilities(model: Annotated[str | None, typer.Argument()] = None) -> ModelCapabilities:
    """List a model's objectives and adaptations that fit here.

    Args:
        model: Model id; all base models by default.
    """
    with heavy_imports():
        from luthier.library.models import pretrained_models
        from luthier.models.catalog import CATALOG
        from luthier.workflows.capabilities import capabilities as run

    names = [model] if model else [*CATALOG, *(each.id for each in pretrained_models())]
    return ModelCapabilities([run(name) for name in names])


def show_capabilities(found: ModelCapabilities) -> None:
    """Print a table of objectives and adaptations for each model."""
    for each in found.models:
        _print_capabilities(each)


def _print_capabilities(found: Capabilities) -> None:
    from rich.table import Table

    from luthier.adaptations import ADAPTATIONS
    from luthier.objectives import OBJECTIVES

    out = new_console(highlight=False)
    where = "" if found.here else ", not on this machine"
    free = found.available / 1e9
    out.print(f"\n[bold]{found.model}[/bold]{where}: memory in GB, of {free:.1f} GB available")
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    # Numbers fit into 80 columns; the names follow below the table.
    numbers = {name: str(number) for number, name in enumerate(ADAPTATIONS, 1)}
    for name in ("", *numbers.values()):
        table.add_column(name, justify="right" if name else "left")
    cells = {(v.objective, v.adaptation): v for v in found.verdicts}
    marks: dict[str, str] = {}
    impossible: dict[str, list[str]] = {}
    for objective in OBJECTIVES:
        row = [cells[objective, adaptation] for adaptation in ADAPTATIONS]
        if all(v.reason for v in row) and len({v.reason for v in row}) == 1:
            impossible.setdefault(row[0].reason, []).append(objective)
            continue
        texts = []
        for verdict in row:
            if verdict.reason:
                mark = marks.setdefault(verdict.reason, chr(ord("a") + len(marks)))
                texts.append(f"[dim]{mark}[/dim]")
            elif verdict.fits:
                texts.append(f"[green]{verdict.memory / 1e9:.1f}[/green]")
            else:
                texts.append(f"[red]{verdict.memory / 1e9:.1f}![/red]")
        table.add_row(objective, *texts)
    out.print(table)
    columns = "  ".join(f"{number} {name}" for name, number in numbers.items())
    out.print(f"  {columns}", style="dim")
    for reason, mark in marks.items():
        out.print(f"  {mark}  {reason}", markup=False, soft_wrap=True)
    for reason, names in impossible.items():
        out.print(f"  unsupported: {', '.join(names)}: {reason}", markup=False, soft_wrap=True)


def pull_model(
    model: str | None = None,
    *,
    source: Annotated[Path | None, typer.Option("--from")] = None,
    reporter: Reporter | None = None,
) -> Record:
    """Fetch a base model, or store the models of a packed file.

    Args:
        model: Id of a base model.
        source: File of `luthier models pack`, instead of an id.
        reporter: Receives progress; silent if not given.
    """
    from luthier.engine.metrics import Reporter
    from luthier.files import verify
    from luthier.library.models import find
    from luthier.library.packing import unpack
    from luthier.models.catalog import CATALOG

    reporter = reporter or Reporter()
    if (model is None) == (source is None):
        raise RecipeError("Give the id of a base model, or `--from FILE`")
    if source is not None:
        unpacked = unpack(source, reporter.stage)[-1]
        return {"id": unpacked.id, "folder": str(unpacked.folder)}
    assert model is not None
    stored = find(model, reporter.stage)
    try:
        verify(stored.folder, stored.manifest.files)
    except CorruptFile:
        if model not in CATALOG:
            raise
        reporter.note("a file is damaged: fetching the model again")
        shutil.rmtree(stored.folder)
        stored = find(model, reporter.stage)
    _ = stored.chat  # stores the tokenizer for commands that need only tokens
    return {"id": stored.id, "folder": str(stored.folder)}


def pack_model(
    model: str, file: Path, *, overwrite: bool = False, reporter: Reporter | None = None
) -> Record:
    """Write a model into a file, for machines without network.

    Args:
        model: Model id; the base models are packed, too.
        file: Target, NAME.luthier, for `models pull --from`.
        overwrite: Replace an existing file.
        reporter: Receives progress; silent if not given.

    Raises:
        RecipeError: for another suffix, or an existing file.
    """
    from luthier.engine.metrics import Reporter
    from luthier.files import sha256_of
    from luthier.library.models import find
    from luthier.library.packing import PACKED, pack

    if file.suffix != PACKED:
        raise RecipeError(f"{file} is no name of a packed model. Write {file.stem}{PACKED}")
    check_output(file, overwrite=overwrite)
    reporter = reporter or Reporter()
    packed = pack(find(model, reporter.stage), file, reporter.stage)
    return {
        "id": packed[-1].manifest.id,
        "file": str(file),
        "models": [each.manifest.id for each in packed],
        "licence": packed[0].manifest.licence,
        "bytes": file.stat().st_size,
        "sha256": sha256_of(file),
    }


def accept_model(model: str) -> Record:
    """Activate a model withheld for forgetting too much.

    Args:
        model: Id of the withheld model.
    """
    with heavy_imports():
        from luthier.workflows.tuning import accept

    stored = accept(model)
    return {"id": stored.id, "accepted": stored.manifest.accepted}


def _check_no_account(model: str, database: str | None) -> None:
    """Reject a model in use by the service."""
    from luthier.server.stores.removal import owner_of
    from luthier.server.tables.database import is_database_here

    if not is_database_here(database):
        return
    with open_database(database) as service:
        account = owner_of(service, model)
    if account is not None:
        raise RecipeError(
            f"{model} belongs to account {account} of the service. Run `luthier admin models "
            f"unregister {model}` first, or delete the model with an API of the service"
        )


def _service_users(base: str, database: str | None) -> list[str]:
    """Return the models, jobs and endpoints of accounts with a base model."""
    from luthier.server.stores.removal import users_of_base
    from luthier.server.tables.database import is_database_here
    from luthier.server.tables.foundation import foundation_model

    known = foundation_model(base)
    if known is None or not is_database_here(database):
        return []
    with open_database(database) as service:
        return users_of_base(service, known)


def remove_model(model: str, *, force: bool = False, database: ServiceDatabase = None) -> Record:
    """Delete a model and its run.

    Args:
        model: Model id.
        force: Delete a model that other models, runs or accounts use.
    """
    from luthier.engine.runs import run_of
    from luthier.formatting import list_some
    from luthier.library.folders import base_folder, working_folders
    from luthier.library.models import custom_models, pretrained_models
    from luthier.library.removal import dependents_of, remove_side_files
    from luthier.library.suggestions import suggest_models
    from luthier.models.catalog import CATALOG, fetching_lock

    has_service = find_spec("sqlalchemy") is not None  # of the extra `server`
    run = _run_of(model)
    fetched = base_folder(model) if model in CATALOG else None
    if run is not None:
        model = run.model_id  # with the stored form of the base id
    folders = [] if run is None else [run.model_folder, *working_folders(model)]
    if not any(each.exists() for each in ([fetched] if fetched is not None else folders)):
        made = [each.id for each in (*custom_models(), *pretrained_models())]
        raise UnknownModel(
            f"no model or run {model!r} exists on this machine. {suggest_models(model, made)}"
        )
    needed_by = dependents_of(model)
    # Also with `--force`: a training would read weights that are gone, and fail without a word
    # about the cause.
    if running := [each for each in needed_by.runs if run_of(each).is_worked_on()]:
        raise RecipeError(f"{model} is in use by a running training: {', '.join(running)}")
    if not force:
        users = [*needed_by.models, *(f"the interrupted run {each}" for each in needed_by.runs)]
        users += _service_users(model, database) if ":" not in model and has_service else []
        if users:
            raise RecipeError(
                f"{model} is in use by {list_some(users, 3)}. Remove these first, or set --force"
            )
    # Read before the model is gone: a parent that an account deleted goes with its last child.
    parents = [m.manifest.parent for m in custom_models() if m.id == model]
    if fetched is not None:
        with fetching_lock(fetched):
            remove_side_files(model)
            shutil.rmtree(fetched)
    elif run is not None:
        with run.lock():
            if has_service:
                _check_no_account(model, database)
            remove_side_files(model)
            shutil.rmtree(run.model_folder, ignore_errors=True)
    if has_service:
        from luthier.server.stores.removal import remove_unneeded

        for parent in parents:
            remove_unneeded(parent)
    return {"id": model, "removed": True}


models_app = CommandGroup("List, show, fetch, verify, export and remove models.")
for command in (
    Command(list_models, show_list, "list"),
    Command(show_model, print_model, "show"),
    Command(capabilities, show_capabilities),
    Command(pull_model, show_record, "pull"),
    Command(pack_model, show_record, "pack"),
    Command(accept_model, show_record, "accept"),
    Command(student, show_student),
    Command(samples, show_samples),
    Command(certificate, show_certificate),
    Command(verify, show_verification),
    Command(export, show_export),
    Command(push, show_push),
    Command(remove_model, show_record, "remove"),
):
    models_app.add(command)
