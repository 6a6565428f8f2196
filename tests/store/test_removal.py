"""Files of models go when nothing needs them any more, in whatever order their models are deleted."""

from __future__ import annotations

from pathlib import Path

import pytest

from luthier.files import luthier_home, write_json
from luthier.models.catalog import MANIFEST
from luthier.store.models import custom_folder, custom_models
from luthier.store.removal import remove_files, remove_unneeded


def stored(name: str, parent: str | None, saved: str = "adapter") -> str:
    """A model with a run, on ``parent``."""
    model_id = f"tiny:{name}"
    write_json(
        custom_folder("tiny", name) / MANIFEST,
        {"id": model_id, "parent": parent, "saved": saved, "root": "tiny"},
    )
    run(name).mkdir(parents=True)
    (run(name) / "metrics.jsonl").write_text("")
    return model_id


def run(name: str) -> Path:
    return luthier_home() / "runs" / "tiny" / name


def left() -> set[str]:
    """Models that are on disk; runs are of such models."""
    models = {each.folder.name for each in custom_models()}
    runs = {path.name for path in (luthier_home() / "runs" / "tiny").iterdir()}
    assert runs <= models
    return models


@pytest.mark.parametrize("last", ["child", "grandchild"])
def test_files_of_a_parent_go_with_the_last_model_that_stands_on_them(last: str) -> None:
    parent = stored("parent", "tiny")
    child = stored("child", parent)
    grandchild = stored("grandchild", child)
    sibling = stored("sibling", parent)
    log = luthier_home() / "jobs" / "parent.log"
    log.parent.mkdir()
    log.write_text("rows may be quoted here")
    remove_files(parent)
    assert left() == {"parent", "child", "grandchild", "sibling"}
    # What a run wrote beside its model is of no use to others.
    assert not run("parent").exists() and not log.exists() and run("child").exists()
    remove_files(sibling)
    assert left() == {"parent", "child", "grandchild"}
    first, second = (grandchild, child) if last == "child" else (child, grandchild)
    remove_files(first)
    assert left() == ({"parent", "child"} if last == "child" else {"parent", "child", "grandchild"})
    remove_files(second)
    assert left() == set()


def test_a_parent_that_nobody_removed_stays() -> None:
    parent = stored("by-command-line", "tiny")
    remove_files(stored("child", parent))
    assert left() == {"by-command-line"}
    remove_unneeded(parent)
    remove_unneeded(None)
    remove_files("tiny:never")
    remove_files(None)
    assert left() == {"by-command-line"}
