"""``luthier models``: what is here, and what can be fetched, exported and removed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from luthier.cli.console import (
    LiveReporter,
    new_console,
    print_json,
    print_text,
    validation_result,
)
from luthier.errors import CorruptFile, RecipeError
from luthier.files import luthier_home
from luthier.models.catalog import CATALOG, MANIFEST
from luthier.objectives import OBJECTIVES
from luthier.store.models import (
    StoredModel,
    base_folder,
    custom_models,
    find,
    pretrained_models,
    short_name,
)


def list_models(as_json: bool) -> None:
    """Print base models and custom models."""
    bases: list[dict[str, Any]] = [
        {
            "id": entry.id,
            "kind": entry.kind,
            "parameters": entry.parameters,
            "context": entry.context,
            "licence": entry.licence,
            "languages": list(entry.languages),
            "source": entry.source.provenance["source"],
            "here": (base_folder(entry.id) / MANIFEST).is_file(),
            "about": entry.about,
        }
        for entry in CATALOG.values()
    ] + [_made_here(model) for model in pretrained_models()]
    custom = [_listed(model) for model in custom_models()]
    if as_json:
        print_json({"base": bases, "custom": custom})
        return

    table = _table("base model", "parameters", "context", "languages", "licence", "here")
    for base in bases:
        if "damaged" in base:
            table.add_row(str(base["id"]), "", "", "", "", "[red]damaged[/red]")
            continue
        size = f"{base['parameters'] / 1e6:.0f} M"
        known = base.get("languages", [])
        languages = ", ".join(known) if len(known) < 4 else str(len(known))
        here = "yes" if base["here"] else f"no, {base['source'].partition(':')[0]}"
        cells = (size, str(base["context"]), languages, str(base["licence"]), here)
        table.add_row(str(base["id"]), *cells)
    out = new_console()
    out.print(table)
    if not all(base["here"] for base in bases):
        out.print("\nluthier models pull ID fetches one; tune does so by itself.", highlight=False)
    if custom:
        table = _table("custom model", "learned", "weights", "validation", "created")
        for model in custom:
            shown = validation_result(model.get("measure", ""), model.get("validation", {}))
            if "damaged" in model:
                table.add_row(model["id"], "[red]damaged[/red]", "", "", "")
            else:
                names = (model["objective"], model["adaptation"])
                table.add_row(model["id"], *names, shown, model["created"])
        out.print()
        out.print(table)
    else:
        out.print("\nNo custom models yet: luthier tune DATA makes one.", highlight=False)


def _made_here(model: StoredModel) -> dict[str, Any]:
    """One line of the list of base models, for one that was pre-trained in this store."""
    manifest = model.manifest
    try:
        network = manifest["recipe"]["network"]
        about = f"pre-trained here: {network['family']}"
        return {
            "id": model.id,
            "kind": manifest["kind"],
            "parameters": manifest["parameters"],
            "context": manifest["context"],
            "licence": "your own",
            "here": True,
            "about": about,
        }
    except (KeyError, TypeError) as error:
        reason = manifest.get("damaged") or f"{MANIFEST} has no {error}"
        return {"id": model.id, "here": True, "damaged": reason}


def _listed(model: StoredModel) -> dict[str, Any]:
    """One line of the list of custom models."""
    manifest = model.manifest
    try:
        if cut := manifest.get("student"):
            return {
                "id": model.id,
                "parent": manifest["parent"],
                "created": manifest["created"],
                "objective": manifest.get("recipe", {}).get("objective", {}).get("method", ""),
                "adaptation": f"student, {cut['layers']} of {cut['teacher_layers']} layers",
                "validation_loss": None,
                "parameters": manifest["parameters"],
            }
        if "source" in manifest:
            return {
                "id": model.id,
                "parent": manifest["parent"],
                "created": manifest["created"],
                "objective": "",
                "adaptation": f"imported {manifest['saved']}",
                "validation_loss": None,
                "source": manifest["source"],
            }
        return {
            "id": model.id,
            "parent": manifest["parent"],
            "created": manifest["created"],
            "objective": manifest["recipe"]["objective"]["method"],
            "adaptation": manifest["recipe"]["adaptation"]["method"],
            "validation_loss": manifest["metrics"]["validation_loss"],
            "measure": OBJECTIVES[manifest["recipe"]["objective"]["method"]].measure,
            "validation": (manifest["metrics"].get("verdict") or {}).get("kept", {}),
        }
    except (KeyError, TypeError) as error:
        reason = manifest.get("damaged") or f"{MANIFEST} has no {error}"
        return {"id": model.id, "damaged": reason}


def _table(*columns: str) -> Any:
    """A borderless table whose first column, the id, is never cut."""
    from rich.table import Table

    table = Table(box=None)
    table.add_column(columns[0], no_wrap=True)
    for column in columns[1:]:
        table.add_column(column)
    return table


def show(model_id: str, as_json: bool) -> None:
    """Print a model's manifest, its files with their hashes, and whether they are intact."""
    model = find(model_id) if model_id not in CATALOG else _catalogued(model_id)
    details = {
        "id": model.id,
        "folder": str(model.folder),
        "lineage": _lineage(model),
        **{key: value for key, value in model.manifest.items() if key != "files"},
        "files": _files(model),
    }
    if as_json:
        print_json(details)
        return
    print_text("\n".join(_lines(details, "")))


