"""End-to-end tests of an installed plugin package."""

from __future__ import annotations

import importlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from short_runs import manifest_of, write_rows

import luthier
from luthier import plugins
from luthier.adaptations import ADAPTATIONS
from luthier.engine import train
from luthier.errors import RecipeError
from luthier.graders import GRADERS, Exact, Grader
from luthier.inference.decoder import Decoder
from luthier.inference.inference import Chat, GenerationRequest
from luthier.inference.memory import CacheBudget
from luthier.library.models import find
from luthier.models.catalog import CATALOG
from luthier.models.decoding.backends import BACKENDS
from luthier.objectives import OBJECTIVES
from luthier.recipe import Recipe
from luthier.server.tables.foundation import foundation_model, foundation_models
from luthier.trackers import TRACKERS
from luthier.types import Message
from luthier.workflows.capabilities import capabilities

SAMPLE = Path(__file__).parent / "sample_plugin"
TABLES: tuple[plugins.PluginTable[Any], ...] = (
    OBJECTIVES,
    ADAPTATIONS,
    GRADERS,
    CATALOG,
    BACKENDS,
    TRACKERS,
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sample package and the metadata that pip would write."""
    target = tmp_path_factory.mktemp("site")
    project = tomllib.loads((SAMPLE / "pyproject.toml").read_text())["project"]
    name, version = project["name"], project["version"]
    shutil.copy(SAMPLE / "luthier_sample.py", target)
    metadata = target / f"{name.replace('-', '_')}-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    points = "".join(
        f"[{group}]\n" + "".join(f"{key} = {value}\n" for key, value in entries.items())
        for group, entries in project["entry-points"].items()
    )
    (metadata / "entry_points.txt").write_text(points)
    return target


def forget() -> None:
    for table in TABLES:
        table.__dict__.pop("_points", None)
        table._loaded.clear()
    plugins.extensions.cache_clear()
    importlib.invalidate_caches()


@pytest.fixture
def installed(
    site: Path,
    monkeypatch: pytest.MonkeyPatch,
    family_folder: Callable[[str], Path],
) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("SAMPLE_MODEL", str(family_folder("bert")))
    forget()
    yield
    monkeypatch.undo()
    sys.modules.pop("luthier_sample", None)
    forget()


@pytest.mark.usefixtures("installed")
def test_run_with_plugins_only(tmp_path: Path) -> None:
    rows = [
        {"text": f"the {word} {n}", "label": word} for n in range(12) for word in ("fox", "dog")
    ]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    recipe = Recipe.parse(
        {
            "base": "sample-tiny",
            "name": "focused",
            "data": {"train": str(data)},
            "objective": {"method": "focal", "gamma": 1.5},
            "adaptation": "norms",
            "training": {"max_steps": 4, "baseline_seconds": 0},
        }
    )
    result = train.train(recipe)
    manifest = manifest_of(result)
    assert manifest["recipe"]["objective"]["gamma"] == 1.5
    assert manifest["saved"] == "adapter" and manifest["root"] == "sample-tiny"
    assert find("sample-tiny").manifest.source == "folder:SAMPLE_MODEL"
    model = find("sample-tiny:focused")
    assert type(model.objective) is OBJECTIVES["focal"]
    # Without the package, the error names the missing package.
    sys.path.pop(0)
    forget()
    with pytest.raises(RecipeError):
        _ = find("sample-tiny:focused").objective


@pytest.mark.usefixtures("installed")
def test_plugin_backend_matches_builtin_backend(
    tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plugin backend generates the text of the built-in backend, in commands and on the server."""
    prompts = ["say fox", "say the dog", "x"]
    expected = luthier.load(str(tiny_model_folder)).generate(prompts, max_tokens=8)
    monkeypatch.setenv("LUTHIER_BACKEND", "recomputing")
    model = luthier.load(str(tiny_model_folder))
    assert type(model.generator.backend).__name__ == "Recomputing"
    assert model.generate(prompts, max_tokens=8) == expected
    budget = CacheBudget(1 << 30)
    decoder = Decoder.open(find(str(tiny_model_folder)), budget)
    try:
        asked = GenerationRequest(
            Chat((Message("user", "say fox"),)), max_tokens=8, temperature=0.0
        )
        (answer,) = decoder.submit(asked).results()
        assert answer.text == expected[0]
    finally:
        decoder.close()
    monkeypatch.setenv("LUTHIER_BACKEND", "warp")
    with pytest.raises(RecipeError) as refused:
        luthier.load(str(tiny_model_folder))
    assert (refused.value.setting, refused.value.problem.value) == ("LUTHIER_BACKEND", "warp")


@pytest.mark.usefixtures("installed")
def test_plugins_are_listed_and_checked() -> None:
    assert list(OBJECTIVES)[-1] == "focal" and len(OBJECTIVES) == len({*OBJECTIVES}) > 20
    found = capabilities("sample-tiny")
    cells = {(each.objective, each.adaptation): each for each in found.verdicts}
    assert not found.here and cells["focal", "norms"].fits
    assert "cannot be a causal language model" in cells["sft", "norms"].reason
    for method, gamma in (("focal", "much"), ("sft", 1)):
        fields = {"data": {"train": "x"}, "objective": {"method": method, "gamma": gamma}}
        with pytest.raises(RecipeError) as refused:
            Recipe.parse(fields)
        assert refused.value.setting == "objective.gamma"
    assert GRADERS["brief"].model_validate({"words": 3})
    assert OBJECTIVES.package_of("focal") == "luthier-sample 0.3"
    assert OBJECTIVES.package_of("sft") is None
    offered = foundation_model("luthier.sample-tiny")
    assert offered is not None and offered.name == "sample-tiny" and offered in foundation_models()


@pytest.mark.usefixtures("installed")
def test_broken_plugin_is_skipped_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        assert "broken" not in list(OBJECTIVES) and "broken" in OBJECTIVES
        assert list(OBJECTIVES)
    (record,) = caplog.records
    assert "broken of luthier-sample 0.3 is left out: ModuleNotFoundError" in record.getMessage()
    with pytest.raises(RecipeError) as refused:
        Recipe.parse({"data": {"train": "x"}, "objective": "broken"})
    assert (refused.value.rule, refused.value.problem.value) == (
        "plugin.broken",
        "luthier-sample 0.3",
    )
    # Built-in entries take precedence.
    assert GRADERS["exact"] is Exact


@pytest.mark.slow
def test_plugins_command_lists_packages(site: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "luthier", "plugins", "--json"],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(site)},
    )
    found = {each["name"]: each for each in json.loads(done.stdout)["plugins"]}
    assert found["focal"] == {
        "group": "luthier.objectives", "name": "focal", "package": "luthier-sample 0.3", "problem": ""
    }  # fmt: skip
    assert "missing" in found["broken"]["problem"]
    assert "built-in" in found["exact"]["problem"]
    for name in ("sample-tiny", "norms", "recomputing", "count-verses"):
        assert not found[name]["problem"]
    assert "built-in" in found["tune"]["problem"]