def _lines(value: Any, indent: str) -> list[str]:
    """JSON values as indented lines of names and values, for people."""
    if isinstance(value, dict):
        pairs = [(f"{name}:", each) for name, each in value.items()]
    else:
        pairs = [("-", each) for each in value]
    lines: list[str] = []
    for name, each in pairs:
        if isinstance(each, dict | list) and each:
            lines += [f"{indent}{name}", *_lines(each, indent + "  ")]
        else:
            lines.append(f"{indent}{name} {_shown(each)}")
    return lines


def _shown(value: Any) -> str:
    words = {None: "none", True: "yes", False: "no"}
    if value is None or isinstance(value, bool):
        return words[value]
    if isinstance(value, dict | list):
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _catalogued(model_id: str) -> StoredModel:
    """A catalogue model, described without fetching it."""
    folder = base_folder(model_id)
    if (folder / MANIFEST).is_file():
        return find(model_id)
    entry = CATALOG[model_id]
    manifest = {
        "kind": entry.kind,
        **entry.source.provenance,
        "licence": entry.licence,
        "parameters": entry.parameters,
        "context": entry.context,
        "here": False,
    }
    return StoredModel(entry.id, folder, manifest)


def _lineage(model: StoredModel) -> list[str]:
    ids = [model.id]
    while model.manifest.get("parent"):
        try:
            model = find(model.manifest["parent"])
        except Exception:
            ids.append(f"{model.manifest['parent']} (not here)")
            break
        ids.append(model.id)
    return ids


def _files(model: StoredModel) -> dict[str, dict[str, Any]]:
    """Path, size, hash and state of each file."""
    from luthier.files import hashes_of

    if not model.folder.is_dir():
        return {}
    recorded = model.manifest.get("files", {})
    found = hashes_of(model.folder, skip=(MANIFEST,))
    return {
        name: {
            "path": str(model.folder / name),
            "bytes": (model.folder / name).stat().st_size if name in found else 0,
            "sha256": found.get(name),
            "intact": found.get(name) == recorded[name] if name in recorded else None,
        }
        for name in sorted(found.keys() | recorded.keys())
    }


def pull_model(model_id: str, as_json: bool) -> None:
    """Fetch a base model, or say that it is here and intact."""
    from luthier.files import verify

    reporter = LiveReporter(quiet=as_json)
    model = find(model_id, reporter.stage)
    try:
        verify(model.folder, model.manifest.get("files", {}))
    except CorruptFile:
        if model_id not in CATALOG:
            raise
        reporter.note("a file was damaged; fetching it again")
        shutil.rmtree(model.folder)
        model = find(model_id, reporter.stage)
    if as_json:
        print_json({"id": model.id, "folder": str(model.folder)})
    else:
        print_text(f"{model.id} is in {model.folder}")


def export_model(model_id: str, folder: Path, merged: bool, as_json: bool) -> None:
    """Write a model for other software."""
    from luthier.models.load import read_config
    from luthier.models.nets import NETS
    from luthier.serving.export import export
    from luthier.store.models import objective_of

    stored = find(model_id)
    target = export(stored, folder, merged)
    network = read_config(stored.network_folder, objective_of(stored).head()).model_type
    if as_json:
        files = sorted(path.name for path in target.iterdir())
        report = {"id": model_id, "folder": str(target), "network": network, "files": files}
        print_json(report | {"own_network": network in NETS})
        return
    print_text(f"{model_id} was written to {target}")
    if network in NETS:
        text = f"Its network, {network}, is one of luthier's: transformers loads it after "
        text += "`luthier.models.nets.register()`."
        if (target / "adapter_config.json").exists():
            text = f"PEFT does not find its network, {network}, from the base: export it with --merged."
        print_text(text)


def remove(model_id: str, as_json: bool) -> None:
    """Delete a model made here and the folder of its run; refuse while others build on it."""
    from luthier.engine.runs import BaseRun, Run
    from luthier.recipe import NAME_PATTERN
    from luthier.store.removal import remove_unneeded

    base, colon, name = model_id.partition(":")
    made_here = not colon and model_id not in CATALOG
    run = BaseRun(base) if made_here else Run(base, name)
    beside = [] if made_here else [luthier_home() / "distillations" / short_name(base) / name]
    # An empty name, or `..`, would take the models beside it, too.
    folders = (run.model_folder, run.folder, *beside)
    known = NAME_PATTERN.fullmatch(run.name) and any(folder.exists() for folder in folders)
    if not known:
        raise RecipeError(
            f"{model_id!r} is no model that was made here, and no run; see `luthier models list`"
        )
    children = [
        m.id
        for m in custom_models()
        if model_id in (m.manifest.get("parent"), made_here and m.root)
    ]
    if children:
        raise RecipeError(f"{', '.join(children)} was made from {model_id}; remove it first")
    parents = [m.manifest.get("parent") for m in custom_models() if m.id == model_id]
    with run.lock():
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
    for parent in parents:
        remove_unneeded(parent)
    if as_json:
        print_json({"id": model_id, "removed": True})
    else:
        print_text(f"{model_id} is gone")