def test_commands_and_readers_of_packages(site: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.verse"
    rows.write_text("the quick fox\nis here\n\nthe lazy dog\n")

    def run(*command: str) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, "-m", "luthier", *command, "--json"],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(site)},
        )
        return dict(json.loads(done.stdout))

    assert run("count-verses", str(rows), "--least", "2") == {"verses": 1}
    assert run("inspect", str(rows), "--base", "none")["rows"] == {"train": 2}


@pytest.mark.parametrize(
    "part",
    [object(), dict, Exact],
)
def test_invalid_plugin_grader_is_rejected(part: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    point = SimpleNamespace(name="other", value="x:y", dist=None, load=lambda: part)
    monkeypatch.setattr(plugins, "entry_points", lambda group: [point])
    table = plugins.PluginTable("graders", Grader, {})
    with pytest.raises(RecipeError) as refused:
        table["other"]
    assert refused.value.rule == "plugin.broken"
    assert list(table) == [] and table.get("third") is None


def test_choice_between_equal_plugin_names_is_stable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    points = [
        SimpleNamespace(name="exact", value=value, dist=None, load=lambda: Exact)
        for value in ("b", "a")
    ]
    for order in (points, points[::-1]):
        monkeypatch.setattr(plugins, "entry_points", lambda group, order=order: order)
        assert plugins.PluginTable("graders", Grader, {}).package_of("exact") == "a"
